"""A micro-batch as the model wants it: flat positions per pathway and per task, on the rank's device.

Everything data-dependent (which positions hold what) is computed here on the CPU, so that the forward pass neither
inspects values nor synchronises. Flat positions are sequence-first: position * b + row.

Shapes: `s` seq_len, `b` rows, `m` understanding images, `p` their tokens, `g` drawn-image tokens, `n` labels of a task.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipeline.schema import LabelHead, TaskId, TokenKind
from janus_mega.models.attention import DocumentSpans, document_spans

TASKS = tuple(task.name for task in TaskId)
"""Names of the tasks whose losses are kept apart, in the order of loss vectors."""


@dataclass(frozen=True, slots=True)
class PlacedBatch:
    """What every pipeline rank needs of a micro-batch; tensors lie on the rank's device."""

    text_ids: Tensor
    """int64 [s, b]; 0 where an image lies."""
    position_ids: Tensor
    """int64 [s, b]."""
    documents: DocumentSpans
    pixel_values: Tensor
    """uint8 [m, 3, H, W]."""
    understanding_index: Tensor
    """int64 [m * p] flat positions of understood images, image after image."""
    generation_index: Tensor
    """int64 [g] flat positions of drawn-image tokens."""
    generation_ids: Tensor
    """int64 [g]."""
    label_index: tuple[Tensor, ...]
    """Per task, int64 [n]: flat positions that are scored."""
    labels: tuple[Tensor, ...]
    """Per task, int64 [n]: the id each of them must predict."""
    understanding_features: Tensor | None = None
    """[m, p, e]: what the frozen understanding encoder makes of `pixel_values`, where it ran ahead."""


def place_batch(batch: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype = torch.float32) -> PlacedBatch:
    """Turns a Batch (data_pipeline.schema.BATCH_KEYS, on the CPU) into a PlacedBatch on `device`.

    Ids travel in 32 bits and are widened there, because indexing wants 64. `dtype` is what the layers compute in: it
    decides which attention the documents are prepared for.
    """
    num_rows, seq_len = batch["input_ids"].shape
    kind, head, task = (batch[key].flatten() for key in ("token_kind", "label_head", "label_task"))
    input_ids, labels = batch["input_ids"].flatten(), batch["labels"].flatten()
    is_image = (kind == TokenKind.image_und) | (kind == TokenKind.image_gen)

    def flat(row_first: Tensor) -> Tensor:
        return (row_first % seq_len * num_rows + row_first // seq_len).to(device, non_blocking=True)

    def widened(values: Tensor) -> Tensor:
        return values.to(device, non_blocking=True).long()

    generated = torch.nonzero(kind == TokenKind.image_gen).squeeze(1)
    scored = [torch.nonzero((head != LabelHead.none) & (task == t)).squeeze(1) for t in TaskId]
    text_ids = torch.where(is_image, 0, input_ids).view(num_rows, seq_len).t().contiguous()
    return PlacedBatch(
        text_ids=widened(text_ids),
        position_ids=widened(batch["position_ids"].t().contiguous()),
        documents=document_spans(batch["cu_seqlens"], num_rows, seq_len, device, dtype),
        pixel_values=batch["pixel_values"].to(device, non_blocking=True),
        understanding_index=flat(torch.nonzero(kind == TokenKind.image_und).squeeze(1)),
        generation_index=flat(generated),
        generation_ids=widened(input_ids[generated]),
        label_index=tuple(flat(positions) for positions in scored),
        labels=tuple(widened(labels[positions]) for positions in scored),
    )


def count_labels(batch: Mapping[str, Tensor]) -> Tensor:
    """int64 [tasks]: labelled positions of a Batch per task."""
    is_scored = batch["label_head"] != LabelHead.none
    return torch.bincount(batch["label_task"][is_scored].flatten().long(), minlength=len(TASKS))
