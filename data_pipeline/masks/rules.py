"""Rules such as `aesthetic>=5` or `language==en`: one attribute, one comparison, one value; never evaluated as code."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.masks.attributes import Column

_RULE = re.compile(r"\s*(?P<name>[A-Za-z_][A-Za-z0-9_.-]*)\s*(?P<sign>>=|<=|==|!=|>|<)\s*(?P<value>[^<>=!]+?)\s*")
_SIGNS: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    ">=": np.greater_equal,
    "<=": np.less_equal,
    ">": np.greater,
    "<": np.less,
    "==": np.equal,
    "!=": np.not_equal,
}
_OPPOSITE = {">=": "<", "<=": ">", ">": "<=", "<": ">=", "==": "!=", "!=": "=="}


@dataclass(frozen=True, slots=True)
class Rule:
    """What holds for the samples that stay."""

    name: str
    """Attribute."""
    sign: str
    """One of >=, <=, ==, !=, >, <."""
    values: tuple[str, ...]
    """What it is compared with; several (only with ==) mean any of them."""
    keeps_unknown: bool = False
    """Whether samples without the attribute stay."""

    def __str__(self) -> str:
        return f"{self.name} {self.sign} {' or '.join(self.values)}"

    @property
    def opposite(self) -> str:
        """What holds for the samples that are left out: the reason they are counted under."""
        return f"{self.name} {_OPPOSITE[self.sign]} {' or '.join(self.values)}"


def parse_rule(text: str, *, keeps_unknown: bool = False, negated: bool = False) -> Rule:
    """Reads `name sign value`.

    Args:
        text: The rule as it was typed.
        keeps_unknown: Whether samples without the attribute stay.
        negated: The text says what is left out rather than what stays.

    Raises:
        UserError: Not of that form.
    """
    match = _RULE.fullmatch(text)
    if match is None:
        raise UserError(
            f"{text!r} is no rule: write an attribute, one of {' '.join(_SIGNS)}, and a value, such as 'aesthetic>=5'"
        )
    sign = _OPPOSITE[match["sign"]] if negated else match["sign"]
    return Rule(match["name"], sign, (match["value"],), keeps_unknown)


def broken_by(rule: Rule, column: Column) -> np.ndarray:
    """bool [N]: samples whose attribute is known and breaks the rule.

    Raises:
        UserError: A number is compared with a word, or words by size.
    """
    if column.labels is not None:
        if rule.sign not in ("==", "!="):
            raise UserError(
                f"rule '{rule}': {rule.name} is a word ({', '.join(column.labels[1:6])}), words are compared with == "
                "or !=; correct the rule"
            )
        codes = [code for code, label in enumerate(column.labels) if code and label in rule.values]
        is_one = np.isin(column.values, codes)
        return column.known & (is_one if rule.sign == "!=" else ~is_one)
    numbers = [_number(rule, value) for value in rule.values]
    # A Python float takes the precision of the column, so 5.1 equals the 5.1 that was stored in 32 bits.
    holds = np.any([_SIGNS[rule.sign](column.values, number) for number in numbers], axis=0)
    return column.known & ~holds


def _number(rule: Rule, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"rule '{rule}': {rule.name} is a number, {value!r} is none; correct the rule")
    return number
