"""A source as the plan sees it: lengths of its documents, and its endless stream of shuffled epochs.

The plan needs no bytes, only per sample the token length and the number of understanding images. A text sample longer
than a row is cut into pieces of seq_len tokens that become documents of their own, shuffled like any other; nothing
else is ever cut, because a cut through a dialogue or an image would change what is taught.
"""

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.plan.order import permutation, stream_key
from data_pipeline.spec import Task

_ORDERS_KEPT = 2
"""Epoch orders in memory per source: the one being read and its neighbour."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSource:
    """What the plan knows of one source."""

    name: str
    """Its name in the data spec; also keys its order, so two uses of one directory differ."""
    path: str = ""
    """Where it is, for messages."""
    digest: str
    """Hash of its manifest."""
    task: Task
    """Which loss its documents feed."""
    weight: float
    """Relative share."""
    lengths: np.ndarray
    """int32 [samples], tokens of each document."""
    num_images: np.ndarray
    """uint8 [samples], images to understand."""
    can_cut: bool = False
    """Whether long samples may be cut: pure text only."""

    def where(self) -> str:
        """Name and path for messages."""
        return f"source {self.name!r} ({self.path})" if self.path else f"source {self.name!r}"


@dataclass(frozen=True, slots=True)
class DocumentTable:
    """Documents of a source: its samples, long text ones in pieces. All arrays have one entry per document."""

    length: np.ndarray
    """int32, tokens."""
    num_images: np.ndarray
    """uint8."""
    sample: np.ndarray | None = None
    """int64, or None where every sample is one document."""
    start: np.ndarray | None = None
    """int32, first token of the piece within its sample; None where every sample is one document."""

    def __len__(self) -> int:
        return len(self.length)


def documents_of(source: PlanSource, seq_len: int) -> DocumentTable:
    """Lists the documents of a source at this row length.

    Raises:
        UserError: A sample is empty, or is longer than a row and must not be cut.
    """
    lengths = np.asarray(source.lengths)
    if len(lengths) and int(lengths.min()) < 1:
        raise UserError(
            f"{source.where()}: sample {int(lengths.argmin())} has {int(lengths.min())} tokens, at least 1 is needed; "
            "prepare the source again"
        )
    if not len(lengths) or int(lengths.max()) <= seq_len:
        return DocumentTable(lengths, source.num_images)
    if not source.can_cut:
        longest = int(lengths.argmax())
        raise UserError(
            f"{source.where()}: sample {longest} is a document of {int(lengths[longest])} tokens "
            f"({int((lengths > seq_len).sum())} samples are longer than data.seq_len={seq_len}), and only pure text is "
            f"cut; set data.seq_len to {int(lengths[longest])} or more, or leave these samples out when preparing"
        )
    pieces = -(-lengths.astype(np.int64) // seq_len)
    sample = np.repeat(np.arange(len(lengths), dtype=np.int64), pieces)
    first = np.cumsum(pieces) - pieces
    start = (np.arange(len(sample), dtype=np.int64) - first[sample]) * seq_len
    length = np.minimum(lengths[sample] - start, seq_len)
    return DocumentTable(length.astype(np.int32), source.num_images[sample], sample, start.astype(np.int32))


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive documents of a stream; arrays have one entry per document."""

    document: np.ndarray
    """int64, number in the document table."""
    epoch: np.ndarray
    """int32."""
    length: np.ndarray
    """int64, tokens."""


class DocumentStream:
    """The documents of a source in the order of training, epoch after epoch without end.

    Position p is place p % n of epoch p // n, so what a position holds needs no history.
    """

    def __init__(self, name: str, table: DocumentTable, seed: int) -> None:
        self.table = table
        self.mean = float(table.length.mean(dtype=np.float64))
        """Mean tokens of a document."""
        self.longest = int(table.length.max())
        """Tokens of the longest document."""
        self._name = name
        self._seed = seed
        self._orders: OrderedDict[int, np.ndarray] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        """Epoch orders are left out: another process computes its own."""
        return {**self.__dict__, "_orders": OrderedDict()}

    def order(self, epoch: int) -> np.ndarray:
        """Permutation of the documents in one epoch."""
        found = self._orders.get(epoch)
        if found is None:
            found = permutation(stream_key("order", self._seed, self._name, epoch), len(self.table))
            while len(self._orders) >= _ORDERS_KEPT:
                self._orders.popitem(last=False)
            self._orders[epoch] = found
        return found

    def read(self, first: int, count: int) -> Chunk:
        """Documents at positions first ... first + count - 1."""
        documents, epochs = [], []
        while count > 0:
            epoch, place = divmod(first, len(self.table))
            part = self.order(epoch)[place : place + count]
            documents.append(part)
            epochs.append(np.full(len(part), epoch, np.int32))
            first, count = first + len(part), count - len(part)
        if not documents:
            return Chunk(np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0, np.int64))
        document = np.concatenate(documents).astype(np.int64)
        return Chunk(document, np.concatenate(epochs), self.table.length[document].astype(np.int64))
