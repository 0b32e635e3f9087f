"""What a comparison of copies costs: milliseconds per check and per million parameters that a rank holds.

    OMP_NUM_THREADS=1 python -m tools.bench_replicas --hardware "2 cores of an x86-64 server, 24 GiB" --slug cpu2

The real `Replicas` over two gloo ranks and parameters of which each rank owns the fp32 weights of one half, as under
ZeRO-1; large ones for the cost per element, many small ones for the cost per parameter. Writes
replicas_<slug>_<date>.md.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from janus_mega.engine.replicas import Replicas
from janus_mega.models.sharding import ShardedParameter
from janus_mega.parallel.forked import run_ranks
from janus_mega.parallel.groups import ProcessGroups, build_groups
from tools import benchmark

RANKS = 2
LARGE, SMALL = (16, 1 << 20), (512, 64)
"""(parameters, elements of each)."""
TINY = {(16, 1 << 20): (2, 1 << 12), (512, 64): (8, 64)}


class HalfOwner:
    """What `Replicas` asks of an engine: the half of each parameter whose fp32 weights this rank owns."""

    def __init__(self, groups: ProcessGroups, num: int, size: int, dtype: torch.dtype) -> None:
        self.groups = groups
        self.before_update = None
        self.chunks: list[nn.Module] = []
        generator = torch.Generator().manual_seed(0)
        self.start = groups.layout.dp_rank * size // RANKS
        masters = [torch.randn(size, generator=generator).to(groups.device) for _ in range(num)]
        self.shards, self._owned = [], {}
        for number, master in enumerate(masters):
            parameter = nn.Parameter(master.to(dtype, copy=True))
            self.shards.append(ShardedParameter(f"layer{number}.weight", parameter, (size,), (size,), (), is_cut=False))
            self._owned[parameter] = master[self.start : self.start + size // RANKS].clone()

    def fragment(self, parameter: nn.Parameter, moment: str | None = None) -> tuple[Tensor, int]:
        """See `StatefulEngine`."""
        return self._owned[parameter], self.start

    def create_moments(self, step: int) -> None:
        """Nothing."""

    def publish_weights(self) -> None:
        """Nothing."""


def _rank(folder: Path, tiny: bool, repeats: int) -> None:
    groups = build_groups(1, 1)
    told = {}
    for dtype in (torch.float32, torch.bfloat16):
        for name, shape in (("large", LARGE), ("small", SMALL)):
            num, size = TINY[shape] if tiny else shape
            owner = HalfOwner(groups, num, size, dtype)
            replicas = Replicas(owner, owner.shards)
            assert not replicas.differ()
            seconds = []
            for _ in range(repeats):
                dist.barrier()
                start = time.perf_counter()
                assert not replicas.differ()
                seconds.append(time.perf_counter() - start)
            kind = f"{name} {str(dtype).removeprefix('torch.')}"
            told[kind] = {"ms": 1e3 * statistics.median(seconds), "parameters": num, "elements": num * size}
    (folder / f"{groups.layout.rank}.json").write_text(json.dumps(told))


def main() -> None:
    """Measures and writes the record."""
    parser = benchmark.options(__doc__)
    parser.add_argument("--repeats", type=int, default=15, help="timed checks of each kind")
    arguments = parser.parse_args()
    load = benchmark.require_idle(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="bench_replicas_") as folder:
        run_ranks(_rank, RANKS, Path(folder), arguments.tiny, arguments.repeats)
        ranks = [json.loads((Path(folder) / f"{rank}.json").read_bytes()) for rank in range(RANKS)]
    slowest = {name: max((told[name] for told in ranks), key=lambda entry: entry["ms"]) for name in ranks[0]}
    origin = benchmark.origin(arguments, "bench_replicas")
    record = _record(slowest, origin, load, tiny=arguments.tiny)
    path = benchmark.write_record(arguments, "replicas", origin["date"], record)
    print(record)
    print(path)


def _record(slowest: dict[str, Any], origin: dict[str, str], load: float, *, tiny: bool) -> str:
    lines = [
        f"# Comparing copies, {origin['hardware']}, {origin['date']}",
        f"\nCommit {origin['commit']}: `{origin['command']}`, load average {load:.2f} before.\n",
        *([f"{benchmark.TINY_RUN}\n"] if tiny else []),
        "One check on two ranks of one machine with one thread each, median of the slower rank. Both halves of the\n"
        "work are in it: the digest of all that a rank holds, and that of the fp32 weights it owns (one half here).\n",
        "| parameters | elements | ms per check | ms per million elements | us per parameter |",
        "|---|---|---|---|---|",
    ]
    for name, entry in slowest.items():
        per_million, each = entry["ms"] * 1e6 / entry["elements"], entry["ms"] * 1e3 / entry["parameters"]
        is_large = name.startswith("large")
        row = f"{per_million:.2f} | -" if is_large else f"- | {each:.0f}"
        lines.append(f"| {entry['parameters']} {name} | {entry['elements']:,} | {entry['ms']:.1f} | {row} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
