"""One exit code for several ranks: the one that explains most; errors and the codes they end a process with."""

import pytest

from data_pipeline.errors import UserError
from janus_mega.checkpoint.claim import Superseded
from janus_mega.train.exits import NotSaved, ReplicasDiffer, Stopped, exit_code_of, most_telling


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([0, 0], 0),
        ([75, 75], 75),
        ([75, 0], 75),
        ([1, 75], 1),
        ([1, -9], 137),
        ([137, 1], 137),
        ([1, 2], 2),
        ([2, -15], 2),
        ([86, -9], 86),
        ([77, 1], 77),
        ([77, 75], 77),
        ([1, 76], 76),
        ([1, 1, 78, 86], 78),
        ([3, 0], 3),
        ([], 0),
    ],
)
def test_the_code_that_explains_most_is_told(codes, expected):
    assert most_telling(codes) == most_telling(reversed(codes)) == expected


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (UserError("x"), 2),
        (Stopped("x"), 75),
        (Superseded("x"), 76),
        (NotSaved("x"), 77),
        (ReplicasDiffer("x"), 78),
        (RuntimeError("x"), None),
        (ValueError("x"), None),
        (KeyboardInterrupt(), None),
    ],
)
def test_errors_have_codes_or_are_defects(error, expected):
    assert exit_code_of(error) == expected
