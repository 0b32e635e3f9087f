"""Figures on small arrays whose answers are plain."""

import math

import numpy as np
import pytest

from janus_mega.evaluate import metrics


def test_accuracy_counts_matches():
    assert metrics.accuracy(np.array([1, 2, 3, -1]), np.array([1, 2, 0, 0])) == 0.5
    assert metrics.accuracy(np.array([]), np.array([])) == 0.0


def test_confusion_puts_missing_answers_last():
    wanted, read = np.array([0, 0, 1, 2]), np.array([0, 1, 1, metrics.NO_ANSWER])
    matrix = metrics.confusion_matrix(wanted, read, 3)
    assert matrix.tolist() == [[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]]


def test_distinct_and_copied_shares():
    ids = np.array([[1, 2], [1, 2], [3, 4], [2, 1]], np.uint16)
    assert metrics.distinct_share(ids) == 0.75
    assert metrics.copied_share(ids, np.array([[3, 4], [9, 9]], np.int64)) == 0.25
    assert metrics.copied_share(ids, np.array([[4, 3]])) == 0.0


def test_bits_per_byte():
    assert metrics.bits_per_byte(math.log(2) * 12, 6) == pytest.approx(2.0)
