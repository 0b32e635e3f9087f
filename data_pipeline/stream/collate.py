"""Packed rows <-> a Batch: the dict of torch tensors that a model takes, keys as in `schema.BATCH_KEYS`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data_pipeline.schema import BATCH_KEYS, PackedRow, TokenKind


def to_batch(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """The arrays of a micro-batch (`canvas.Rows`) as tensors over the same memory."""
    return {key: torch.from_numpy(arrays[key]) for key in BATCH_KEYS}


@dataclass(frozen=True, slots=True)
class Parcel:
    """A Batch on its way from a worker process: one tensor, because each costs a file descriptor and a tenth of a
    millisecond in the process that trains."""

    content: Tensor
    """uint8, all arrays one after the other, those of four bytes first."""
    shapes: tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]
    """Key, dtype and shape of each."""


def to_parcel(arrays: Mapping[str, np.ndarray]) -> Parcel:
    """The arrays of a micro-batch as one tensor."""
    batch = to_batch(arrays)
    ordered = sorted(batch.items(), key=lambda item: -item[1].element_size())
    content = torch.cat([tensor.reshape(-1).view(torch.uint8) for _, tensor in ordered])
    return Parcel(content, tuple((key, tensor.dtype, tuple(tensor.shape)) for key, tensor in ordered))


def from_parcel(parcel: Parcel) -> dict[str, Tensor]:
    """The Batch, as views of the one tensor."""
    batch, start = {}, 0
    for key, dtype, shape in parcel.shapes:
        stop = start + math.prod(shape) * dtype.itemsize
        batch[key] = parcel.content[start:stop].view(dtype).view(shape)
        start = stop
    return {key: batch[key] for key in BATCH_KEYS}


def collate(rows: Sequence[PackedRow]) -> dict[str, Tensor]:
    """Stacks rows that were built one by one into a Batch; the loader builds whole micro-batches instead.

    Returns:
        [b, s]: input_ids, position_ids, labels int32; token_kind, label_head, label_task uint8. cu_seqlens int32
        [d + 1] over the flattened rows. pixel_values uint8 [m, 3, side, side].
    """
    arrays: dict[str, np.ndarray] = {}
    for key in BATCH_KEYS:
        of_rows = [getattr(row, key) for row in rows]
        if key == "cu_seqlens":
            arrays[key] = _join_borders(of_rows)
        elif key == "pixel_values":
            arrays[key] = np.concatenate(of_rows)
        else:
            arrays[key] = np.stack(of_rows)
    return to_batch(arrays)


def _join_borders(borders: Sequence[np.ndarray]) -> np.ndarray:
    """int32 [d + 1]: the segments of all rows, counted through."""
    joined, offset = [np.zeros(1, np.int32)], 0
    for row in borders:
        joined.append(row[1:] + np.int32(offset))
        offset += int(row[-1])
    return np.concatenate(joined)


def split(batch: Mapping[str, Tensor]) -> list[PackedRow]:
    """The rows that a Batch was made of."""
    arrays = {key: batch[key].cpu().numpy() for key in BATCH_KEYS}
    num_rows, seq_len = arrays["input_ids"].shape
    first_image = _first_images(arrays["token_kind"])
    rows = []
    for number in range(num_rows):
        start, stop = number * seq_len, (number + 1) * seq_len
        borders = arrays["cu_seqlens"]
        borders = borders[(borders >= start) & (borders <= stop)] - start
        fields = {key: arrays[key][number] for key in BATCH_KEYS if key not in ("cu_seqlens", "pixel_values")}
        images = arrays["pixel_values"][first_image[number] : first_image[number + 1]]
        rows.append(PackedRow(**fields, cu_seqlens=borders.astype(np.int32), pixel_values=images))
    return rows


def _first_images(token_kind: np.ndarray) -> np.ndarray:
    """int64 [b + 1]: number of the first image of each row; an image is one run of image_und tokens."""
    is_image = token_kind == TokenKind.image_und
    begins = is_image.copy()
    begins[:, 1:] &= ~is_image[:, :-1]
    return np.concatenate([[0], np.cumsum(begins.sum(axis=1))])
