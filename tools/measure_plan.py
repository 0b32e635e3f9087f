"""Measures the plans of the papers' six stages: padding, CPU time a document, balance of images; and memory.

    python -m tools.measure_plan                       a table of all stages, at 4096 and at the advised lengths
    python -m tools.measure_plan --bound               ... with the least padding that any packing could leave
    python -m tools.measure_plan --documents 10000000  peak memory of a plan over so many samples instead

Time is CPU of the one thread that plans, from the first window on: take, pack, top up, deal, arrange, and the orders of
the epochs begun. Steps are 256 rows, 8 on each of 32 ranks. The bound is the linear relaxation of cutting stock, solved
by column generation (needs scipy) on the lengths of 512 rows of the last window; no packing of whole documents can do
better.
"""

import argparse
import resource
import time

import numpy as np

from data_pipeline.plan.deal import deal_to_ranks
from data_pipeline.plan.window import Window
from data_pipeline.spec import RatioUnit, Task
from tests.support.histograms import STAGES, plan_of, source, stage_sources

ROWS = 4096
WINDOWS = 4
RANKS, MICRO_BATCH = 32, 8


def measure(stage: str, seq_len: int, unit: RatioUnit) -> tuple[str, Window]:
    """A line of the table, and the last window."""
    sources = stage_sources(stage, scale=WINDOWS + 1)
    plan = plan_of(
        sources,
        seq_len=seq_len,
        global_batch_size=RANKS * MICRO_BATCH,
        window_rows=ROWS,
        ratio_unit=unit,
    )
    start = time.process_time()
    windows = [plan.window(number) for number in range(WINDOWS)]
    seconds = time.process_time() - start
    documents = sum(len(window.length) for window in windows)
    padding = [1 - window.length.sum() / (ROWS * seq_len) for window in windows]
    fullest = mean = 0.0
    for window in windows:
        for images in window.num_images.reshape(-1, RANKS * MICRO_BATCH):
            held = images[deal_to_ranks(images, RANKS, MICRO_BATCH)].sum(axis=2)
            fullest += held.max(axis=0).sum()
            mean += held.mean(axis=0).sum()
    return (
        f"| {stage:12} | {unit.value:7} | {seq_len} | {np.mean(padding):8.3%} | {max(padding):8.3%} | "
        f"{1e6 * seconds / documents:10.2f} | {fullest / mean:7.3f} |"
    ), windows[-1]


def least_bins(lengths: np.ndarray, capacity: int, seconds: float = 60.0) -> float:
    """Bins that any packing needs at the least: a bound that holds whenever the search is cut off."""
    from scipy.optimize import linprog
    from scipy.sparse import csc_matrix

    sizes, counts = np.unique(lengths, return_counts=True)
    patterns = [{at: capacity // int(size)} for at, size in enumerate(sizes)]
    bound = float(counts @ sizes) / capacity
    stop = time.monotonic() + seconds
    while True:
        entries = [(at, column, times) for column, held in enumerate(patterns) for at, times in held.items()]
        rows, columns, values = zip(*entries, strict=True)
        covers = csc_matrix((values, (rows, columns)), shape=(len(sizes), len(patterns)))
        found = linprog(np.ones(len(patterns)), A_ub=-covers, b_ub=-counts, method="highs")
        prices = -found.ineqlin.marginals
        best, last = _knapsack(prices, sizes, capacity)
        bound = max(bound, found.fun / best[capacity])
        known = {tuple(sorted(held.items())) for held in patterns}
        # The dearest filling, and the dearest with each of the lengths that promise most.
        firsts = np.argsort(-(best[capacity - sizes] + prices))[:60].tolist()
        for first in [None, *firsts]:
            held = _filling(first, last, sizes, capacity)
            if tuple(sorted(held.items())) not in known and sum(prices[at] * n for at, n in held.items()) > 1 + 1e-9:
                known.add(tuple(sorted(held.items())))
                patterns.append(held)
        if len(known) == len(entries) or found.fun - bound < 1e-4 * bound or time.monotonic() > stop:
            return bound


def _knapsack(prices: np.ndarray, sizes: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """The highest price that fits into each room, and the length added last for it (-1: none)."""
    best, last = np.zeros(capacity + 1), np.full(capacity + 1, -1)
    for room in range(1, capacity + 1):
        best[room] = best[room - 1]
        fitting = int(np.searchsorted(sizes, room, side="right"))
        if fitting:
            value = best[room - sizes[:fitting]] + prices[:fitting]
            at = int(value.argmax())
            if value[at] > best[room] + 1e-12:
                best[room], last[room] = value[at], at
    return best, last


def _filling(first: int | None, last: np.ndarray, sizes: np.ndarray, capacity: int) -> dict[int, int]:
    """How often each length is in the dearest filling that holds `first`."""
    held: dict[int, int] = {} if first is None else {first: 1}
    room = capacity if first is None else capacity - int(sizes[first])
    while room > 0:
        at = int(last[room])
        if at < 0:
            room -= 1
            continue
        held[at] = held.get(at, 0) + 1
        room -= int(sizes[at])
    return held


def measure_memory(count: int) -> None:
    """Prints peak memory of planning two windows over so many samples."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    lengths = (np.arange(count * 3 // 4, dtype=np.int64) * 7919 % 300 + 600).astype(np.int32)
    prose = (np.arange(count // 4, dtype=np.int64) * 104729 % 1500 + 20).astype(np.int32)
    sources = [source("drawings", Task.generation, 3, lengths), source("prose", Task.text, 1, prose)]
    given = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    plan = plan_of(sources, seq_len=4096, global_batch_size=512, window_rows=ROWS)
    plan.window(0)
    plan.window(1)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"{count:,} samples: peak {after / 2**20:.2f} GiB, of which {(given - before) / 2**20:.2f} the lengths and "
        f"{before / 2**20:.2f} Python and numpy; {time.process_time() - start:.1f} s of CPU"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", default=list(STAGES))
    parser.add_argument("--unit", type=RatioUnit, default=RatioUnit.tokens)
    parser.add_argument("--bound", action="store_true")
    parser.add_argument("--documents", type=int)
    asked = parser.parse_args()
    if asked.documents:
        measure_memory(asked.documents)
        return
    print("| stage | shares of | seq_len | padding | worst window | us a document | images, fullest over mean |")
    print("|---|---|---|---|---|---|---|")
    for stage in asked.stages:
        for seq_len in sorted({4096, STAGES[stage].seq_len}):
            line, window = measure(stage, seq_len, asked.unit)
            print(line, flush=True)
            if asked.bound:
                held = window.length[: window.row_start[512]]
                bound = least_bins(held, seq_len)
                print(f"  no packing leaves less than {1 - held.sum() / (bound * seq_len):.3%}", flush=True)


if __name__ == "__main__":
    main()
