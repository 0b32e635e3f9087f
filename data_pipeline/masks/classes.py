"""Which rows are alike: classes of equal keys, equal runs of keys, and the first of every class.

Everything is sorting and counting on whole arrays, so tens of millions of samples take seconds and a few arrays.
"""

import numpy as np


def classes_of_rows(words: np.ndarray) -> np.ndarray:
    """int64 [n]: a number per row of an integer array [n, k], equal where rows are equal; the numbers mean nothing."""
    if not len(words):
        return np.empty(0, np.int64)
    order = np.lexsort(words.T[::-1])
    ordered = words[order]
    begins = np.concatenate([[False], (ordered[1:] != ordered[:-1]).any(1)])
    classes = np.empty(len(words), np.int64)
    classes[order] = np.cumsum(begins)
    return classes


def classes_of_runs(keys: np.ndarray, owners: np.ndarray, num_owners: int) -> np.ndarray:
    """Compares owners by the run of keys that each has.

    Args:
        keys: int64 [n]: classes of what the owners hold.
        owners: int64 [n], ascending: who holds it, 0 to num_owners - 1.
        num_owners: Number of owners.

    Returns:
        int64 [num_owners]: equal where two hold the same keys in the same order, -1 for those that hold nothing.
    """
    counts = np.bincount(owners, minlength=num_owners)
    starts = np.cumsum(counts) - counts
    classes = np.full(num_owners, -1, np.int64)
    num_classes = 0
    for count in np.unique(counts[counts > 0]).tolist():
        chosen = np.flatnonzero(counts == count)
        runs = keys[starts[chosen][:, None] + np.arange(count)]
        found = classes_of_rows(runs)
        classes[chosen] = found + num_classes
        num_classes += int(found.max()) + 1
    return classes


def later_of_class(classes: np.ndarray, eligible: np.ndarray) -> np.ndarray:
    """bool [n]: True for what is eligible and has an eligible one of its class before it; class -1 is like nothing."""
    chosen = np.flatnonzero(eligible & (classes >= 0))
    later = np.zeros(len(classes), np.bool_)
    later[chosen] = True
    later[chosen[np.unique(classes[chosen], return_index=True)[1]]] = False
    return later
