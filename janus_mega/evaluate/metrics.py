"""Figures from arrays of answers, ids and losses; numpy alone, no models.

Shape letters: `n` items, `i` image ids per picture.
"""

import math

import numpy as np

NO_ANSWER = -1
"""Stands for an answer that names no class."""


def accuracy(read: np.ndarray, wanted: np.ndarray) -> float:
    """Share of items [n] that are read as wanted; 0 items give 0."""
    return float((read == wanted).mean()) if len(wanted) else 0.0


def confusion_matrix(wanted: np.ndarray, read: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts int64 [classes, classes + 1]: row wanted, column read; the last column counts `NO_ANSWER`."""
    columns = np.where(read == NO_ANSWER, num_classes, read)
    matrix = np.zeros((num_classes, num_classes + 1), np.int64)
    np.add.at(matrix, (wanted, columns), 1)
    return matrix


def distinct_share(ids: np.ndarray) -> float:
    """Different id sequences over all sequences [n, i]; 1 means that no picture is drawn twice."""
    return len(np.unique(ids, axis=0)) / len(ids) if len(ids) else 0.0


def copied_share(ids: np.ndarray, training_ids: np.ndarray) -> float:
    """Share of id sequences [n, i] that equal some training picture's sequence exactly."""
    known = {sequence.tobytes() for sequence in training_ids.astype(np.int64)}
    return sum(sequence.tobytes() in known for sequence in ids.astype(np.int64)) / len(ids) if len(ids) else 0.0


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """Bits that a text costs per byte of its UTF-8, from the sum of -ln p over its tokens."""
    return nats / math.log(2.0) / num_bytes
