"""Rules: parsed without evaluating anything, applied to columns with and without values."""

import numpy as np
import pytest

from data_pipeline.errors import UserError
from data_pipeline.masks.attributes import Column
from data_pipeline.masks.rules import broken_by, parse_rule

SCORES = Column(np.array([4.9, 5.0, 5.1, np.nan], np.float32))
LANGUAGES = Column(np.array([1, 2, 0, 3], np.uint16), ("", "de", "en", "fr"))


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        ("aesthetic>=5", [0]),
        (" aesthetic >= 5.1 ", [0, 1]),
        ("aesthetic>5", [0, 1]),
        ("aesthetic<5", [1, 2]),
        ("aesthetic<=5.0", [2]),
        ("aesthetic==5", [0, 2]),
        ("aesthetic != 5e0", [1]),
        ("aesthetic>-1", []),
        ("clip.sim-2<=0", [0, 1, 2]),
    ],
)
def test_numbers(text, broken):
    assert np.flatnonzero(broken_by(parse_rule(text), SCORES)).tolist() == broken


@pytest.mark.parametrize(
    ("text", "broken"), [("language==en", [0, 3]), ("language!=en", [1]), ("language==xx", [0, 1, 3])]
)
def test_words(text, broken):
    assert np.flatnonzero(broken_by(parse_rule(text), LANGUAGES)).tolist() == broken


@pytest.mark.parametrize("sign", [">=", "<=", ">", "<", "==", "!="])
def test_what_is_dropped_is_what_would_be_kept(sign):
    kept = broken_by(parse_rule(f"a{sign}5"), SCORES)
    dropped = broken_by(parse_rule(f"a{sign}5", negated=True), SCORES)
    assert (kept ^ dropped).tolist() == [True, True, True, False]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "aesthetic",
        "aesthetic>",
        ">5",
        "5>aesthetic",
        "a>5>4",
        "a>=<5",
        "a=5",
        "__import__('os').system('x')>1",
        "a b>1",
    ],
)
def test_anything_else_is_no_rule(text):
    with pytest.raises(UserError, match="is no rule: write an attribute") as error:
        parse_rule(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", ["en", "nan", "inf", "1e999", "5 and 6", "0x5"])
def test_numbers_are_compared_with_numbers(value):
    with pytest.raises(UserError, match="aesthetic is a number"):
        broken_by(parse_rule(f"aesthetic>{value}"), SCORES)


def test_words_have_no_size():
    with pytest.raises(UserError, match=r"language is a word \(de, en, fr\)"):
        broken_by(parse_rule("language>en"), LANGUAGES)
