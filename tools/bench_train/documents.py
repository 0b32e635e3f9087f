"""Documents made from a seed, and the ways to lay them out: packed rows (ours) and padded batches (theirs)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipeline.schema import LabelHead, TaskId, TokenKind
from janus_mega.config import derive
from janus_mega.config.schema import ModelConfig

TASK_SHARES = (0.5, 0.2, 0.3)
"""Text, understanding, generation; Janus-Pro's stage II is 5 : 2 : 3 in tokens, this is in documents."""
TEXT_MEDIAN, TEXT_SPREAD = 0.08, 0.9
"""Lengths of texts: log-normal around this share of a row."""


@dataclass(frozen=True)
class MadeDocument:
    """One document; tensors over its positions."""

    input_ids: Tensor
    token_kind: Tensor
    labels: Tensor
    label_head: Tensor
    label_task: Tensor
    pixels: Tensor
    """uint8 [images, 3, H, W]."""

    def __len__(self) -> int:
        return len(self.input_ids)


def make_documents(model: ModelConfig, seq_len: int, num_tokens: int, seed: int) -> list[MadeDocument]:
    """Documents of about `num_tokens` tokens in all, none longer than a row."""
    generator = torch.Generator().manual_seed(seed)
    found: list[MadeDocument] = []
    while sum(map(len, found)) < num_tokens:
        task = TaskId(int(torch.multinomial(torch.tensor(TASK_SHARES), 1, generator=generator)))
        spread = torch.randn(1, generator=generator).mul(TEXT_SPREAD).exp().item()
        text_len = max(8, int(TEXT_MEDIAN * seq_len * spread))
        found.append(_document(model, task, text_len, seq_len, generator))
    return found


def _document(
    model: ModelConfig, task: TaskId, text_len: int, seq_len: int, generator: torch.Generator
) -> MadeDocument:
    """Understanding: image, then text. Generation: a short prompt, then image ids."""
    patches, codes = derive.understanding_tokens(model.understanding), derive.generation_tokens(model.image_tokenizer)
    extra = {TaskId.text: 0, TaskId.understanding: patches, TaskId.generation: codes}[task]
    text_len = min(text_len, seq_len - extra, 24 if task is TaskId.generation else seq_len)
    length = text_len + extra
    ids = torch.randint(3, model.backbone.vocab_size, (length,), generator=generator)
    kind = torch.full((length,), int(TokenKind.text), dtype=torch.uint8)
    head = torch.zeros(length, dtype=torch.uint8)
    pixels = torch.zeros((0, 3, model.understanding.image_size, model.understanding.image_size), dtype=torch.uint8)
    if task is TaskId.generation:
        kind[text_len:] = int(TokenKind.image_gen)
        ids[text_len:] %= model.image_tokenizer.codebook_size
        head[text_len - 1 : -1] = int(LabelHead.image)
    else:
        first = 1 + patches if task is TaskId.understanding else 0
        head[first:-1] = int(LabelHead.text)
        if task is TaskId.understanding:
            kind[1 : 1 + patches] = int(TokenKind.image_und)
            pixels = torch.randint(0, 256, (1, *pixels.shape[1:]), generator=generator, dtype=torch.uint8)
    labels = torch.where(head != 0, ids.roll(-1), 0)
    return MadeDocument(ids, kind, labels, head, torch.where(head != 0, int(task), 0).to(torch.uint8), pixels)


def pack(documents: Sequence[MadeDocument], seq_len: int) -> list[list[MadeDocument]]:
    """Rows by first fit, longest first."""
    rows: list[list[MadeDocument]] = []
    for document in sorted(documents, key=len, reverse=True):
        room = (row for row in rows if sum(map(len, row)) + len(document) <= seq_len)
        row = next(room, None)
        if row is None:
            rows.append(row := [])
        row.append(document)
    return rows


def packed_batch(rows: Sequence[Sequence[MadeDocument]], seq_len: int) -> dict[str, Tensor]:
    """A Batch (data_pipeline.schema.BATCH_KEYS) of packed rows; padding is a segment of its own."""
    columns: dict[str, list[Tensor]] = {}
    borders = [0]
    for number, row in enumerate(rows):
        lengths = [len(document) for document in row]
        padding = seq_len - sum(lengths)
        for name in ("input_ids", "token_kind", "labels", "label_head", "label_task"):
            parts = [getattr(document, name) for document in row]
            fill = int(TokenKind.pad) if name == "token_kind" else 0
            columns.setdefault(name, []).append(torch.cat([*parts, parts[0].new_full((padding,), fill)]))
        segments = [*lengths, padding] if padding else lengths
        columns.setdefault("position_ids", []).append(torch.cat([torch.arange(length) for length in segments]))
        borders += [number * seq_len + end for end in torch.tensor(segments).cumsum(0).tolist()]
    batch = {name: torch.stack(parts) for name, parts in columns.items()}
    batch["cu_seqlens"] = torch.tensor(borders, dtype=torch.int32)
    batch["pixel_values"] = torch.cat([document.pixels for row in rows for document in row])
    return batch


def padded_batch(documents: Sequence[MadeDocument]) -> dict[str, Tensor]:
    """Documents below each other, padded at the end to the longest; `attention_mask` as transformers takes it."""
    batch = packed_batch([[document] for document in documents], max(map(len, documents)))
    batch["attention_mask"] = (batch["token_kind"] != int(TokenKind.pad)).long()
    return batch


def bucketed(documents: Sequence[MadeDocument], max_tokens: int) -> list[list[MadeDocument]]:
    """Batches of like lengths, each of at most `max_tokens` with padding."""
    batches: list[list[MadeDocument]] = []
    for document in sorted(documents, key=len, reverse=True):
        if not batches or (len(batches[-1]) + 1) * len(batches[-1][0]) > max_tokens:
            batches.append([])
        batches[-1].append(document)
    return batches


def in_order(documents: Sequence[MadeDocument], per_batch: int) -> list[list[MadeDocument]]:
    """Batches as a shuffled loader yields them: a fixed number of documents, whatever their lengths."""
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(0)).tolist()
    return [[documents[i] for i in order[at : at + per_batch]] for at in range(0, len(order), per_batch)]
