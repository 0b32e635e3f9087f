"""The shapes data has on its way: Sample (as stored), Document (as tokens), PackedRow, Batch.

Arrays are numpy; torch appears only where batches are collated. Shape letters: `n` tokens of a document, `s` seq_len,
`b` rows of a batch, `d` documents of a batch, `m` understanding images.

Labels are already shifted: `labels[i]` is what position `i` must predict, that is token `i + 1`, so nobody downstream
shifts anything. A document never predicts across its own end.
"""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np

SCHEMA_VERSION = 1
"""Version of shards, index and packed rows; a reader refuses another major version."""


class TokenKind(IntEnum):
    """What a position holds, hence which embedding fills it."""

    text = 0
    image_und = 1
    image_gen = 2
    pad = 3


class LabelHead(IntEnum):
    """Which head scores a position."""

    none = 0
    text = 1
    image = 2


class TaskId(IntEnum):
    """Which loss a labelled position counts towards; same names as `spec.Task`."""

    text = 0
    understanding = 1
    generation = 2


@dataclass(frozen=True, slots=True)
class Segment:
    """One piece of an interleaved sample: text ids, or one image by its number in the sample."""

    text_ids: np.ndarray | None = None
    """int32 [n], or None for an image."""
    image: int = -1
    """Number of the image in `Sample.images`, or -1 for text."""
    has_loss: bool = True
    """Whether the text tokens of this segment are trained on (answers: yes, questions and system prompts: no)."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One stored sample, decoded: what `stream.read` returns and `dialogue.build_document` consumes."""

    uid: str
    """Identity, 32 hex digits (see `uid`); keys every random choice."""
    segments: tuple[Segment, ...] = ()
    """Interleaved and text samples: the pieces in order."""
    images: tuple[np.ndarray, ...] = ()
    """Understanding images, uint8 [3, side, side], already at the encoder's geometry."""
    caption_ids: np.ndarray | None = None
    """Generation samples: int32 text ids of the caption."""
    image_ids: np.ndarray | None = None
    """Generation samples: uint16 ids in raster order, [generation_tokens]."""


@dataclass(frozen=True, slots=True)
class Document:
    """One document as tokens; all arrays have length n."""

    input_ids: np.ndarray
    """int32: text id, image id (image_gen) or the placeholder's text id (image_und)."""
    token_kind: np.ndarray
    """uint8, TokenKind."""
    labels: np.ndarray
    """int32: id to predict at this position (text id or image id by `label_head`), 0 where there is none."""
    label_head: np.ndarray
    """uint8, LabelHead."""
    task: int
    """TaskId of all its labels."""
    images: tuple[np.ndarray, ...] = ()
    """uint8 [3, side, side] in the order of their image_und runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hole:
    """A broken sample in a row: pads of its planned length that nothing is learnt from."""

    source: str
    """Name of the source in the data spec."""
    shard: str
    """Path of the tar."""
    offset: int
    """First byte of the sample in it."""
    uid: str
    """The sample's identity, 32 hex digits."""
    row: int
    """Row number of the plan."""
    step: int
    """Step the row belongs to, counted from 1 as in logs."""
    reason: str
    """As in `errors.BrokenSample`."""
    message: str
    """The whole line that says what is wrong."""


@dataclass(frozen=True, slots=True)
class PackedRow:
    """One row of seq_len tokens: documents side by side, then padding."""

    input_ids: np.ndarray
    """int32 [s]."""
    token_kind: np.ndarray
    """uint8 [s]."""
    position_ids: np.ndarray
    """int32 [s], restarts at 0 with every document and with the padding."""
    labels: np.ndarray
    """int32 [s]."""
    label_head: np.ndarray
    """uint8 [s]."""
    label_task: np.ndarray
    """uint8 [s], TaskId where label_head is not none."""
    cu_seqlens: np.ndarray
    """int32 [docs + 1], 0 ... s; padding is its own last segment."""
    pixel_values: np.ndarray
    """uint8 [m, 3, side, side], in the order of the image_und runs; m may be 0."""
    holes: tuple[Hole, ...] = ()
    """Broken samples of the row; no part of its digest, which sees the pads."""


BATCH_KEYS = (
    "input_ids",
    "token_kind",
    "position_ids",
    "labels",
    "label_head",
    "label_task",
    "cu_seqlens",
    "pixel_values",
)
"""Keys of a Batch, a dict of torch tensors. [b, s]: input_ids, position_ids, labels int32; token_kind, label_head,
label_task uint8. cu_seqlens int32 [d + 1] over the flattened b * s tokens, row after row. pixel_values uint8
[m, 3, side, side]: image k fills the k-th run of image_und tokens in row-major order."""
