"""Judges: shrinking is exact, and the two judges see what they are for."""

import numpy as np
import pytest

from janus_mega.demo import digits
from janus_mega.evaluate.judges import DigitJudge, coverage_score, shrink_by_area

pytest.importorskip("sklearn")


def test_shrinking_takes_means_of_squares_and_of_colours():
    picture = np.zeros((1, 3, 16, 16), np.uint8)
    picture[0, :, 0, 0] = 255
    picture[0, 1, 2:4, 2:4] = 255
    small = shrink_by_area(picture).reshape(8, 8)
    assert small[0, 0] == pytest.approx(4.0)
    assert small[1, 1] == pytest.approx(16 / 3)
    assert small.sum() == pytest.approx(4 + 16 / 3)
    with pytest.raises(ValueError, match="multiple of 8"):
        shrink_by_area(np.zeros((1, 12, 12), np.uint8))


def test_copies_of_ten_pictures_pass_the_first_judge_and_fail_the_second():
    train, held_out = digits.load_digits()
    pictures, real = digits.enlarge(train.small, 16), digits.enlarge(held_out.small, 16)
    chosen = np.array([np.flatnonzero(train.labels == digit)[0] for digit in range(10)])
    copies, asked = pictures[chosen].repeat(100, axis=0), np.arange(10).repeat(100)
    judge = DigitJudge(pictures, train.labels)
    assert (judge.read(copies) == asked).mean() == 1.0
    assert coverage_score(copies, asked, real, held_out.labels) < 0.85
    assert coverage_score(pictures[:1000], train.labels[:1000], real, held_out.labels) > 0.97


def test_drawings_of_one_digit_cannot_be_scored():
    with pytest.raises(ValueError, match="two digits"):
        coverage_score(np.zeros((2, 8, 8), np.uint8), np.zeros(2), np.zeros((1, 8, 8), np.uint8), np.zeros(1))
