"""A source as the plan sees it: lengths of its documents, and its endless stream of shuffled epochs.

The plan needs no bytes, only per sample the token length and the number of understanding images. A text sample longer
than a row is cut into pieces of seq_len tokens that become documents of their own, shuffled like any other; nothing
else is ever cut, because a cut through a dialogue or an image would change what is taught.
Samples that a mask leaves out keep their number and are skipped, so the order of all others is what it was without.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.plan.order import choice_keys, permutation, stream_key
from data_pipeline.plan.schedule import WeightCurve
from data_pipeline.spec import Captions, Exhausted, Task, WeightPoint

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
    """Relative share before the first point of the schedule."""
    schedule: tuple[WeightPoint, ...] = ()
    """Later weights."""
    max_epochs: float = 0.0
    """How often it is gone through at most; 0 sets no limit."""
    on_exhausted: Exhausted = Exhausted.error
    """What happens then."""
    lengths: np.ndarray
    """int32 [samples], tokens of each document."""
    num_images: np.ndarray
    """uint8 [samples], images to understand."""
    can_cut: bool = False
    """Whether long samples may be cut: pure text only."""
    left_out: np.ndarray | None = None
    """bool [samples], True where a mask leaves the sample out; None leaves out nothing."""
    masks: Mapping[str, str] = field(default_factory=dict)
    """Digest of each mask by its name; `left_out` is all of them together."""
    captions: Captions = Captions.all
    """Which captions of a picture an epoch holds; with `one`, the two arrays below are needed."""
    caption_number: np.ndarray | None = None
    """uint8 [samples], 0 begins a new image."""
    uids: np.ndarray | None = None
    """uint64 [samples, 2], keys of the choice of captions."""

    def where(self) -> str:
        """Name and path for messages."""
        return f"source {self.name!r} ({self.path})" if self.path else f"source {self.name!r}"

    @property
    def curve(self) -> WeightCurve:
        """Its weight over time."""
        return WeightCurve(self.weight, self.schedule)


@dataclass(frozen=True, slots=True)
class CaptionChoice:
    """Images with the captions that may be chosen for them; arrays have one entry per image unless said otherwise."""

    sample: np.ndarray
    """int64 [samples given], numbers of the samples that no mask leaves out, image after image."""
    first: np.ndarray
    """int64, first of the image's entries in `sample`."""
    count: np.ndarray
    """int64, its captions; 0 where masks leave all of them out."""
    uids: np.ndarray
    """uint64 [images, 2]."""

    def choose(self, images: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """int64: for each of `images` the sample with the caption that is chosen in an epoch."""
        keys = choice_keys(stream_key("caption", seed), self.uids[images], np.full(len(images), epoch))
        return self.sample[self.first[images] + (keys % self.count[images].astype(np.uint64)).astype(np.int64)]


@dataclass(frozen=True, slots=True)
class DocumentTable:
    """Documents of a source: its samples, long text ones in pieces. Arrays have one entry per document."""

    length: np.ndarray
    """int32, tokens."""
    num_images: np.ndarray
    """uint8."""
    sample: np.ndarray | None = None
    """int64, or None where every sample is one document."""
    start: np.ndarray | None = None
    """int32, first token of the piece within its sample; None where every sample is one document."""
    given: np.ndarray | None = None
    """bool, False for documents that a mask leaves out; None where all are given."""
    images: CaptionChoice | None = None
    """Where an epoch holds one caption of every image; None where it holds every document."""

    def __len__(self) -> int:
        return len(self.length)


def documents_of(source: PlanSource, seq_len: int) -> DocumentTable:
    """Lists the documents of a source at this row length; what masks leave out is not looked at.

    Raises:
        UserError: A sample is empty, or is longer than a row and must not be cut.
    """
    lengths = np.asarray(source.lengths)
    given = None if source.left_out is None or not source.left_out.any() else ~np.asarray(source.left_out)
    _check_lengths(source, lengths if given is None else np.where(given, lengths, 1), seq_len)
    images = _images_of(source, given) if source.captions is Captions.one else None
    if not source.can_cut or not len(lengths) or int(lengths.max()) <= seq_len:
        return DocumentTable(lengths, source.num_images, given=given, images=images)
    pieces = -(-lengths.astype(np.int64) // seq_len)
    sample = np.repeat(np.arange(len(lengths), dtype=np.int64), pieces)
    first = np.cumsum(pieces) - pieces
    start = (np.arange(len(sample), dtype=np.int64) - first[sample]) * seq_len
    length = np.minimum(lengths[sample] - start, seq_len).astype(np.int32)
    given = None if given is None else given[sample]
    return DocumentTable(length, source.num_images[sample], sample, start.astype(np.int32), given, images)


def _check_lengths(source: PlanSource, lengths: np.ndarray, seq_len: int) -> None:
    if not len(lengths):
        return
    if int(lengths.min()) < 1:
        raise UserError(
            f"{source.where()}: sample {int(lengths.argmin())} has {int(lengths.min())} tokens, at least 1 is needed; "
            "prepare the source again"
        )
    if int(lengths.max()) > seq_len and not source.can_cut:
        longest = int(lengths.argmax())
        raise UserError(
            f"{source.where()}: sample {longest} is a document of {int(lengths[longest])} tokens "
            f"({int((lengths > seq_len).sum())} samples are longer than data.seq_len={seq_len}), and only pure text is "
            f"cut; set data.seq_len to {int(lengths[longest])} or more, or mask these samples (`janus-mega data mask`)"
        )


def _images_of(source: PlanSource, given: np.ndarray | None) -> CaptionChoice:
    """Groups the captions of a source by image.

    Raises:
        UserError: The source has no numbers of captions, or they do not begin with an image's first.
    """
    numbers, uids = source.caption_number, source.uids
    if numbers is None or uids is None:
        raise UserError(
            f"{source.where()}: captions=one needs images with captions (kind t2i), of which this source has none; "
            f"set data.sources.{source.name}.captions=all"
        )
    begins = np.asarray(numbers) == 0
    if len(begins) and not begins[0]:
        raise UserError(
            f"{source.where()}: its first sample is caption {int(numbers[0])} of an image, 0 comes first; prepare the "
            "source again"
        )
    image = np.cumsum(begins) - 1
    sample = np.arange(len(begins)) if given is None else np.flatnonzero(given)
    count = np.bincount(image[sample], minlength=int(begins.sum()))
    return CaptionChoice(sample, np.cumsum(count) - count, count, np.asarray(uids)[begins])


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

    Position p is place p % size of epoch p // size, so what a position holds needs no history.
    """

    def __init__(self, name: str, table: DocumentTable, seed: int) -> None:
        """`table` gives at least one document."""
        self.table = table
        self._name = name
        self._seed = seed
        self._orders: OrderedDict[int, np.ndarray] = OrderedDict()
        lengths = table.length if table.given is None else table.length[table.given]
        self.longest = int(lengths.max())
        """Tokens of the longest document."""
        if table.images is None:
            self.size = len(lengths)
            """Documents in an epoch."""
            self.mean = float(lengths.mean(dtype=np.float64))
            """Mean tokens of a document."""
        else:
            count = table.images.count
            image = np.repeat(np.arange(len(count)), count)
            sums = np.bincount(image, table.length[table.images.sample], len(count))
            self.size = int(np.count_nonzero(count))
            self.mean = float((sums[count > 0] / count[count > 0]).mean())

    def __getstate__(self) -> dict[str, object]:
        """Epoch orders are left out: another process computes its own."""
        return {**self.__dict__, "_orders": OrderedDict()}

    def order(self, epoch: int) -> np.ndarray:
        """Permutation of the documents in one epoch."""
        found = self._orders.get(epoch)
        if found is None:
            found = self._compute_order(epoch)
            while len(self._orders) >= _ORDERS_KEPT:
                self._orders.popitem(last=False)
            self._orders[epoch] = found
        return found

    def _compute_order(self, epoch: int) -> np.ndarray:
        key = stream_key("order", self._seed, self._name, epoch)
        images, given = self.table.images, self.table.given
        if images is not None:
            order = permutation(key, len(images.count))
            order = order[images.count[order] > 0]
            return images.choose(order, self._seed, epoch).astype(order.dtype)
        order = permutation(key, len(self.table))
        return order if given is None else order[given[order]]

    def limit(self, epochs: float) -> int:
        """Documents in a number of epochs, rounded down: 0.29 epochs of 100 are 29, whatever binary 0.29 is."""
        return int(Decimal(repr(epochs)) * self.size)

    def read(self, first: int, count: int) -> Chunk:
        """Documents at positions first ... first + count - 1."""
        documents, epochs = [], []
        while count > 0:
            epoch, place = divmod(first, self.size)
            part = self.order(epoch)[place : place + count]
            documents.append(part)
            epochs.append(np.full(len(part), epoch, np.int32))
            first, count = first + len(part), count - len(part)
        if not documents:
            return Chunk(np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0, np.int64))
        document = np.concatenate(documents).astype(np.int64)
        return Chunk(document, np.concatenate(epochs), self.table.length[document].astype(np.int64))
