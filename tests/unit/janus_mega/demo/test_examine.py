"""What is kept for the page: wrong answers first, right ones from everywhere, never more than there is room."""

import numpy as np
import pytest

from janus_mega.demo import examine
from janus_mega.evaluate.suites import Reading, ReadingItem
from janus_mega.infer.text import Prompt


def readings(right: int, wrong: int) -> list[Reading]:
    prompt = Prompt(np.zeros(1, np.int32))
    answers = ["a"] * right + ["b"] * wrong
    return [Reading(ReadingItem(str(number), prompt, "a"), answer) for number, answer in enumerate(answers)]


@pytest.mark.parametrize(("right", "wrong"), [(1000, 60), (1000, 0), (0, 60), (5, 2), (0, 0), (24, 1)])
def test_wrong_answers_come_first_and_leave_room_for_right_ones(right, wrong):
    shown = examine._to_show(readings(right, wrong))
    kinds = [reading.is_right for reading in shown]
    assert kinds == sorted(kinds)
    assert len(shown) <= examine.SHOWN
    assert kinds.count(False) == min(wrong, examine.SHOWN // 2)
    assert bool(kinds.count(True)) == bool(right)
    if right == 1000:
        assert int(shown[-1].item.uid) > 900
