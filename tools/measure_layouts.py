"""Measures every layout of the tests against one process and writes the table down.

    python -m tools.measure_layouts --out docs/lab/benchmarks/layouts            all of them: .json and .md
    python -m tools.measure_layouts --out ... --only 'megatron.*'                some; the others keep their rows

fp32 on the CPU, five steps of eight rows: largest relative difference of loss and gradient norm over the steps, of any
gradient by name after the first (norm of the difference over norm), of any weight after the fifth.
"""

import argparse
import json
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from tests.distributed.layout_runs import BARS, NUM_STEPS, WEIGHT_STEPS, LayoutRun, compare, run_layout
from tests.support.layouts import LAYOUTS, STAGES
from tests.support.tiny import fp32


def main() -> None:
    """Measures, prints a line for each, and writes both files anew after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="path of the two files, without their endings")
    parser.add_argument("--only", default=".*", help="regular expression over stage/layout, for example stage1/tp2.*")
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = options.out.with_suffix(".json")
    rows = json.loads(path.read_text(encoding="utf-8"))["layouts"] if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    for stage in STAGES:
        names = [name for name in LAYOUTS if re.fullmatch(options.only, f"{stage}/{name}")]
        one = _run(stage, None) if names else None
        for name in names:
            start = time.perf_counter()
            assert one is not None
            figures = compare(_run(stage, name), one)
            row = {"ranks": LAYOUTS[name][0], **figures, "seconds": round(time.perf_counter() - start, 1)}
            rows[f"{stage}/{name}"] = row
            print(f"{stage}/{name:<44}" + "  ".join(f"{key} {figures[key]:.1e}" for key in BARS), flush=True)
            _write(path, rows)


def _run(stage: str, name: str | None) -> LayoutRun:
    world_size, parallel = LAYOUTS[name] if name else (1, fp32())
    with tempfile.TemporaryDirectory() as folder:
        return run_layout(Path(folder), world_size, parallel, STAGES[stage])


def _write(path: Path, rows: dict[str, dict[str, Any]]) -> None:
    known = [f"{stage}/{name}" for stage in STAGES for name in LAYOUTS]
    rows = {name: rows[name] for name in known if name in rows}
    worst = {key: max((row[key], name) for name, row in rows.items()) for key in BARS}
    record = {"bars": BARS, "worst": worst, "steps": NUM_STEPS, "weights_after": WEIGHT_STEPS, "layouts": rows}
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    lines = ["| stage / layout | ranks | loss | norm | gradients | weights |", "|---|---|---|---|---|---|"]
    lines += [_line(name, str(row["ranks"]), row) for name, row in rows.items()]
    lines.append(_line("**worst**", "", {key: value for key, (value, _) in worst.items()}))
    lines.append(_line("bar", "", BARS))
    path.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _line(name: str, ranks: str, figures: dict[str, Any]) -> str:
    return f"| {name} | {ranks} | " + " | ".join(f"{figures[key]:.1e}" for key in BARS) + " |"


if __name__ == "__main__":
    main()
