"""Pictures in batches: constant, in order, overlapped with what threads do, and none forgotten."""

import pickle
import threading
import time

import numpy as np
import pytest

from data_pipeline.errors import UserError
from data_pipeline.prepare.encoding import Ahead, PictureEncoder
from tests.support.raw import ColourTokenizer, picture


class Noting(ColourTokenizer):
    """Notes the batches it gets."""

    def __init__(self):
        super().__init__()
        self.batches = []

    def encode(self, images):
        self.batches.append(len(images))
        return super().encode(images)


class Held(ColourTokenizer):
    """Encodes nothing before it is let go."""

    def __init__(self):
        super().__init__()
        self.go_on, self.was_let_go = threading.Event(), True

    def encode(self, images):
        self.was_let_go &= self.go_on.wait(timeout=20.0)
        return super().encode(images)


def pictures(count):
    return [picture("red", seed=number).transpose(2, 0, 1) for number in range(count)]


@pytest.mark.parametrize(("count", "batches"), [(0, []), (3, [3]), (8, [4, 4]), (10, [4, 4, 2])])
def test_batches_are_constant_but_the_last_and_ids_keep_their_numbers(count, batches):
    tokenizer, given = Noting(), pictures(count)
    encoder = PictureEncoder(tokenizer, 4)
    assert [encoder.add(one) for one in given] == list(range(count))
    encoder.flush()
    assert tokenizer.batches == batches and encoder.num_ready == count
    expected = ColourTokenizer().encode(np.stack(given)) if given else []
    assert [encoder.take(number).tolist() for number in range(count)] == [row.tolist() for row in expected]
    encoder.close()


def test_adding_goes_on_while_a_batch_is_encoded():
    tokenizer = Held()
    encoder = PictureEncoder(tokenizer, 4)
    for one in pictures(7):
        encoder.add(one)
    assert encoder.num_ready == 0
    tokenizer.go_on.set()
    encoder.flush()
    assert encoder.num_ready == 7 and tokenizer.was_let_go
    encoder.close()


def test_a_closed_encoder_begins_anew_and_pickles():
    encoder = PictureEncoder(ColourTokenizer(), 4)
    for one in pictures(5):
        encoder.add(one)
    encoder.close()
    again = pickle.loads(pickle.dumps(encoder))
    assert again.add(pictures(1)[0]) == 0


@pytest.mark.parametrize("wrong", [np.zeros((1, 16), np.int64), np.zeros((1, 15), np.uint16), np.full((1, 16), 64)])
def test_ids_that_break_the_promise_are_refused(wrong):
    class Wrong(ColourTokenizer):
        def encode(self, images):
            return wrong.astype(np.uint16) if int(wrong.max()) else wrong

    encoder = PictureEncoder(Wrong(), 1)
    encoder.add(pictures(1)[0])
    with pytest.raises(UserError, match="it promises uint16"):
        encoder.flush()
    encoder.close()


def test_calls_ahead_are_taken_in_order_and_raise_in_their_turn():
    ahead = Ahead(3)

    def call(number):
        time.sleep(0.01 * (5 - number))
        if number == 2:
            raise KeyError(number)
        return number, threading.current_thread() is threading.main_thread()

    for number in range(5):
        ahead.ask(lambda number=number: call(number))
    assert [ahead.take(), ahead.take()] == [(0, False), (1, False)]
    with pytest.raises(KeyError):
        ahead.take()
    assert ahead.take()[0] == 3 and len(ahead) == 1
    before = threading.active_count()
    ahead.close()
    assert len(ahead) == 0 and threading.active_count() < before
