"""Digits and their records: real, split, and never leaking a held-out picture or pair."""

import numpy as np
import pytest

from janus_mega.demo import digits
from janus_mega.evaluate.judges import DigitJudge, shrink_by_area

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def split() -> tuple[digits.Digits, digits.Digits]:
    return digits.load_digits()


def test_split_has_the_promised_sizes_and_shares_no_picture_order(split):
    train, held_out = split
    assert len(train.labels) == 1440 and len(held_out.labels) == 357
    assert sorted(set(held_out.labels)) == list(range(10))
    again, _ = digits.load_digits()
    assert (again.small == train.small).all()
    other, _ = digits.load_digits(seed=1)
    assert (other.small != train.small).any()


def test_enlarged_digits_shrink_back_to_what_they_were(split):
    held_out = split[1]
    pictures = digits.enlarge(held_out.small, 16)
    assert pictures.shape == (357, 16, 16) and pictures.dtype == np.uint8
    back = shrink_by_area(pictures) * (255 / 16)
    difference = np.abs(back - held_out.small.reshape(357, 64))
    assert difference.mean() < 16  # bicubic overshoots a little at strokes


def test_a_judge_of_real_training_digits_reads_held_out_ones(split):
    train, held_out = split
    judge = DigitJudge(digits.enlarge(train.small, 16), train.labels)
    right = (judge.read(digits.enlarge(held_out.small, 16)) == held_out.labels).mean()
    assert right >= 0.985  # measured 0.992


def test_held_out_pairs_leave_every_digit_out_once_on_each_side():
    pairs = digits.held_out_pairs()
    assert len(pairs) == 10
    assert {left for left, _ in pairs} == {right for _, right in pairs} == set(range(10))


def test_pair_records_never_read_a_held_out_pair_and_cover_all_others():
    labels = np.arange(10).repeat(3)
    paths = [f"{number}.png" for number in range(30)]
    left_out = digits.held_out_pairs()
    met = set()
    for record in digits.pair_records(labels, paths, 3000, seed=0):
        images = [segment["image"] for segment in record["segments"] if "image" in segment]
        pair = tuple(int(labels[paths.index(image)]) for image in images)
        words = record["segments"][-1]["text"].split()
        assert words == [digits.DIGIT_WORDS[digit] for digit in pair]
        met.add(pair)
    assert not met & left_out
    assert len(met) == 90


def test_difference_records_cover_all_pairs_and_say_negative_ones_in_words():
    labels = np.arange(10)
    paths = [f"{number}.png" for number in range(10)]
    met = set()
    for record in digits.difference_records(labels, paths, 2000, seed=0):
        first, minus, second, cue, answer = record["segments"]
        pair = paths.index(first["image"]), paths.index(second["image"])
        assert (minus, cue) == ({"text": " minus", "loss": False}, {"text": " equals", "loss": False})
        assert answer["text"] == " " + digits.difference_words(*pair)
        met.add(pair)
    assert len(met) == 100
    assert digits.difference_words(4, 7) == "minus three"
    assert digits.difference_words(7, 4) == "three"
    assert digits.difference_words(5, 5) == "zero"


def test_records_do_not_change_when_another_kind_grows():
    labels = np.arange(10)
    paths = [f"{number}.png" for number in range(10)]
    few = list(digits.pair_records(labels, paths, 5, seed=0))
    many = list(digits.pair_records(labels, paths, 50, seed=0))
    assert many[:5] == few
    assert list(digits.pair_records(labels, paths, 5, seed=1)) != few


def test_record_identities_are_unique():
    labels = np.arange(10)
    paths = [f"{number}.png" for number in range(10)]
    for records in (digits.caption_records, digits.description_records, digits.question_records):
        uids = [record["id"] for record in records(labels, paths)]
        assert len(uids) == len(set(uids)) >= 10
