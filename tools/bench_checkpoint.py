"""What checkpoints cost a training run: the time that a save holds it, the time that writing slows it, bytes, digests.

    OMP_NUM_THREADS=1 python -m tools.bench_checkpoint --hardware "2 cores of an x86-64 server, 24 GiB" --slug cpu2

The real `Saver` with its thread, group and disk, over tensors in place of an engine; between saves a step multiplies
matrices and changes every weight in place. Everything is measured in the same processes in turns. Writes
checkpoints_<slug>_<date>.md and .json.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist

from janus_mega.checkpoint import tensor_file
from janus_mega.checkpoint.claim import Claim, claim
from janus_mega.checkpoint.disk import Disk
from janus_mega.checkpoint.manager import list_checkpoints
from janus_mega.checkpoint.reader import open_checkpoint
from janus_mega.checkpoint.state import TrainState
from janus_mega.config.schema import CheckpointConfig, LoggingConfig, OptimizerConfig, ParallelConfig
from janus_mega.parallel.forked import run_ranks
from janus_mega.parallel.groups import ProcessGroups, build_groups
from janus_mega.parallel.slices import Slice
from janus_mega.train.saving import CHECKPOINTS_DIR, Saver
from janus_mega.train.together import on_rank_0
from janus_mega.train.workload import Recipe
from tools import benchmark

MIB = 2**20
FULL = {"mib": 512, "repeats": 5, "rows": 8192, "products": 12}
"""MiB of state on all ranks together, timed repeats, rows of a tensor, products of matrices in a step."""
TINY = {"mib": 12, "repeats": 2, "rows": 512, "products": 1}
WIDTH = 256
SIDE = 768
STEPS_ALONE = 6
PACE = 0.5 * 2**30
"""Bytes a second that a rank's part of a shared disk takes, where a disk is paced: as a parallel file system gives out
to each of many ranks."""
MEMORY_DISK = Path("/dev/shm")
PACED = ("paced", "paced_undigested")

_METHOD = """\
{mib} MiB of state (fp32 weights and two moments) over all ranks, {repeats} repeats in turns after one of each kind that
is not counted; medians over repeats of the slowest rank. *Synchronous*: `checkpoint.asynchronous=false`, from the
call to the return, digests, fsync, publishing and removal of the checkpoint before included. *Held*: how long the call
of an asynchronous save keeps the loop. *Slowed*: what the steps that run until the checkpoint is published take longer
than steps without a save beside them, summed. *Hashing*: a synchronous save against one whose digests cost nothing, on
this disk, and in memory at the pace of 0.5 GiB/s a rank, where the disk's own haste and moods play no part.
Ranks are processes of one machine with one thread each beside the writer's; what they share (cores, memory, disk) is in
the figures. Reading comes from the page cache; every byte is compared with its digest."""


def main() -> None:
    """Measures and writes the record."""
    arguments = _arguments()
    load = benchmark.require_idle(arguments)
    torch.set_num_threads(1)
    start, size = time.monotonic(), TINY if arguments.tiny else FULL
    results: dict[str, Any] = {"tiny": arguments.tiny, "load": load, "size": size, "ranks": {}}
    for world_size in (1, 2):
        with (
            tempfile.TemporaryDirectory(prefix="bench_checkpoint_", dir=arguments.scratch) as folder,
            tempfile.TemporaryDirectory(prefix="bench_checkpoint_", dir=MEMORY_DISK) as in_memory,
        ):
            run_ranks(_rank, world_size, Path(folder), Path(in_memory), size)
            told = [json.loads((Path(folder) / f"{rank}.json").read_bytes()) for rank in range(world_size)]
        results["ranks"][str(world_size)] = told
    results |= benchmark.origin(arguments, "bench_checkpoint")
    results |= {"torch": version("torch"), "seconds": time.monotonic() - start}
    results["figures"] = {ranks: _figures(told) for ranks, told in results["ranks"].items()}
    path = benchmark.write_record(arguments, "checkpoints", results["date"], _record(results), results)
    print(_record(results))
    print(path)


def _arguments() -> argparse.Namespace:
    parser = benchmark.options(__doc__)
    parser.add_argument("--scratch", type=Path, help="folder on the disk to measure; default: the temporary folder")
    return parser.parse_args()


class BenchState:
    """What a Saver asks of a run: weights and two moments, of which each rank owns its rows; and a step to train."""

    def __init__(self, groups: ProcessGroups, size: dict[str, int]) -> None:
        self.groups = groups
        self.engine = self  # of an engine, a Saver wants the groups
        layout, rows = groups.layout, size["rows"]
        own_rows = rows // layout.world_size
        self.owned: list[Slice] = []
        for number in range(size["mib"] * MIB // (4 * rows * WIDTH)):
            name = f"{('', 'optimizer.exp_avg/', 'optimizer.exp_avg_sq/')[number % 3]}layer{number // 3}.weight"
            own = torch.randn(own_rows, WIDTH)
            self.owned.append(Slice(name, (rows, WIDTH), (layout.rank * own_rows, 0), own))
        self.num_bytes = sum(piece.tensor.nbytes for piece in self.owned)
        self._factor = torch.randn(SIDE, SIDE) / SIDE**0.5
        self._products = size["products"]

    def slices(self) -> list[Slice]:
        """All of it."""
        return list(self.owned)

    def outlines(self) -> list[Slice]:
        """The same: nothing has to be copied to know its sizes."""
        return list(self.owned)

    def at(self, step: int) -> TrainState:
        """Next to nothing."""
        return TrainState(step=step, consumed_rows=step, plan_digest="bench", config_text="name: bench\n")

    def train(self, is_done: bool) -> tuple[float, bool]:
        """One step on one core: products of matrices, then every weight changes in place.

        Returns:
            Seconds, and whether all ranks say that they are done. Collective over: world.
        """
        start = time.perf_counter()
        x = self._factor
        for _ in range(self._products):
            x = torch.tanh(x @ self._factor)
        for piece in self.owned[::3]:
            piece.tensor.add_(float(x[0, 0]) * 1e-6)
        told = torch.tensor([float(is_done)])
        dist.all_reduce(told, op=dist.ReduceOp.MIN)
        return time.perf_counter() - start, bool(told)


class CountingDisk(Disk):
    """Counts bytes."""

    def __init__(self) -> None:
        self.num_bytes = 0

    def write(self, file: BinaryIO, content: bytes | memoryview) -> None:
        """Counts and writes."""
        self.num_bytes += len(content)
        super().write(file, content)


class PacedDisk(CountingDisk):
    """Takes its time with every write."""

    def write(self, file: BinaryIO, content: bytes | memoryview) -> None:
        """Writes, and returns when a disk of that pace would."""
        due = time.perf_counter() + len(content) / PACE
        super().write(file, content)
        time.sleep(max(0.0, due - time.perf_counter()))


class NoDigest:
    """Costs nothing."""

    def update(self, data: Any) -> None:
        """Nothing."""

    def digest(self) -> bytes:
        """The same for everything."""
        return bytes(32)


@contextmanager
def without_digests() -> Iterator[None]:
    """Tensors are saved with digests that cost nothing and mean nothing."""
    kept, tensor_file.new_digest = tensor_file.new_digest, NoDigest
    try:
        yield
    finally:
        tensor_file.new_digest = kept


def _rank(folder: Path, in_memory: Path, size: dict[str, int]) -> None:
    """Everything on one rank; writes what it has measured."""
    groups = build_groups(1, 1)
    state = BenchState(groups, size)
    place = _claimed(folder, groups)
    bench = Bench(state, _saver(folder, state, place, asynchronous=False), _saver(folder, state, place))
    for _ in range(size["repeats"] + 1):
        bench.measure()
    dist.barrier()
    told = {"bytes": state.num_bytes, "first_held": bench.first_held, **bench.told, "load": _load(place.root, state)}
    told |= bench.paced(_saver(in_memory, state, _claimed(in_memory, groups), asynchronous=False), size)
    told["written"] = bench.written()
    (folder / f"{groups.layout.rank}.json").write_text(json.dumps(told))
    dist.barrier()


def _claimed(folder: Path, groups: ProcessGroups) -> Claim:
    root = folder / CHECKPOINTS_DIR
    return Claim.from_key(root, int(on_rank_0(groups, lambda: str(claim(root).key))))


def _saver(folder: Path, state: Any, place: Claim, *, asynchronous: bool = True) -> Saver:
    recipe = Recipe(
        name="bench",
        run_dir=folder,
        num_steps=1,
        last_step=1,
        global_batch_size=1,
        init_from="",
        parallel=ParallelConfig(),
        optimizer=OptimizerConfig(lr=1.0),
        logging=LoggingConfig(),
        checkpoint=CheckpointConfig(save_every=1, keep_last=1, asynchronous=asynchronous),
    )
    workload: Any = argparse.Namespace(extra_files=dict)
    return Saver(workload, recipe, state, place)


class Bench:
    """Saves of each kind in turns."""

    def __init__(self, state: BenchState, synchronous: Saver, asynchronous: Saver) -> None:
        self.told: dict[str, list[float]] = {
            name: [] for name in ("alone", "synchronous", "undigested", "held", "slowed", "beside", "write")
        }
        self.first_held = 0.0
        self._state = state
        self._synchronous = synchronous
        self._asynchronous = asynchronous
        self._step = 0
        self._num_saves = 0
        for saver in (synchronous, asynchronous):
            saver.disk = CountingDisk()
        asynchronous.look()  # as at the first step border: the buffer is made beside training
        for _ in range(STEPS_ALONE):
            state.train(False)

    def measure(self) -> None:
        """One save of each kind; the first time is kept apart."""
        alone = statistics.median(self._state.train(False)[0] for _ in range(STEPS_ALONE))
        synchronous = self._seconds_of(self._synchronous)
        with without_digests():
            undigested = self._seconds_of(self._synchronous)
        held = self._seconds_of(self._asynchronous)
        slowed, beside, is_done, news = 0.0, 0, False, {}
        while not is_done:
            seconds, is_done = self._state.train(bool(news))
            slowed, beside = slowed + seconds - alone, beside + 1
            self._asynchronous.look()
            news |= self._asynchronous.news()
        if not self.first_held:
            self.first_held = held
            return
        write = news["checkpoint/write_seconds"]
        values = (alone, synchronous, undigested, held, slowed, beside, write)
        for name, value in zip(self.told, values, strict=True):
            self.told[name].append(value)

    def paced(self, saver: Saver, size: dict[str, int]) -> dict[str, list[float]]:
        """Seconds of synchronous saves on a paced disk, with digests and without, after one that is not counted."""
        saver.disk = PacedDisk()
        told: dict[str, list[float]] = {name: [] for name in PACED}
        for _ in range(size["repeats"] + 1):
            told[PACED[0]].append(self._seconds_of(saver, counted=False))
            with without_digests():
                told[PACED[1]].append(self._seconds_of(saver, counted=False))
        return {name: seconds[1:] for name, seconds in told.items()}

    def written(self) -> float:
        """Bytes that this rank wrote in one save."""
        disks: list[Any] = [self._synchronous.disk, self._asynchronous.disk]
        return sum(disk.num_bytes for disk in disks) / self._num_saves

    def _seconds_of(self, saver: Saver, *, counted: bool = True) -> float:
        self._step += 1
        self._num_saves += counted
        dist.barrier()
        start = time.perf_counter()
        saver.save(self._step)
        return time.perf_counter() - start


def _load(root: Path, state: BenchState) -> list[float]:
    """Seconds to fill this rank's share from the newest checkpoint, twice."""
    seconds = []
    for _ in range(2):
        dist.barrier()
        start = time.perf_counter()
        open_checkpoint(list_checkpoints(root)[-1].path).fill(state.slices())
        seconds.append(time.perf_counter() - start)
    return seconds


def _figures(ranks: list[dict[str, Any]]) -> dict[str, float]:
    """Medians over repeats of the slowest rank; shares are medians of paired repeats."""
    slowest = {
        name: [max(values) for values in zip(*(told[name] for told in ranks), strict=True)]
        for name in ("alone", "synchronous", "undigested", "held", "slowed", "beside", "write", "load", *PACED)
    }

    def share(part: str, whole: str) -> float:
        return statistics.median(a / b for a, b in zip(slowest[part], slowest[whole], strict=True))

    num_bytes = sum(told["bytes"] for told in ranks)
    return {
        **{name: statistics.median(values) for name, values in slowest.items()},
        "first_held": max(told["first_held"] for told in ranks),
        "held_share": share("held", "synchronous"),
        "slowed_share": share("slowed", "synchronous"),
        "hashing_share": share("synchronous", "undigested") - 1,
        "paced_hashing_share": share(*PACED) - 1,
        "bytes_share": max(told["written"] / told["bytes"] for told in ranks),
        "save_mib_per_s": num_bytes / MIB / statistics.median(slowest["synchronous"]),
        "load_mib_per_s": num_bytes / MIB / min(slowest["load"]),
    }


_ROWS = (
    ("synchronous save, s", "{synchronous:.3f}", ""),
    ("an asynchronous one holds the loop, s (the first)", "{held:.4f} ({first_held:.4f})", ""),
    ("... of the synchronous save", "{held_share:.1%}", "<= 5 %"),
    ("writing beside training, s", "{write:.3f}", ""),
    ("steps beside it are slowed by, s in sum", "{slowed:.3f}", ""),
    ("... of the synchronous save", "{slowed_share:.0%}", ""),
    ("a step alone, s; steps beside a write", "{alone:.3f}; {beside:.0f}", ""),
    ("hashing adds to a save", "{hashing_share:.1%}", "<= 3 %"),
    ("... on a disk of 0.5 GiB/s a rank", "{paced_hashing_share:.1%}", "<= 3 %"),
    ("bytes written per rank over those it owns", "{bytes_share:.4f}", "<= 1.01"),
    ("saved, MiB/s", "{save_mib_per_s:.0f}", ""),
    ("loaded and compared, MiB/s", "{load_mib_per_s:.0f}", ""),
)


def _record(results: dict[str, Any]) -> str:
    """The record as Markdown."""
    figures = results["figures"]
    parts = [
        f"# Checkpoints, {results['hardware']}, {results['date']}",
        f"Commit {results['commit']}, written by tools/bench_checkpoint.py: `{results['command']}`, "
        f"{results['seconds']:.0f} s.",
    ]
    if results["tiny"]:
        parts.append(benchmark.TINY_RUN)
    parts.append(_METHOD.format(**results["size"]))
    lines = ["| figure | " + " | ".join(f"{ranks} rank(s)" for ranks in figures) + " | target |"]
    lines.append("|---" * (len(figures) + 2) + "|")
    for what, how, target in _ROWS:
        lines.append(f"| {what} | " + " | ".join(how.format(**told) for told in figures.values()) + f" | {target} |")
    parts.append("\n".join(lines))
    parts.append(f"torch {results['torch']}; load average before: {results['load']:.2f}.")
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
