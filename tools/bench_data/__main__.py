"""Command line of the comparison.

    python -m tools.bench_data --hardware "2 cores of an x86-64 server, 24 GiB" --slug cpu2

Makes data and environments of the peers below --scratch, measures, and writes data_<slug>_<date>.md and .json into
--out. The peers never enter the project's own environment.
"""

import argparse
import os
import platform
import time
from dataclasses import asdict
from pathlib import Path

from tools import benchmark
from tools.bench_data import record, suites
from tools.bench_data.environments import PEERS, ROOT
from tools.bench_data.raw import TINY, Sizes


def main() -> None:
    """Measures and writes the record."""
    arguments = _arguments()
    names = ["webdataset", *(name for name in arguments.peers if name != "webdataset")]
    benchmark.require_idle(arguments)
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
        **benchmark.origin(arguments, "bench_data"),
        "machine": _machine(),
        "seconds": time.monotonic() - start,
    }
    path = benchmark.write_record(arguments, "data", results["date"], record.write(results), results)
    print("\n".join([*record.summary(results), str(path)]))


def _arguments() -> argparse.Namespace:
    parser = benchmark.options(__doc__)
    parser.add_argument(
        "--peers",
        type=_peers,
        default=list(PEERS),
        help=f"comma-separated, of {', '.join(PEERS)}; all by default; none leaves webdataset, which we depend on",
    )
    parser.add_argument("--scratch", type=Path, default=ROOT / "build" / "bench_data", help="data and environments")
    parser.add_argument("--core", type=int, default=(os.cpu_count() or 1) - 1, help="core to measure on; -1 pins none")
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


if __name__ == "__main__":
    main()
