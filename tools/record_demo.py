"""Turns a demo's report.json into a record under docs/lab/benchmarks.

    python -m tools.record_demo runs/demo --hardware "2 cores of an x86-64 server, 24 GiB" --slug cpu2

The record holds every figure beside its target, seconds by phase, versions and the commit; figures are copied, never
typed. File name: digits_<slug>_<date>.md.
"""

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

from tools import benchmark


def record(report: dict[str, Any], hardware: str, commit: str, date: str) -> str:
    """The record as Markdown."""
    lines = [
        f"# Digits demo, {hardware}, {date}",
        "",
        f"Commit {commit}, `make demo`; written by tools/record_demo.py.",
        "",
    ]
    if report["short"]:
        lines += ["A shortened run: its learning figures say nothing.", ""]
    lines += ["| figure | reached | target | met |", "|---|---|---|---|"]
    for row in report["targets"]:
        met = "yes" if row["met"] else "**no**"
        lines.append(f"| `{row['key']}` | {_number(row['reached'])} | {row['rule']} {_number(row['bound'])} | {met} |")
    lines += ["", "| layout | stage | loss | norm | seconds |", "|---|---|---|---|---|"]
    for row in report["layouts"]:
        differences = f"{row['max_loss_diff']:.1e} | {row['max_norm_diff']:.1e}"
        lines.append(f"| {row['layout']} | {row['stage']} | {differences} | {row['seconds']:.1f} |")
    lines += ["", "| phase | seconds |", "|---|---|"]
    lines += [f"| {name} | {seconds:.1f} |" for name, seconds in report["seconds"].items()]
    lines += ["", "Versions: " + ", ".join(f"{name} {version}" for name, version in report["versions"].items()) + "."]
    return "\n".join(lines) + "\n"


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    """Writes the record and prints its path."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--hardware", required=True, help="the machine in words")
    parser.add_argument("--slug", required=True, help="the machine in one word, for the file name")
    arguments = parser.parse_args()
    report = json.loads((arguments.run_dir / "report.json").read_text(encoding="utf-8"))
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    path = benchmark.RECORDS / f"digits_{arguments.slug}_{date}.md"
    path.write_text(record(report, arguments.hardware, benchmark.commit(), date), encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
