"""Command line of the comparison.

    python -m tools.bench_data --hardware "2 cores of an x86-64 server, 24 GiB" --slug cpu2

Makes data and environments of the peers below --scratch, measures, and writes data_<slug>_<date>.md and .json into
--out. The peers never enter the project's own environment.
"""

import argparse
import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

from tools.bench_data import record, suites
from tools.bench_data.environments import PEERS, ROOT
from tools.bench_data.raw import TINY, Sizes


def main() -> None:
    """Measures and writes the record."""
    arguments = _arguments()
    names = ["webdataset", *(name for name in arguments.peers if name != "webdataset")]
    load = os.getloadavg()[0]
    if load > arguments.max_load and not arguments.force:
        raise SystemExit(f"load average {load:.2f} is above {arguments.max_load}; wait, or pass --force")
    sizes = TINY if arguments.tiny else Sizes()
    scratch = arguments.scratch.resolve() / ("tiny" if arguments.tiny else "full")
    scratch.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    bench = suites.Bench(scratch=scratch, environments=arguments.scratch.resolve(), sizes=sizes, core=arguments.core)
    try:
        suites.run(bench, names)
    finally:
        bench.stop()
    results = bench.results | {
        "tiny": arguments.tiny,
        "sizes": asdict(sizes),
        "hardware": arguments.hardware,
        "machine": _machine(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": _commit(),
        "command": shlex.join(["python", "-m", "tools.bench_data", *sys.argv[1:]]),
        "seconds": time.monotonic() - start,
    }
    stem = f"data_{arguments.slug}_{results['date']}"
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"{stem}.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (arguments.out / f"{stem}.md").write_text(record.write(results), encoding="utf-8")
    print("\n".join([*record.summary(results), str(arguments.out / f"{stem}.md")]))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hardware", required=True, help="the machine in words")
    parser.add_argument("--slug", required=True, help="the machine in one word, for the file name")
    parser.add_argument(
        "--peers",
        type=_peers,
        default=list(PEERS),
        help=f"comma-separated, of {', '.join(PEERS)}; all by default; none leaves webdataset, which we depend on",
    )
    parser.add_argument("--tiny", action="store_true", help="seconds of work; figures without meaning")
    parser.add_argument("--scratch", type=Path, default=ROOT / "build" / "bench_data", help="data and environments")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "lab" / "benchmarks", help="where the record goes")
    parser.add_argument("--core", type=int, default=(os.cpu_count() or 1) - 1, help="core to measure on; -1 pins none")
    parser.add_argument("--max-load", type=float, default=0.5, help="refuse above this load average")
    parser.add_argument("--force", action="store_true", help="run whatever the load")
    return parser.parse_args()


def _peers(text: str) -> list[str]:
    names = [] if text == "none" else text.split(",")
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(PEERS)}")
    return names


def _machine() -> str:
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    for line in info.read_text(encoding="utf-8").splitlines() if info.exists() else ():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    return (
        f"{model}, {os.cpu_count()} cores, {platform.system()} {platform.release()}, python {platform.python_version()}"
    )


def _commit() -> str:
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    return described.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
