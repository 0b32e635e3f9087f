"""Compiles one window: a few hundred to a few thousand rows, planned together.

A window takes documents by the ledger, packs them, tops the last rows up and deals the rows to global batches. Every
document taken is placed, so the state after a window is the ledger and how full rows became: rows that cannot be
filled completely hold less than rows x seq_len, and the next window begins with what this one could hold.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from data_pipeline.plan.deal import deal_to_batches
from data_pipeline.plan.documents import DocumentStream
from data_pipeline.plan.fill import Filling, Space, fill_own_rows, fill_shared_rows
from data_pipeline.plan.mixture import Ledger, Mixture, Upcoming
from data_pipeline.plan.order import stream_key
from data_pipeline.schema import TaskId
from data_pipeline.spec import RatioUnit


@dataclass(frozen=True, slots=True)
class Cursor:
    """State between two windows; all that a plan needs to go on."""

    window_no: int
    """The window that comes next."""
    ledger: Ledger
    """Taken and owed by the windows before it."""
    fullness: tuple[int, ...] = ()
    """What rows turned out to hold, see `fill.Filling`; empty before the first window."""


@dataclass(frozen=True, slots=True)
class WindowShape:
    """What all windows of a plan have in common."""

    num_rows: int
    """Rows per window, a multiple of global_batch_size."""
    seq_len: int
    """Tokens per row."""
    global_batch_size: int
    """Rows per step."""
    seed: int
    """Seed of the plan."""

    def first_step(self, window_no: int) -> int:
        """The step that a window begins with."""
        return window_no * self.num_rows // self.global_batch_size


@dataclass(frozen=True, slots=True)
class Window:
    """Rows of one window in the order of training; documents of row r are row_start[r] ... row_start[r + 1] - 1."""

    row_start: np.ndarray
    """int64 [rows + 1]."""
    source: np.ndarray
    """int32 [documents]."""
    document: np.ndarray
    """int64 [documents], number in the source's document table."""
    epoch: np.ndarray
    """int32 [documents]."""
    length: np.ndarray
    """int64 [documents], tokens."""
    num_images: np.ndarray
    """int64 [rows], images to understand."""
    shares: tuple[int, ...]
    """Planned share of each source in 1/WHOLE; 0 where it is out of the mixture, or gives the few it has left."""
    finished: tuple[int, ...] = ()
    """Sources that give the last of the documents they may here."""


def compile_window(
    cursor: Cursor, streams: Sequence[DocumentStream], tasks: Sequence[TaskId], mixture: Mixture, shape: WindowShape
) -> tuple[Window, Cursor]:
    """Returns the window at a cursor and the cursor after it.

    Raises:
        SourceExhausted: There is no such window, because a source that must not be missing has too little left for it.
    """
    upcoming = [Upcoming(stream, first) for stream, first in zip(streams, cursor.ledger.documents, strict=True)]
    fill = fill_own_rows if mixture.unit is RatioUnit.rows else fill_shared_rows
    time = mixture.time_of(shape.first_step(cursor.window_no), cursor.ledger)
    filling = fill(cursor.ledger, cursor.fullness, upcoming, mixture, time, Space(shape.num_rows, shape.seq_len))
    finished = [k for k, left in enumerate(mixture.left(filling.ledger)) if left == 0 and len(filling.bins[k])]
    window = _arrange(filling, upcoming, streams, tasks, shape, stream_key("window", shape.seed, cursor.window_no))
    return replace(window, finished=tuple(finished)), Cursor(cursor.window_no + 1, filling.ledger, filling.fullness)


def _arrange(
    filling: Filling,
    upcoming: Sequence[Upcoming],
    streams: Sequence[DocumentStream],
    tasks: Sequence[TaskId],
    shape: WindowShape,
    key: int,
) -> Window:
    """Turns bins into rows in the order of training."""
    chunks = [source.take(len(placed)) for source, placed in zip(upcoming, filling.bins, strict=True)]
    bin_of = np.concatenate(filling.bins)
    length = np.concatenate([chunk.length for chunk in chunks])
    source = np.repeat(np.arange(len(chunks), dtype=np.int32), [len(chunk.length) for chunk in chunks])
    cell = bin_of * len(TaskId) + np.array(tasks, np.int64)[source]
    tokens = np.bincount(cell, length, shape.num_rows * len(TaskId)).astype(np.int64).reshape(shape.num_rows, -1)
    row_order = deal_to_batches(tokens, shape.num_rows // shape.global_batch_size, key)
    row_of_bin = np.empty(shape.num_rows, np.int64)
    row_of_bin[row_order] = np.arange(shape.num_rows)
    row_of = row_of_bin[bin_of]
    order = np.argsort(row_of, kind="stable")
    images = [stream.table.num_images[chunk.document] for stream, chunk in zip(streams, chunks, strict=True)]
    row_start = np.zeros(shape.num_rows + 1, np.int64)
    np.cumsum(np.bincount(row_of, minlength=shape.num_rows), out=row_start[1:])
    return Window(
        row_start,
        source[order],
        np.concatenate([chunk.document for chunk in chunks])[order],
        np.concatenate([chunk.epoch for chunk in chunks])[order],
        length[order],
        np.bincount(row_of, np.concatenate(images), shape.num_rows).astype(np.int64),
        filling.shares,
    )
