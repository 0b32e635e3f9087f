"""Compiles one window: a few hundred to a few thousand rows, planned together.

A window takes documents by the ledger, packs them across sources (rows of one source alone waste several percent), tops
the last rows up and deals the rows to global batches. Every document taken is placed, so the state after a window
is the ledger and one number; that number is how many tokens to take at once, learned from the window before,
because rows that cannot be filled completely hold less than rows x seq_len.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.plan.deal import deal_to_batches
from data_pipeline.plan.documents import DocumentStream
from data_pipeline.plan.mixture import Ledger, Mixture, Upcoming
from data_pipeline.plan.order import stream_key
from data_pipeline.plan.packing import Rooms, pack
from data_pipeline.schema import TaskId


@dataclass(frozen=True, slots=True)
class Cursor:
    """State between two windows; all that a plan needs to go on."""

    window_no: int
    """The window that comes next."""
    ledger: Ledger
    """Taken by the windows before it."""
    tokens: int
    """Tokens to take before topping up."""


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


def first_cursor(num_sources: int, shape: WindowShape) -> Cursor:
    """The state before the first window."""
    nothing = (0,) * num_sources
    return Cursor(0, Ledger(nothing, nothing), _below(shape.num_rows * shape.seq_len, shape))


def compile_window(
    cursor: Cursor, streams: Sequence[DocumentStream], tasks: Sequence[TaskId], mixture: Mixture, shape: WindowShape
) -> tuple[Window, Cursor]:
    """Returns the window at a cursor and the cursor after it."""
    upcoming = [Upcoming(stream, first) for stream, first in zip(streams, cursor.ledger.documents, strict=True)]
    bins = _fill(cursor, upcoming, mixture, shape)
    bins = _top_up(cursor.ledger, upcoming, bins, mixture, shape)
    ledger = _after(cursor.ledger, upcoming, bins)
    window = _arrange(upcoming, bins, streams, tasks, shape, stream_key("window", shape.seed, cursor.window_no))
    taken = sum(ledger.tokens) - sum(cursor.ledger.tokens)
    return window, Cursor(cursor.window_no + 1, ledger, _below(taken, shape))


def _below(tokens: int, shape: WindowShape) -> int:
    """A little less than what fits, so that all of it finds a place and the rest is topped up document by document."""
    return max(shape.seq_len, tokens - 3 * shape.seq_len // 2)


def _after(ledger: Ledger, upcoming: Sequence[Upcoming], bins: Sequence[np.ndarray]) -> Ledger:
    """The ledger once the documents that have bins are taken."""
    counts = [len(placed) for placed in bins]
    return Ledger(
        tuple(before + count for before, count in zip(ledger.documents, counts, strict=True)),
        tuple(
            before + source.tokens(count) for before, source, count in zip(ledger.tokens, upcoming, counts, strict=True)
        ),
    )


def _fill(cursor: Cursor, upcoming: Sequence[Upcoming], mixture: Mixture, shape: WindowShape) -> list[np.ndarray]:
    """Takes about the cursor's tokens and packs them; takes less until they fit into the window's rows.

    Returns:
        Per source the bin of each of its next documents.
    """
    tokens = cursor.tokens
    while True:
        counts = mixture.counts(cursor.ledger, upcoming, tokens)
        lengths = np.concatenate([source.take(count).length for source, count in zip(upcoming, counts, strict=True)])
        arrival = _interleave(counts)
        packing = pack(lengths[arrival], shape.seq_len)
        if packing.num_bins <= shape.num_rows:
            bins = np.empty(len(lengths), np.int64)
            bins[arrival] = packing.bin_of
            return np.split(bins, np.cumsum(counts)[:-1])
        fits = int(lengths.sum()) * shape.num_rows // packing.num_bins
        tokens = min(_below(fits, shape), tokens - shape.seq_len)


def _interleave(counts: Sequence[int]) -> np.ndarray:
    """int64 [documents]: an order of concatenated documents in which all sources advance evenly."""
    places = [(np.arange(count) + 0.5) / max(count, 1) for count in counts]
    return np.argsort(np.concatenate(places), kind="stable")


def _top_up(
    ledger: Ledger, upcoming: Sequence[Upcoming], bins: list[np.ndarray], mixture: Mixture, shape: WindowShape
) -> list[np.ndarray]:
    """Adds one document at a time, from the source furthest below its share, until none that is due fits.

    Room that happens to suit one source alone may pull the shares apart at the end; what came after the last state
    with every source within one document of its share is taken back.
    """
    rooms = _rooms(upcoming, bins, shape)
    ledger = _after(ledger, upcoming, bins)
    longest = [source.longest for source in upcoming]
    lengths = [source.length(len(placed)) for source, placed in zip(upcoming, bins, strict=True)]
    added: list[tuple[int, int]] = []
    num_exact = 0 if mixture.is_exact(ledger, longest) else None
    placing = True
    while placing:
        placing = False
        for source in mixture.due(ledger, lengths):
            bin_no = rooms.take(lengths[source])
            if bin_no >= 0:
                added.append((source, bin_no))
                ledger = ledger.plus(source, lengths[source])
                lengths[source] = upcoming[source].length(ledger.documents[source] - upcoming[source].first)
                num_exact = len(added) if mixture.is_exact(ledger, longest) else num_exact
                placing = True
                break
    extra: list[list[int]] = [[] for _ in bins]
    for source, bin_no in added[:num_exact]:
        extra[source].append(bin_no)
    return [np.concatenate([old, np.array(new, np.int64)]) for old, new in zip(bins, extra, strict=True)]


def _rooms(upcoming: Sequence[Upcoming], bins: Sequence[np.ndarray], shape: WindowShape) -> Rooms:
    """The room that packed documents leave in the window's rows."""
    load = np.zeros(shape.num_rows, np.int64)
    for source, placed in zip(upcoming, bins, strict=True):
        np.add.at(load, placed, source.take(len(placed)).length)
    rooms = Rooms(shape.seq_len)
    for bin_no in range(shape.num_rows - 1, -1, -1):
        rooms.add(bin_no, shape.seq_len - int(load[bin_no]))
    return rooms


def _arrange(
    upcoming: Sequence[Upcoming],
    bins: Sequence[np.ndarray],
    streams: Sequence[DocumentStream],
    tasks: Sequence[TaskId],
    shape: WindowShape,
    key: int,
) -> Window:
    """Turns bins into rows in the order of training."""
    chunks = [source.take(len(placed)) for source, placed in zip(upcoming, bins, strict=True)]
    bin_of = np.concatenate(bins)
    length = np.concatenate([chunk.length for chunk in chunks])
    source = np.repeat(np.arange(len(chunks), dtype=np.int32), [len(chunk.length) for chunk in chunks])
    task = np.array(tasks, np.int64)[source]
    tokens = np.zeros((shape.num_rows, len(TaskId)), np.int64)
    np.add.at(tokens, (bin_of, task), length)
    row_order = deal_to_batches(tokens, shape.num_rows // shape.global_batch_size, key)
    row_of_bin = np.empty(shape.num_rows, np.int64)
    row_of_bin[row_order] = np.arange(shape.num_rows)
    row_of = row_of_bin[bin_of]
    order = np.argsort(row_of, kind="stable")
    images = np.concatenate(
        [stream.table.num_images[chunk.document] for stream, chunk in zip(streams, chunks, strict=True)]
    )
    num_images = np.zeros(shape.num_rows, np.int64)
    np.add.at(num_images, row_of, images)
    row_start = np.zeros(shape.num_rows + 1, np.int64)
    np.cumsum(np.bincount(row_of, minlength=shape.num_rows), out=row_start[1:])
    return Window(
        row_start,
        source[order],
        np.concatenate([chunk.document for chunk in chunks])[order],
        np.concatenate([chunk.epoch for chunk in chunks])[order],
        length[order],
        num_images,
    )
