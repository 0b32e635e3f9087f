"""A global batch made again through the loader of training, for any ranks and workers, and compared by its hash."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data_pipeline.errors import UserError
from data_pipeline.explain.blame import Layout, rows_of_step
from data_pipeline.plan.open import OpenData
from data_pipeline.plan.plan import PlanEnded
from data_pipeline.schema import Hole
from data_pipeline.stream.assemble import combine_digests
from data_pipeline.stream.loader import build_loader, row_digests

BATCHES_FILE = "batches.jsonl"
"""In a run directory: one line {"step", "batch_hash"} per step."""


@dataclass(frozen=True, slots=True)
class Replay:
    """A batch made again."""

    step: int
    """From 1."""
    batch_hash: str
    """Hex; equal to what a run logs, whatever its layout was."""
    num_rows: int
    holes: tuple[Hole, ...]
    """Samples that are broken here and now."""


def replay_step(data: OpenData, step: int, layout: Layout | None = None, num_workers: int = 0) -> Replay:
    """Loads the batch of a step as the ranks of a layout would.

    Raises:
        UserError: There is no such step, the layout does not divide the batch, or a shard cannot be read.
    """
    layout = layout or Layout()
    rows = rows_of_step(data.plan, step)
    data = replace(data, spec=replace(data.spec, num_workers=num_workers))
    digests: list[bytes] = []
    holes: list[Hole] = []
    for rank in range(layout.dp_size):
        try:
            loader = build_loader(
                data,
                micro_batch_size=layout.micro_batch_size,
                dp_rank=rank,
                dp_size=layout.dp_size,
                first_step=step - 1,
                num_steps=1,
            )
            for batches in loader:
                digests += row_digests(batches)
                holes += loader.holes
        except PlanEnded as ended:
            raise UserError(
                f"--step {step}: the plan has {ended.step} steps ({ended.why}); give one of those"
            ) from ended
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{error}; give another --world-size") from error
    return Replay(step, combine_digests(digests), len(rows), tuple(holes))


def logged_hashes(path: Path, step: int) -> list[str]:
    """Hashes that a run's log holds for a step, the last one last: a run that was resumed may have trained it twice.

    Raises:
        UserError: The log cannot be read, is damaged, or does not hold the step.
    """
    hashes: list[str] = []
    first = last = 0
    try:
        with path.open(encoding="utf-8") as stream:
            for number, line in enumerate(stream, 1):
                try:
                    entry = json.loads(line)
                    logged, batch_hash = int(entry["step"]), str(entry["batch_hash"])
                except (ValueError, KeyError, TypeError) as error:
                    if not line.endswith("\n"):
                        break  # a run that was killed while it wrote its last line
                    raise UserError(f"{path}:{number}: no line of a batch log ({error!r}); restore the file") from error
                first, last = min(first or logged, logged), max(last, logged)
                hashes += [batch_hash] if logged == step else []
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); give a run directory whose run has logged its batches"
        ) from error
    if not hashes:
        held = f"steps {first} to {last}" if last else "no step"
        raise UserError(f"{path}: step {step} is not in it, it holds {held}; give one of those")
    return hashes


def why_different(replay: Replay, logged: str, differences: Sequence[str] = (), run_holes: Sequence[Hole] = ()) -> str:
    """One line on a hash that differs: the most likely reason that can be told from here.

    Args:
        replay: What was made here.
        logged: The hash that the run logged.
        differences: Between the plan here and the run's, one line each (`plan.difference`).
        run_holes: Broken samples that the run met.
    """
    begin = f"step {replay.step}: batch {replay.batch_hash[:16]} here, {logged[:16]} in the run's log"
    if differences:
        others = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
        return f"{begin}: the data plan is another one: {differences[0]}{others}"
    rows = range((replay.step - 1) * replay.num_rows, replay.step * replay.num_rows)
    then = {(hole.source, hole.uid): hole for hole in run_holes if hole.row in rows}
    now = {(hole.source, hole.uid): hole for hole in replay.holes}
    for keys, what in ((now.keys() - then.keys(), "broken here"), (then.keys() - now.keys(), "broken in the run")):
        if keys:
            hole = (now | then)[min(keys)]
            others = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            return (
                f"{begin}: {what}, not there: {hole.source} sample {hole.uid} ({hole.reason}) in row {hole.row}, byte "
                f"{hole.offset} of {hole.shard}{others}"
            )
    return (
        f"{begin}: plan and all samples are the run's, so the rows were built by another version of the code, or "
        "pictures decode differently with the libraries here"
    )
