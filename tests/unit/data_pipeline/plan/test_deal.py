"""Dealing rows: into steps by task, inside a step to ranks by images."""

import numpy as np
import pytest

from data_pipeline.plan.deal import deal_to_batches, deal_to_ranks

ROW = 4096


def rows_of(kind, random, count):
    shares = {
        "mixed": lambda: random.dirichlet([1, 5, 2], count),
        "one task a row": lambda: np.eye(3)[random.choice(3, count, p=[0.2, 0.3, 0.5])],
        "uneven": lambda: random.dirichlet([0.3, 0.3, 0.3], count),
        "no text": lambda: np.insert(random.dirichlet([1, 1], count), 0, 0, axis=1),
    }[kind]()
    return (shares * ROW).astype(np.int64)


@pytest.mark.parametrize("kind", ["mixed", "one task a row", "uneven", "no text"])
@pytest.mark.parametrize(("num_rows", "num_batches"), [(1024, 16), (1024, 2), (256, 32), (96, 96), (64, 1)])
def test_every_task_is_within_a_row_of_its_share_in_every_batch(kind, num_rows, num_batches):
    random = np.random.default_rng(0)
    for key in range(4):
        tokens = rows_of(kind, random, num_rows)
        order = deal_to_batches(tokens, num_batches, key)
        assert sorted(order.tolist()) == list(range(num_rows))
        held = tokens[order].reshape(num_batches, -1, 3).sum(axis=1)
        assert np.abs(held - held.mean(axis=0)).max() <= ROW


def test_rows_in_any_order_would_break_that_bar():
    tokens = rows_of("one task a row", np.random.default_rng(0), 1024)
    held = tokens.reshape(16, -1, 3).sum(axis=1)
    assert np.abs(held - held.mean(axis=0)).max() > 3 * ROW


@pytest.mark.parametrize(("dp_size", "micro_batch_size"), [(1, 1), (1, 4), (2, 1), (4, 2), (32, 8), (64, 4)])
def test_ranks_hold_every_row_once_and_like_numbers_of_images(dp_size, micro_batch_size):
    images = np.random.default_rng(1).binomial(6, 0.45, 256)
    placed = deal_to_ranks(images, dp_size, micro_batch_size)
    assert placed.shape == (dp_size, 256 // dp_size // micro_batch_size, micro_batch_size)
    assert sorted(placed.ravel().tolist()) == list(range(256))
    of_rank = images[placed].sum(axis=(1, 2))
    assert of_rank.max() - of_rank.min() <= images.max()
    assert of_rank.max() <= 1.1 * of_rank.mean()
    of_position = images[placed].sum(axis=2)
    assert (of_position.max(axis=0) - of_position.min(axis=0)).max() <= images.max()


def test_rank_order_would_be_uneven():
    images = np.random.default_rng(1).binomial(6, 0.45, 256).reshape(32, 8).sum(axis=1)
    assert images.max() > 1.3 * images.mean()


@pytest.mark.parametrize("dp_size", [4, 32])
def test_few_images_are_dealt_to_one_on_every_rank(dp_size):
    # Most rows hold none: dealt largest first, some ranks would get two images more than others.
    images = np.random.default_rng(2).choice([0, 0, 0, 0, 1, 2, 5], 8 * dp_size)
    of_rank = images[deal_to_ranks(images, dp_size, 8)].sum(axis=(1, 2))
    assert of_rank.max() - of_rank.min() <= 1


def test_uneven_layouts_are_refused():
    with pytest.raises(ValueError, match="global_batch_size=10 is not a multiple of dp_size=2 x micro_batch_size=2"):
        deal_to_ranks(np.zeros(10), 2, 2)
