"""Documents side by side in one row of seq_len tokens; pure numpy.

Documents know nothing of each other: positions restart, cu_seqlens keeps attention apart, and labels are those the
documents came with, none of which looks across its own end. Padding is a segment of its own, so kernels that take
cu_seqlens need no mask. Shape letters as in `schema`: `s` seq_len, `m` images.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from data_pipeline.schema import Document, LabelHead, PackedRow, TokenKind


def cut_document(document: Document, start: int, stop: int) -> Document:
    """Tokens start ... stop - 1 of a text document as a document of its own.

    Its last position predicts nothing: what it would predict belongs to the next piece.
    """
    if start == 0 and stop == len(document.input_ids):
        return document
    labels = document.labels[start:stop].copy()
    label_head = document.label_head[start:stop].copy()
    if stop < len(document.input_ids):
        labels[-1] = 0
        label_head[-1] = LabelHead.none
    return Document(document.input_ids[start:stop], document.token_kind[start:stop], labels, label_head, document.task)


def pack(documents: Sequence[Document], seq_len: int, *, pad_id: int, understanding_size: int) -> PackedRow:
    """Lays documents side by side and pads the rest.

    Args:
        documents: In the order of the row; together at most seq_len tokens.
        seq_len: Tokens of the row.
        pad_id: Text id at padding.
        understanding_size: Side of the images, pixels; gives rows without images their shape.

    Raises:
        ValueError: The documents do not fit.
    """
    input_ids = np.full(seq_len, pad_id, np.int32)
    token_kind = np.full(seq_len, TokenKind.pad, np.uint8)
    position_ids = np.zeros(seq_len, np.int32)
    labels = np.zeros(seq_len, np.int32)
    label_head = np.zeros(seq_len, np.uint8)
    label_task = np.zeros(seq_len, np.uint8)
    counting = np.arange(seq_len, dtype=np.int32)
    borders = [0]
    images: list[np.ndarray] = []
    for document in documents:
        start, stop = borders[-1], borders[-1] + len(document.input_ids)
        if stop > seq_len:
            raise ValueError(f"{len(documents)} documents do not fit into a row of {seq_len} tokens")
        input_ids[start:stop] = document.input_ids
        token_kind[start:stop] = document.token_kind
        position_ids[start:stop] = counting[: stop - start]
        labels[start:stop] = document.labels
        label_head[start:stop] = document.label_head
        label_task[start:stop] = document.task
        images += document.images
        borders.append(stop)
    if borders[-1] < seq_len:
        position_ids[borders[-1] :] = counting[: seq_len - borders[-1]]
        borders.append(seq_len)
    pixel_values = np.stack(images) if images else np.zeros((0, 3, understanding_size, understanding_size), np.uint8)
    return PackedRow(
        input_ids=input_ids,
        token_kind=token_kind,
        position_ids=position_ids,
        labels=labels,
        label_head=label_head,
        label_task=label_task,
        cu_seqlens=np.array(borders, np.int32),
        pixel_values=pixel_values,
    )


def row_digest(row: PackedRow) -> bytes:
    """sha256 over the content of a row: every array with its length."""
    digest = hashlib.sha256()
    for array in (
        row.input_ids,
        row.token_kind,
        row.position_ids,
        row.labels,
        row.label_head,
        row.label_task,
        row.cu_seqlens,
        row.pixel_values,
    ):
        digest.update(array.size.to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(array).data)
    return digest.digest()


def combine_digests(digests: Sequence[bytes]) -> str:
    """One hash (hex) for the rows of a global batch.

    The digests are sorted first: which rank holds a row, and in which order ranks report, does not change a step.
    """
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()
