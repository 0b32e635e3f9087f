"""Packed rows hold their documents unchanged and keep them apart."""

from dataclasses import replace

import numpy as np
import pytest

from data_pipeline.schema import BATCH_KEYS, LabelHead, TaskId, TokenKind
from data_pipeline.stream.assemble import combine_digests, cut_document, pack, row_digest
from tests.support.hand_documents import SIDE, drawing_document, picture_document, text_document


@pytest.fixture
def documents():
    random = np.random.default_rng(0)
    return [text_document(random, 9), picture_document(random, 2), drawing_document(random), text_document(random, 1)]


def packed(documents, seq_len=64):
    return pack(documents, seq_len, pad_id=7, understanding_size=SIDE)


def test_documents_lie_side_by_side_unchanged(documents):
    row = packed(documents)
    for number, document in enumerate(documents):
        start, stop = row.cu_seqlens[number], row.cu_seqlens[number + 1]
        for name in ("input_ids", "token_kind", "labels", "label_head"):
            assert getattr(row, name)[start:stop].tolist() == getattr(document, name).tolist()
        assert row.position_ids[start:stop].tolist() == list(range(len(document.input_ids)))
        assert set(row.label_task[start:stop].tolist()) == {document.task}
    assert [image.tolist() for image in row.pixel_values] == [image.tolist() for image in documents[1].images]


def test_padding_is_a_segment_of_its_own(documents):
    row = packed(documents)
    start = sum(len(document.input_ids) for document in documents)
    assert row.cu_seqlens.tolist()[-2:] == [start, 64]
    assert set(row.token_kind[start:].tolist()) == {TokenKind.pad}
    assert set(row.input_ids[start:].tolist()) == {7}
    assert set(row.label_head[start:].tolist()) == {LabelHead.none}
    assert row.position_ids[start:].tolist() == list(range(64 - start))
    assert (row.token_kind[:start] != TokenKind.pad).all()


def test_a_full_row_has_no_padding_segment(documents):
    total = sum(len(document.input_ids) for document in documents)
    row = packed(documents, total)
    assert len(row.cu_seqlens) == len(documents) + 1
    assert row.cu_seqlens[-1] == total


def test_no_label_looks_across_a_border(documents):
    """Every label is the next token of the same segment; the last position of a segment has none."""
    row = packed(documents)
    for start, stop in zip(row.cu_seqlens[:-1], row.cu_seqlens[1:], strict=True):
        assert row.label_head[stop - 1] == LabelHead.none
        for at in range(start, stop - 1):
            if row.label_head[at] != LabelHead.none:
                assert row.labels[at] == row.input_ids[at + 1]


def test_shapes_and_dtypes_are_those_of_the_schema(documents):
    row = packed(documents)
    dtypes = {name: getattr(row, name).dtype for name in BATCH_KEYS}
    assert {name for name, dtype in dtypes.items() if dtype == np.int32} == {
        "input_ids",
        "position_ids",
        "labels",
        "cu_seqlens",
    }
    assert all(dtype == np.uint8 for name, dtype in dtypes.items() if dtype != np.int32)
    assert packed(documents[:1]).pixel_values.shape == (0, 3, SIDE, SIDE)


def test_too_many_documents_are_refused(documents):
    with pytest.raises(ValueError, match="do not fit into a row of 20 tokens"):
        packed(documents, 20)


def test_pieces_of_a_text_cover_it_and_predict_nothing_beyond_themselves():
    document = text_document(np.random.default_rng(0), 25)
    pieces = [cut_document(document, start, min(start + 10, 25)) for start in (0, 10, 20)]
    assert np.concatenate([piece.input_ids for piece in pieces]).tolist() == document.input_ids.tolist()
    row = packed(pieces)
    assert [row.label_head[stop - 1] for stop in (10, 20, 25)] == [LabelHead.none] * 3
    assert (row.label_head[:25] != LabelHead.none).sum() == 25 - 3
    assert document.label_head[9] == LabelHead.text, "the document itself must stay as it was"
    assert cut_document(document, 0, 25) is document


@pytest.mark.parametrize(
    "field", ["input_ids", "token_kind", "position_ids", "labels", "label_head", "label_task", "pixel_values"]
)
def test_the_digest_sees_every_array(documents, field):
    row = packed(documents)
    changed = getattr(row, field).copy()
    changed.reshape(-1)[0] += 1
    assert row_digest(replace(row, **{field: changed})) != row_digest(row)
    assert row_digest(replace(row, **{field: getattr(row, field).copy()})) == row_digest(row)


def test_the_digest_sees_borders(documents):
    row = packed(documents)
    assert row_digest(replace(row, cu_seqlens=np.delete(row.cu_seqlens, 1))) != row_digest(row)


def test_combined_digests_forget_the_order_and_nothing_else(documents):
    one, two, three = (row_digest(packed(documents[:count])) for count in (1, 2, 3))
    assert combine_digests([one, two]) == combine_digests([two, one])
    assert combine_digests([one, two]) != combine_digests([one, three])
    assert combine_digests([one, one]) != combine_digests([one])


def test_task_ids_follow_the_documents(documents):
    row = packed(documents)
    labelled = row.label_head != LabelHead.none
    assert set(row.label_task[labelled & (row.label_head == LabelHead.image)].tolist()) == {TaskId.generation}
