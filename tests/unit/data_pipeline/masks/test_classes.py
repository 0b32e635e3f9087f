"""Classes of equal rows and runs, and the first of each."""

import numpy as np

from data_pipeline.masks.classes import classes_of_rows, classes_of_runs, later_of_class


def same_partition(classes, keys):
    pairs = set(zip(classes.tolist(), keys, strict=True))
    return len(pairs) == len(set(classes.tolist())) == len(set(keys))


def test_rows():
    words = np.random.default_rng(0).integers(0, 3, (200, 3))
    assert same_partition(classes_of_rows(words), [tuple(row) for row in words.tolist()])
    assert classes_of_rows(np.empty((0, 2), np.uint64)).tolist() == []


def test_runs_are_equal_in_order_and_length():
    runs = [[5], [], [5, 7], [7, 5], [5], [5, 7], [7], [5, 7, 5], []]
    keys = np.array([key for run in runs for key in run], np.int64)
    owners = np.repeat(np.arange(len(runs)), [len(run) for run in runs])
    classes = classes_of_runs(keys, owners, len(runs))
    assert classes[[1, 8]].tolist() == [-1, -1]
    held = [number for number, run in enumerate(runs) if run]
    assert same_partition(classes[held], [tuple(runs[number]) for number in held])


def test_the_first_eligible_one_stays():
    classes = np.array([4, -1, 4, 9, 4, -1, 9, 2])
    eligible = np.array([0, 1, 1, 1, 1, 1, 1, 1], bool)
    assert np.flatnonzero(later_of_class(classes, eligible)).tolist() == [4, 6]
    assert not later_of_class(classes, np.zeros(8, bool)).any()
