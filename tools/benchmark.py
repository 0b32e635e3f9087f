"""What all benchmarks share: their options, a machine that does nothing else, records that say where they come from."""

import argparse
import datetime
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "docs" / "lab" / "benchmarks"
TINY_RUN = "A tiny run that only shows that everything works: **its figures say nothing.**"


def options(description: str | None) -> argparse.ArgumentParser:
    """A parser of what every benchmark is told; `description` is its module's docstring."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hardware", required=True, help="the machine in words")
    parser.add_argument("--slug", required=True, help="the machine in one word, for the file name")
    parser.add_argument("--tiny", action="store_true", help="seconds of work; figures without meaning")
    parser.add_argument("--out", type=Path, default=RECORDS, help="where the record goes")
    parser.add_argument("--max-load", type=float, default=0.5, help="refuse above this load average")
    parser.add_argument("--force", action="store_true", help="run whatever the load")
    return parser


def require_idle(arguments: argparse.Namespace) -> float:
    """The load average of the last minute, if the machine is idle enough to measure on.

    Raises:
        SystemExit: it is above `--max-load`, and `--force` was not given.
    """
    load = os.getloadavg()[0]
    if load > arguments.max_load and not arguments.force:
        raise SystemExit(f"load average {load:.2f} is above {arguments.max_load}; wait, or pass --force")
    return load


def origin(arguments: argparse.Namespace, module: str) -> dict[str, str]:
    """Where figures come from: hardware, commit, date, and the command of a module of `tools`."""
    return {
        "hardware": arguments.hardware,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": shlex.join(["python", "-m", f"tools.{module}", *sys.argv[1:]]),
    }


def commit() -> str:
    """The commit of the checkout, `-dirty` where files differ from it."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    return described.stdout.strip() or "unknown"


def write_record(
    arguments: argparse.Namespace, kind: str, date: str, text: str, results: dict[str, Any] | None = None
) -> Path:
    """Writes KIND_SLUG_DATE.md, and with results KIND_SLUG_DATE.json beside it; returns the former's path."""
    path: Path = arguments.out / f"{kind}_{arguments.slug}_{date}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    if results is not None:
        path.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    path.write_text(text, encoding="utf-8")
    return path
