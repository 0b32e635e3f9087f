"""Batches hold their rows and can be taken apart again."""

import pickle

import numpy as np
import pytest
import torch

from data_pipeline.schema import BATCH_KEYS
from data_pipeline.stream.assemble import pack, row_digest
from data_pipeline.stream.collate import collate, from_parcel, split, to_parcel
from tests.support.hand_documents import SIDE, drawing_document, picture_document, text_document


def rows():
    random = np.random.default_rng(0)
    contents = [
        [picture_document(random, 2), text_document(random, 5), picture_document(random)],
        [text_document(random, 40)],
        [drawing_document(random)],
        [picture_document(random), drawing_document(random), picture_document(random, 2)],
    ]
    return [pack(documents, 40, pad_id=7, understanding_size=SIDE) for documents in contents]


def test_keys_shapes_and_dtypes():
    batch = collate(rows())
    assert tuple(batch) == BATCH_KEYS
    for key in ("input_ids", "position_ids", "labels"):
        assert batch[key].dtype == torch.int32
        assert batch[key].shape == (4, 40)
    for key in ("token_kind", "label_head", "label_task"):
        assert batch[key].dtype == torch.uint8
        assert batch[key].shape == (4, 40)
    assert batch["cu_seqlens"].dtype == torch.int32
    assert batch["pixel_values"].dtype == torch.uint8
    assert batch["pixel_values"].shape == (6, 3, SIDE, SIDE)


def test_segments_count_through_all_rows():
    packed = rows()
    borders = collate(packed)["cu_seqlens"]
    expected = [0]
    for number, row in enumerate(packed):
        expected += (row.cu_seqlens[1:] + 40 * number).tolist()
    assert borders.tolist() == expected
    assert (borders.diff() > 0).all()


def test_a_batch_comes_apart_into_its_rows():
    packed = rows()
    assert [row_digest(row) for row in split(collate(packed))] == [row_digest(row) for row in packed]


def test_a_batch_without_images_keeps_their_shape():
    assert collate(rows()[1:3])["pixel_values"].shape == (0, 3, SIDE, SIDE)


@pytest.mark.parametrize("chosen", [slice(0, 4), slice(1, 3)])
def test_a_parcel_holds_its_batch(chosen):
    """With pictures and without."""
    batch = collate(rows()[chosen])
    parcel = to_parcel({key: value.numpy() for key, value in batch.items()})
    found = from_parcel(pickle.loads(pickle.dumps(parcel)))
    assert tuple(found) == BATCH_KEYS
    for key in BATCH_KEYS:
        assert found[key].dtype == batch[key].dtype and torch.equal(found[key], batch[key])
