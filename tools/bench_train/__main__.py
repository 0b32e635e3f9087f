"""Command line of the comparison.

    OMP_NUM_THREADS=1 python -m tools.bench_train --hardware "2 cores of an x86-64 server, 24 GiB" --slug cpu2

Measures in turns, so that a machine that slows down slows everybody, and writes train_<slug>_<date>.md and .json.
"""

import argparse
import os
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

from tools import benchmark

LOSS_BAR = 1e-4
"""Relative difference of losses on the same documents at the same weights."""


def main() -> None:
    """Measures and writes the record."""
    warnings.filterwarnings("ignore")
    arguments = _arguments()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import torch

    from tools.bench_train import record, sizes

    torch.set_num_threads(arguments.threads)
    load = benchmark.require_idle(arguments)
    start = time.monotonic()
    size = sizes.TINY if arguments.tiny else sizes.FULL
    results = _measure(size, arguments.compile) | {"tiny": arguments.tiny, "threads": arguments.threads, "load": load}
    results |= benchmark.origin(arguments, "bench_train")
    results |= {"versions": record.versions(), "seconds": time.monotonic() - start}
    path = benchmark.write_record(arguments, "train", results["date"], record.write(results), results)
    print(record.write(results))
    print(path)


def _arguments() -> argparse.Namespace:
    parser = benchmark.options(__doc__)
    parser.add_argument("--compile", action="store_true", help="also ours with compiled layers; needs a compiler")
    parser.add_argument("--threads", type=int, default=1, help="torch's intra-op threads, for everybody")
    return parser.parse_args()


def _measure(size: Any, compiled: bool) -> dict[str, Any]:
    from janus_mega.parallel.groups import build_groups, init_distributed
    from tools.bench_train import documents as made
    from tools.bench_train.ours import OurTraining
    from tools.bench_train.theirs import TheirTraining

    init_distributed()
    groups = build_groups(1, 1)
    documents = made.make_documents(size.model, size.seq_len, size.tokens, seed=0)
    rows = made.pack(documents, size.seq_len)
    rows = rows[: len(rows) // size.rows * size.rows]  # whole micro-batches only
    documents = [document for row in rows for document in row]
    packed = [made.packed_batch(rows[at : at + size.rows], size.seq_len) for at in range(0, len(rows), size.rows)]
    max_tokens = size.rows * size.seq_len
    buckets = [made.padded_batch(batch) for batch in made.bucketed(documents, max_tokens)]
    padded = [made.padded_batch(batch) for batch in made.in_order(documents, size.padded_documents)]
    ours = OurTraining(size.model, size.optimizer, groups, packed)
    theirs = TheirTraining(size.model, ours.weights, size.optimizer)
    losses = _losses(theirs, {"packed": packed, "bucketed": buckets, "padded": padded})
    steps: dict[str, Callable[[], float]] = {
        "ours, packed rows": lambda: ours.step(packed),
        "theirs, our packed rows": lambda: theirs.step(packed),
        "theirs, length-bucketed": lambda: theirs.step(buckets),
        "theirs, length-bucketed, text scored everywhere": lambda: theirs.step(buckets, every_position=True),
        "theirs, padded": lambda: theirs.step(padded, every_position=True),
    }
    if compiled:
        faster = OurTraining(size.model, size.optimizer, groups, packed, compiled=True)
        steps["ours, packed rows, compiled layers"] = lambda: faster.step(packed)
    losses["ours"] = steps["ours, packed rows"]()  # the first step tells the loss at the common weights
    spread = max(losses.values()) / min(losses.values()) - 1
    if spread > LOSS_BAR:
        raise SystemExit(f"losses at the same weights differ by {spread:.1e}: {losses}; nothing was timed")
    processor = _in_turns(steps, 2, time.process_time)  # tells less than the clock, but also on a machine that is busy
    return {
        "losses": losses,
        "seconds_of": _in_turns(steps, size.repeats),
        "processor_of": processor,
        "gemm_flops": _gemm_flops(size.gemm),
        "step_flops": _step_flops(size, documents),
        "tokens": sum(map(len, documents)),
        "documents": len(documents),
        "slots": {
            name: sum(b["input_ids"].numel() for b in batches)
            for name, batches in (("packed", packed), ("bucketed", buckets), ("padded", padded))
        },
        "framework": _framework(size, groups),
    }


def _losses(theirs: Any, layouts: dict[str, Any]) -> dict[str, float]:
    import torch

    with torch.no_grad():
        return {
            f"theirs, {name}": sum(float(theirs.loss_sum(batch)) for batch in batches)
            / sum(int((batch["label_head"] != 0).sum()) for batch in batches)
            for name, batches in layouts.items()
        }


def _in_turns(
    steps: dict[str, Callable[[], float]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of every repeat; one warm-up each, then all in turns."""
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            start = clock()
            step()
            seconds[name].append(clock() - start)
    return seconds


def _gemm_flops(size: int) -> float:
    """FLOP/s of the best of many fp32 products of two square matrices."""
    import torch

    left, right = torch.randn(size, size), torch.randn(size, size)
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        torch.mm(left, right)
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def _step_flops(size: Any, documents: Any) -> float:
    """Model FLOPs of the documents, attention within each document."""
    from data_pipeline.schema import LabelHead, TokenKind
    from janus_mega.config.schema import Module
    from janus_mega.observe.throughput import StepCounts, training_flops

    total = 0.0
    for document in documents:
        counts = StepCounts(
            tokens=len(document),
            understanding_images=len(document.pixels),
            generation_tokens=int((document.token_kind == int(TokenKind.image_gen)).sum()),
            text_labels=int((document.label_head == int(LabelHead.text)).sum()),
            image_labels=int((document.label_head == int(LabelHead.image)).sum()),
        )
        total += training_flops(size.model, counts, tuple(Module), len(document))
    return total


def _framework(size: Any, groups: Any) -> dict[str, dict[str, float]]:
    """Milliseconds per step of the tiny model, by clock: both engines and a bare loop, and what lies between.

    `above` is the median of paired differences, `best` that of the quietest steps of either.
    """
    from janus_mega.engine.megatron_backend import MegatronEngine
    from tools.bench_train import documents as made
    from tools.bench_train import sizes
    from tools.bench_train.ours import BareTraining, OurTraining

    tiny = sizes.TINY
    rows = made.pack(made.make_documents(tiny.model, tiny.seq_len, tiny.tokens, seed=1), tiny.seq_len)[:2]
    batches = [made.packed_batch([row], tiny.seq_len) for row in rows]
    ours = OurTraining(tiny.model, tiny.optimizer, groups, batches)
    megatron = OurTraining(tiny.model, tiny.optimizer, groups, batches, engine=MegatronEngine)
    bare = BareTraining(tiny.model, tiny.optimizer, groups)
    runs = {"engine": ours, "megatron": megatron, "bare": bare}
    steps = {name: partial(run.step, batches) for name, run in runs.items()}
    figures = {}
    for what, clock in (("wall", time.perf_counter), ("processor", time.thread_time)):
        seconds = _in_turns(steps, size.host_repeats, clock)
        host = {name: statistics.median(values) for name, values in seconds.items()}
        for name in ("engine", "megatron"):
            paired = [a - b for a, b in zip(seconds[name], seconds["bare"], strict=True)]
            host |= {f"{name}_above": statistics.median(paired)}
            host |= {f"{name}_best": min(seconds[name]) - min(seconds["bare"])}
        figures[what] = {name: 1000 * s for name, s in host.items()}
    return figures


if __name__ == "__main__":
    main()
