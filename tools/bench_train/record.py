"""Results to a record: figures beside targets, and how they were measured."""

import statistics
from importlib.metadata import version
from typing import Any

from tools.benchmark import TINY_RUN

_METHOD = """\
One process, fp32, {threads} thread(s), same fresh weights, same documents ({documents} documents, {tokens} tokens a
step), torch's AdamW and clipping on both sides; {repeats} repeats in turns after a warm-up. Losses at the common
weights agreed before anything was timed. transformers has no image loss: it is written with the library's modules
(`prepare_embeddings_for_image_generation`, image head, cross entropy). Our packed rows reach transformers as a dense
block-diagonal causal mask with restarting positions; buckets hold documents of like length within the tokens of our
micro-batch; padded batches hold documents in random order. The first two score labelled positions only, which the
library does not offer; the others score text at every position, as its own forward pass does, so the target for batches
by length stands beside both. Ratios over ours are
medians of paired repeats, of best repeats, and of processor time. The GEMM share is model FLOPs of the documents
(attention within documents) over seconds and the best square product of the same run."""


def versions() -> dict[str, str]:
    """Of what takes part."""
    return {name: version(name) for name in ("torch", "transformers", "megatron-core", "deepspeed")}


def write(results: dict[str, Any]) -> str:
    """The record as Markdown."""
    ours = results["seconds_of"]["ours, packed rows"]
    parts = [
        f"# A training step side by side, {results['hardware']}, {results['date']}",
        f"Commit {results['commit']}, "
        f"written by tools/bench_train: `{results['command']}`, {results['seconds']:.0f} s.",
    ]
    if results["tiny"]:
        parts.append(TINY_RUN)
    parts.append(_METHOD.format(repeats=len(ours), **results))
    lines = [
        "| way | seconds a step, median and best | over ours | best | processor time | target | GEMM-peak share |",
        "|---|---|---|---|---|---|---|",
    ]
    targets = {
        "theirs, our packed rows": ">= 1.05",
        "theirs, length-bucketed": ">= 1.3",
        "theirs, length-bucketed, text scored everywhere": ">= 1.3",
        "theirs, padded": "reported",
    }
    for name, seconds in results["seconds_of"].items():
        ratio = statistics.median(a / b for a, b in zip(seconds, ours, strict=True))
        median = statistics.median(seconds)
        share = results["step_flops"] / median / results["gemm_flops"]
        best = min(seconds) / min(ours)
        processor = min(results["processor_of"][name]) / min(results["processor_of"]["ours, packed rows"])
        lines.append(
            f"| {name} | {median:.3f}, {min(seconds):.3f} | {ratio:.3f} | {best:.3f} | {processor:.3f} "
            f"| {targets.get(name, '')} | {share:.1%} |"
        )
    parts.append("\n".join(lines))
    for what, host in results["framework"].items():
        parts.append(
            f"Framework cost on the tiny model, {what} time: engine {host['engine']:.2f} ms, bare torch loop over the "
            f"same modules and batches {host['bare']:.2f} ms, {host['engine_above']:+.2f} ms a step (target <= 2 ms; "
            f"quietest steps {host['engine_best']:+.2f}); megatron's optimizer {host['megatron_above']:+.2f} "
            f"({host['megatron_best']:+.2f}), which on a CPU pays for a mode that rewrites device names."
        )
    slots = ", ".join(f"{name} {count}" for name, count in results["slots"].items())
    losses = ", ".join(f"{name} {value:.6f}" for name, value in results["losses"].items())
    parts.append(f"Positions computed: {slots}. Losses at the common weights: {losses}.")
    parts.append(f"GEMM peak {results['gemm_flops'] / 1e9:.1f} GFLOP/s; load average before: {results['load']:.2f}.")
    parts.append("Versions: " + ", ".join(f"{name} {number}" for name, number in results["versions"].items()) + ".")
    return "\n\n".join(parts) + "\n"
