"""What the demo must show: every figure of report.json, its rule and how to read it. One row a figure."""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

RULES: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "<": operator.lt,
    "is": operator.eq,
}


@dataclass(frozen=True, slots=True)
class Target:
    """One figure and what is asked of it."""

    key: str
    """Its name in report.json."""
    title: str
    """What it says, for a reader of the page."""
    rule: str
    """A key of RULES."""
    bound: float | bool | str
    """A number, or the key of another figure to compare with."""


TARGETS = (
    Target("und_accuracy", "Held-out digits named right", ">=", 0.97),
    Target("gen_accuracy", "Drawn digits read as asked (1,000 samples, temperature 1)", ">=", 0.95),
    Target("gen_cas", "Held-out digits read by a judge fitted on the drawings alone", ">=", 0.92),
    Target("gen_unique", "Share of distinct id sequences among the drawings", ">=", 0.95),
    Target("gen_copies", "Share of drawings that copy a training picture's ids", "<=", 0.05),
    Target("pair_accuracy", "Two held-out pictures read in order, unseen pairs included", ">=", 0.93),
    Target("difference_accuracy", "Difference of two held-out pictures in words", ">=", 0.85),
    Target("vq_accuracy", "Reconstructions of held-out digits read right", ">=", 0.98),
    Target("text_bpb", "Bits per byte of held-out prose, against the bigram", "<", "text_bpb_bigram"),
    Target("hf_max_logit_diff", "Export: largest relative logit difference", "<=", 1e-4),
    Target("hf_greedy_equal", "Export: greedy text and image ids equal", "is", True),
    Target("layout_max_loss_diff", "Layouts against one process: loss, relative", "<=", 5e-6),
    Target("layout_max_norm_diff", "Layouts against one process: gradient norm, relative", "<=", 1e-5),
    Target("padding_fraction", "Padding in packed rows, worst stage", "<=", 0.01),
    Target("seconds_total", "Seconds, layout check apart", "<=", 480.0),
    Target("peak_pss_gib", "Peak memory of the process tree (PSS), GiB", "<=", 6.0),
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """A figure held against its target."""

    target: Target
    value: float | bool | None
    """None where the run did not produce it."""
    bound: float | bool | None
    is_met: bool


def judge_figures(figures: Mapping[str, Any]) -> list[Verdict]:
    """Every target with what the run reached; a figure that is absent is missed."""
    verdicts = []
    for target in TARGETS:
        value = figures.get(target.key)
        bound = figures.get(target.bound) if isinstance(target.bound, str) else target.bound
        is_met = value is not None and bound is not None and RULES[target.rule](value, bound)
        verdicts.append(Verdict(target, value, bound, bool(is_met)))
    return verdicts
