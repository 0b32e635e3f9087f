"""Compares two run directories: metrics and batch hashes step by step, and the first step that differs.

    python -m tools.compare_runs A B                             a table of what differs and where it begins
    python -m tools.compare_runs A B --assert-equal              exit code 1 unless equal, bit for bit
    python -m tools.compare_runs A B --assert-equal --rtol 1e-5  ... or within a relative tolerance

Compared are the steps that both have logged and the metrics that both know, without those that time or measure the
machine. A run that was resumed may have logged a step twice; the later line counts. Steps that only one run has are
told, and are a difference when equality is asserted. Exit code 2: a directory holds no run, or a damaged one.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError
from janus_mega.observe.json_lines import read_lines

METRICS_FILE, BATCHES_FILE = "metrics.jsonl", "batches.jsonl"
BATCH_HASH = "batch_hash"
MACHINE_WORDS = (
    "time", "seconds", "_s", "per_second", "tokens_per_s", "tflop", "mfu", "memory", "gib", "bytes", "checkpoint/",
)  # fmt: skip
"""A metric whose name holds one of these words, or ends in one with an underscore, depends on the machine."""

Steps = dict[int, dict[str, Any]]


@dataclass(frozen=True)
class Difference:
    """One quantity over all common steps."""

    name: str
    first_step: int
    """First step in which it differs by more than the tolerance."""
    values: tuple[Any, Any]
    """There, in either run."""
    num_steps: int
    """Steps in which it differs."""
    largest: float
    """Largest relative difference; infinite for hashes and for what is not a number."""


def read_steps(run_dir: Path) -> Steps:
    """Step -> quantity -> value, from both files of a run directory.

    Raises:
        UserError: it holds neither, or a damaged line.
    """
    steps: Steps = {}
    for file in (METRICS_FILE, BATCHES_FILE):
        path = run_dir / file
        if not path.exists():
            continue
        for row in read_lines(path):
            values = {name: value for name, value in row.items() if name != "step" and not is_of_machine(name)}
            steps.setdefault(int(row["step"]), {}).update(values)
    if not steps:
        raise UserError(f"{run_dir}: holds neither {METRICS_FILE} nor {BATCHES_FILE}; name a run directory")
    return steps


def is_of_machine(name: str) -> bool:
    """Whether a metric tells of time or memory."""
    lower = name.lower()
    return any(lower.endswith(word) if word.startswith("_") else word in lower for word in MACHINE_WORDS)


def differences(a: Steps, b: Steps, rtol: float) -> list[Difference]:
    """What differs in the common steps, earliest first."""
    common = sorted(a.keys() & b.keys())
    names = {name for step in common for name in a[step].keys() | b[step].keys()}
    found = [difference for name in names if (difference := _difference(name, common, (a, b), rtol)) is not None]
    return sorted(found, key=lambda difference: (difference.first_step, difference.name))


def _difference(name: str, common: Sequence[int], runs: tuple[Steps, Steps], rtol: float) -> Difference | None:
    off = {}
    for step in common:
        pair = (runs[0][step].get(name), runs[1][step].get(name))
        if (distance := relative(*pair)) > rtol:
            off[step] = (distance, pair)
    if not off:
        return None
    first = min(off)
    return Difference(name, first, off[first][1], len(off), max(distance for distance, _ in off.values()))


def relative(a: Any, b: Any) -> float:
    """Relative difference of two values: 0 for equal ones, infinite where one is missing, no number, or not finite."""
    if a == b:
        return 0.0
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in (a, b)):
        return math.inf
    return abs(a - b) / max(abs(a), abs(b))


def report(paths: tuple[Path, Path], runs: tuple[Steps, Steps], found: Sequence[Difference]) -> list[str]:
    """Lines for a terminal."""
    common = runs[0].keys() & runs[1].keys()
    lines = [f"A {paths[0]}: {len(runs[0])} steps", f"B {paths[1]}: {len(runs[1])} steps, {len(common)} in common"]
    lines += [f"only {'AB'[i]} has steps {_shortened(only)}" for i, only in enumerate(_alone(runs)) if only]
    if not found:
        return [*lines, "equal in all common steps"]
    lines.append(f"first step that differs: {found[0].first_step}")
    lines.append(f"{'quantity':<32} {'from step':>9} {'steps':>6} {'largest':>9}  A there -> B there")
    lines += [
        f"{d.name:<32} {d.first_step:>9} {d.num_steps:>6} {d.largest:>9.1e}  {_cut(d.values[0])} -> {_cut(d.values[1])}"
        for d in found
    ]
    return lines


def _alone(runs: tuple[Steps, Steps]) -> tuple[list[int], list[int]]:
    return sorted(runs[0].keys() - runs[1].keys()), sorted(runs[1].keys() - runs[0].keys())


def _shortened(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps[:5])) + (f" ... {steps[-1]}" if len(steps) > 5 else "")


def _cut(value: Any) -> str:
    return value[:12] if isinstance(value, str) else str(value)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the comparison; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", type=Path, metavar="A")
    parser.add_argument("b", type=Path, metavar="B")
    parser.add_argument("--assert-equal", action="store_true", help="exit code 1 unless the runs are equal")
    parser.add_argument("--rtol", type=float, default=0.0, help="relative difference of numbers that passes")
    options = parser.parse_args(arguments)
    try:
        runs = (read_steps(options.a), read_steps(options.b))
    except UserError as error:
        print(f"compare_runs: {error}", file=sys.stderr)
        return 2
    found = differences(*runs, options.rtol)
    print("\n".join(report((options.a, options.b), runs, found)))
    equal = not found and not any(_alone(runs))
    return 1 if options.assert_equal and not equal else 0


if __name__ == "__main__":
    sys.exit(main())
