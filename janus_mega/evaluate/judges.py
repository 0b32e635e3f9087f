"""Judges of drawn digits that take no part in training: a support vector machine on 8x8 pictures.

Two questions are asked with the same machine. Fitted on real training digits, it tells whether a drawing is read as
what was asked for; ten good pictures drawn over and over would pass. Fitted on drawings alone, it tells by how well it
reads real held-out digits whether the drawings cover the handwriting (classification accuracy score); those ten
pictures fail there. Pictures are shrunk by area to the 8x8 of the digits' origin, so size and colour do not matter.

Shapes: pictures uint8 [n, side, side] or [n, 3, side, side]; features [n, 64].
"""

import numpy as np

SIDE = 8
"""Judged pictures are SIDE x SIDE."""
GAMMA = 1e-3
"""Width of the kernel for grey levels 0 ... 16."""
PENALTY = 10.0
"""Cost of a misread fitting picture."""


def shrink_by_area(pictures: np.ndarray) -> np.ndarray:
    """Mean grey level 0 ... 16 over equal squares, float64 [n, 64].

    Raises:
        ValueError: The side is no multiple of 8.
    """
    grey = pictures.mean(axis=1) if pictures.ndim == 4 else pictures.astype(np.float64)
    side = grey.shape[-1]
    if side % SIDE or grey.shape[-2] != side:
        raise ValueError(f"pictures are {grey.shape[-2]} x {side}, the judge needs squares of a multiple of {SIDE}")
    factor = side // SIDE
    squares = grey.reshape(-1, SIDE, factor, SIDE, factor).mean(axis=(2, 4))
    return squares.reshape(-1, SIDE * SIDE) * (16.0 / 255.0)


class DigitJudge:
    """Reads digits; deterministic and single-threaded."""

    def __init__(self, pictures: np.ndarray, labels: np.ndarray) -> None:
        """Fits on pictures [n, ...] and their digits [n]."""
        from sklearn.svm import SVC  # an extra of the package, wanted by judges alone

        self._machine = SVC(kernel="rbf", gamma=GAMMA, C=PENALTY)
        self._machine.fit(shrink_by_area(pictures), labels)

    def read(self, pictures: np.ndarray) -> np.ndarray:
        """Digits int64 [n] that the pictures show."""
        return np.asarray(self._machine.predict(shrink_by_area(pictures)), np.int64)


def coverage_score(drawn: np.ndarray, asked: np.ndarray, real: np.ndarray, labels: np.ndarray) -> float:
    """Classification accuracy score: how well a judge fitted on drawings alone reads real pictures."""
    if len(np.unique(asked)) < 2:
        raise ValueError("drawings of at least two digits are needed to fit a judge")
    return float((DigitJudge(drawn, asked).read(real) == labels).mean())
