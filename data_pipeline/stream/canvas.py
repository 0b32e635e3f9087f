"""A micro-batch while it is being filled: flat arrays over all its rows, where documents lie in them, and what follows
from the finished ids.

Everything starts as padding, so padding, rows that end early and holes need nothing but to be left alone. Marks are
kind, head and task of a position: the three rows of one array, written last, by one concatenation over all documents.
Shape letters: `b` rows, `s` seq_len, `d` documents.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from data_pipeline.errors import BrokenSample
from data_pipeline.plan.plan import PlannedRows
from data_pipeline.schema import Document, Hole, LabelHead, TokenKind

KIND, HEAD, TASK = range(3)
"""Rows of marks and of patterns."""


@dataclass(frozen=True, slots=True)
class Rows:
    """A finished micro-batch."""

    arrays: dict[str, np.ndarray]
    """Keys and shapes of `schema.BATCH_KEYS`; ids, positions, labels and borders are int32."""
    holes: tuple[Hole, ...]
    """Its broken samples."""


class Pattern(dict[int, np.ndarray]):
    """What documents that differ in length alone have in common: `pattern[n]` is that of a document of n tokens.

    All of them are ends of the longest, because captions and texts vary at the front; counting is the one that begins
    at the front. Views are kept: making one takes as long as copying it.
    """

    def __init__(self, longest: np.ndarray, *, from_front: bool = False) -> None:
        """Say what the longest document has, [..., seq_len]."""
        super().__init__()
        self._longest = longest
        self._from_front = from_front

    def __missing__(self, length: int) -> np.ndarray:
        place = slice(length) if self._from_front else slice(self._longest.shape[-1] - length, None)
        view = self[length] = self._longest[..., place]
        return view

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(Pattern, from_front=self._from_front), (self._longest,)


def plain_pattern(seq_len: int, kind: TokenKind = TokenKind.text, task: int = 0) -> np.ndarray:
    """uint8 [3, seq_len]: marks of one kind and task without a label; to be written on, then made a `Pattern`."""
    return np.repeat(np.array([[kind], [LabelHead.none], [task]], np.uint8), seq_len, axis=1)


class Layout:
    """What all canvases of a run have in common."""

    def __init__(self, seq_len: int, pad_id: int, token_dtype: np.dtype) -> None:
        """Say what ids take while they are read: <u2 where every id fits, else <i4."""
        self.seq_len = seq_len
        self.pad_id = pad_id
        self.token_dtype = token_dtype
        self.padding = Pattern(plain_pattern(seq_len, TokenKind.pad))
        self.positions = Pattern(np.arange(seq_len, dtype=np.int32), from_front=True)


class Canvas:
    """Room for the documents of some planned rows."""

    def __init__(self, planned: PlannedRows, layout: Layout) -> None:
        """Lays the documents out; nothing is read.

        Raises:
            ValueError: The documents of a row do not fit into it.
        """
        self.planned = planned
        self._layout = layout
        self._num_rows = len(planned.row_start) - 1
        size = self._num_rows * layout.seq_len
        self.tokens = np.full(size, layout.pad_id, layout.token_dtype)
        """Ids [b * s]."""
        self.token_bytes = self.tokens.data.cast("B")
        """The same as bytes, to read into."""
        self.patterns = [layout.padding] * len(planned.length)
        """Marks of each document; padding where none has been given."""
        self.broken: dict[int, BrokenSample] = {}
        """Documents that have become holes, by their number."""
        self._plain: dict[int, Document] = {}

        before = np.zeros(len(planned.length) + 1, np.int64)
        np.cumsum(planned.length, out=before[1:])
        row_begin = np.arange(0, size, layout.seq_len)
        at_row = before[planned.row_start]
        used = at_row[1:] - at_row[:-1]
        if int(used.max()) > layout.seq_len:
            raise ValueError(f"the documents of a row take {used.max()} tokens, there is room for {layout.seq_len}")
        shift = row_begin - at_row[:-1]
        self.begin = before[:-1] + np.repeat(shift, planned.row_start[1:] - planned.row_start[:-1])
        """int64 [d]: first position of each document."""
        self.end = self.begin + planned.length
        """int64 [d]: position after its last one."""
        self._padding = (row_begin + used)[used < layout.seq_len]

    def put(self, number: int, document: Document) -> None:
        """Fills one document that was built the plain way."""
        self.tokens[self.begin[number] : self.end[number]] = document.input_ids
        self._plain[number] = document

    def dig_hole(self, number: int, error: BrokenSample) -> None:
        """Leaves nothing of a document but pads."""
        self.tokens[self.begin[number] : self.end[number]] = self._layout.pad_id
        self.patterns[number] = self._layout.padding
        self.broken[number] = error

    def finish(self, understanding_size: int) -> dict[str, np.ndarray]:
        """The arrays of `Rows`; the canvas must not be used afterwards.

        Args:
            understanding_size: Side of the images, pixels; gives micro-batches without images their shape.
        """
        size, shape = len(self.tokens), (self._num_rows, self._layout.seq_len)
        starts = np.concatenate([self.begin, self._padding])
        order = np.argsort(starts)
        borders = np.append(starts[order], size)
        lengths = (borders[1:] - borders[:-1]).tolist()
        patterns = self.patterns + [self._layout.padding] * len(self._padding)
        marks = np.concatenate([patterns[at][n] for at, n in zip(order.tolist(), lengths, strict=True)], axis=1)
        for number, document in self._plain.items():
            place = slice(self.begin[number], self.end[number])
            marks[KIND, place] = document.token_kind
            marks[HEAD, place] = document.label_head
            marks[TASK, place] = document.task
        counting = self._layout.positions
        ids = self.tokens.astype(np.int32)
        labels = np.zeros(size, np.int32)
        # The last position of a row never has a head, so that it meets the next row does no harm.
        # (A plain 0 is LabelHead.none: numpy takes ten times as long to compare with an enum.)
        np.multiply(ids[1:], marks[HEAD, :-1] != 0, out=labels[:-1])
        pictures = [picture for number in sorted(self._plain) for picture in self._plain[number].images]
        side = understanding_size
        return {
            "input_ids": ids.reshape(shape),
            "token_kind": marks[KIND].reshape(shape),
            "position_ids": np.concatenate([counting[n] for n in lengths]).reshape(shape),
            "labels": labels.reshape(shape),
            "label_head": marks[HEAD].reshape(shape),
            "label_task": marks[TASK].reshape(shape),
            "cu_seqlens": borders.astype(np.int32),
            "pixel_values": np.stack(pictures) if pictures else np.zeros((0, 3, side, side), np.uint8),
        }
