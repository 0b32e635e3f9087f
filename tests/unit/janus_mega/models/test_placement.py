"""Batches as the model wants them: flat sequence-first positions, ids and labels where they belong."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline.schema import LabelHead, TaskId, TokenKind
from janus_mega.config.schema import ParallelConfig, Precision
from janus_mega.models import attention
from janus_mega.models.placement import TASKS, count_labels, place_batch
from janus_mega.train.janus import JanusWorkload
from tests.support.tiny import batch_of

CPU = torch.device("cpu")


def hand_batch() -> dict[str, Tensor]:
    """Two rows of six tokens: text, one understood image of two tokens, one drawn image of two; padding."""
    text, seen, drawn, pad = (int(kind) for kind in (*list(TokenKind)[:3], TokenKind.pad))
    return {
        "input_ids": torch.tensor([[5, 9, 9, 6, 7, 8], [1, 40, 41, 2, 0, 0]]),
        "token_kind": torch.tensor(
            [[text, seen, seen, text, text, text], [text, drawn, drawn, text, pad, pad]], dtype=torch.uint8
        ),
        "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 0, 1]]),
        "labels": torch.tensor([[0, 0, 0, 77, 8, 0], [40, 41, 0, 0, 0, 0]]),
        "label_head": torch.tensor([[0, 0, 0, 1, 1, 0], [2, 2, 0, 0, 0, 0]], dtype=torch.uint8),
        "label_task": torch.tensor([[0, 0, 0, 1, 0, 0], [2, 2, 0, 0, 0, 0]], dtype=torch.uint8),
        "cu_seqlens": torch.tensor([0, 4, 6, 10, 12], dtype=torch.int32),
        "pixel_values": torch.zeros(1, 3, 4, 4, dtype=torch.uint8),
    }


def test_positions_are_sequence_first() -> None:
    placed = place_batch(hand_batch(), CPU)
    assert placed.understanding_index.tolist() == [2, 4]  # row 0, positions 1 and 2; two rows
    assert placed.generation_index.tolist() == [3, 5]  # row 1, positions 1 and 2
    assert placed.generation_ids.tolist() == [40, 41]


def test_image_positions_hold_text_id_zero() -> None:
    placed = place_batch(hand_batch(), CPU)
    assert placed.text_ids.tolist() == [[5, 1], [0, 0], [0, 0], [6, 2], [7, 0], [8, 0]]
    assert placed.position_ids[:, 0].tolist() == [0, 1, 2, 3, 0, 1]


def test_ids_that_travel_in_32_bits_arrive_in_64() -> None:
    batch = hand_batch()
    narrow = {key: value.int() if value.dtype == torch.int64 else value for key, value in batch.items()}
    placed, expected = place_batch(narrow, CPU), place_batch(batch, CPU)
    for name in ("text_ids", "position_ids", "generation_ids"):
        assert getattr(placed, name).dtype == torch.int64
        assert torch.equal(getattr(placed, name), getattr(expected, name))
    assert all(
        torch.equal(a, b) and a.dtype == torch.int64 for a, b in zip(placed.labels, expected.labels, strict=True)
    )


@pytest.mark.parametrize("precision", Precision)
def test_documents_are_prepared_for_the_precision_of_the_run(
    precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "has_flash", lambda device, dtype: dtype == torch.bfloat16)
    workload: Any = SimpleNamespace(config=SimpleNamespace(parallel=ParallelConfig(precision=precision)))
    groups: Any = SimpleNamespace(device=CPU)
    documents = JanusWorkload.place(workload, hand_batch(), groups).documents
    assert (documents.cu_seqlens_q is None) == (documents.unbucket is not None) == (precision is Precision.fp32)


def test_labels_by_task() -> None:
    placed = place_batch(hand_batch(), CPU)
    found = [(index.tolist(), labels.tolist()) for index, labels in zip(placed.label_index, placed.labels, strict=True)]
    assert found == [([8], [8]), ([6], [77]), ([1, 3], [40, 41])]


def test_counts_by_task() -> None:
    assert TASKS == ("text", "understanding", "generation")
    assert count_labels(hand_batch()).tolist() == [1, 1, 2]
    empty = hand_batch() | {"label_head": torch.zeros(2, 6, dtype=torch.uint8)}
    assert count_labels(empty).tolist() == [0, 0, 0]


def test_counts_are_those_that_are_placed() -> None:
    batch = batch_of(["ugtu", "tgt"])
    placed = place_batch(batch, CPU)
    assert [len(labels) for labels in placed.labels] == count_labels(batch).tolist()
    for task, head in ((TaskId.text, LabelHead.text), (TaskId.generation, LabelHead.image)):
        rows_first = placed.label_index[task] % 2 * batch["labels"].shape[1] + placed.label_index[task] // 2
        assert (batch["label_head"].flatten()[rows_first] == head).all()
        assert torch.equal(batch["labels"].flatten()[rows_first], placed.labels[task])


def test_every_position_reads_one_source() -> None:
    batch = batch_of(["ugtu", "tgt"])
    placed = place_batch(batch, CPU)
    images = torch.cat((placed.understanding_index, placed.generation_index))
    assert len(images.unique()) == len(images)
    assert (placed.text_ids.flatten()[images] == 0).all()
    assert len(placed.understanding_index) == 16 * len(batch["pixel_values"])
