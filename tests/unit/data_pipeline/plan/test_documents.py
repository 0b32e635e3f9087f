"""Documents of a source and their endless stream."""

import pickle
from dataclasses import replace

import numpy as np
import pytest

from data_pipeline.errors import UserError
from data_pipeline.plan.documents import DocumentStream, documents_of
from data_pipeline.spec import Captions, Task
from tests.support.histograms import source


def test_short_samples_are_documents_as_they_are():
    table = documents_of(source("text", Task.text, 1, [3, 256, 7], can_cut=True), 256)
    assert table.sample is None
    assert table.length.tolist() == [3, 256, 7]


def test_long_text_is_cut_into_pieces_that_cover_it():
    lengths = [3, 600, 256, 257, 512]
    table = documents_of(source("text", Task.text, 1, lengths, can_cut=True), 256)
    for sample, length in enumerate(lengths):
        mine = table.sample == sample
        covered = [
            token
            for start, size in zip(table.start[mine].tolist(), table.length[mine].tolist(), strict=True)
            for token in range(start, start + size)
        ]
        assert covered == list(range(length))
    assert table.length.max() <= 256


@pytest.mark.parametrize("task", [Task.understanding, Task.generation])
def test_nothing_else_is_cut(task):
    with pytest.raises(UserError, match=r"source 'pictures': sample 1 is a document of 300 tokens .* to 300 or more"):
        documents_of(source("pictures", task, 1, [20, 300]), 256)


def test_an_empty_document_is_refused():
    with pytest.raises(UserError, match="sample 1 has 0 tokens"):
        documents_of(source("text", Task.text, 1, [5, 0, 6]), 256)


@pytest.mark.parametrize("step", [1, 7, 100, 250])
def test_a_stream_gives_every_document_once_per_epoch_however_it_is_read(step):
    table = documents_of(source("text", Task.text, 1, np.arange(1, 101), can_cut=True), 256)
    stream = DocumentStream("text", table, seed=3)
    chunks = [stream.read(first, step) for first in range(0, 3 * 700, step)]
    documents = np.concatenate([chunk.document for chunk in chunks])[:2100]
    epochs = np.concatenate([chunk.epoch for chunk in chunks])[:2100]
    for epoch in range(21):
        assert sorted(documents[epochs == epoch].tolist()) == list(range(100))
    assert epochs.tolist() == sorted(epochs.tolist())
    lengths = np.concatenate([chunk.length for chunk in chunks])[:2100]
    assert (lengths == table.length[documents]).all()
    assert documents[:100].tolist() != documents[100:200].tolist()


def test_streams_differ_by_name_and_seed_and_survive_pickling():
    table = documents_of(source("text", Task.text, 1, np.arange(1, 101)), 256)
    stream = DocumentStream("a", table, seed=3)
    assert stream.read(0, 100).document.tolist() != DocumentStream("b", table, seed=3).read(0, 100).document.tolist()
    assert stream.read(0, 100).document.tolist() != DocumentStream("a", table, seed=4).read(0, 100).document.tolist()
    copy = pickle.loads(pickle.dumps(stream))
    assert copy.read(50, 100).document.tolist() == stream.read(50, 100).document.tolist()


def masked(taken, *left_out):
    return replace(taken, left_out=np.isin(np.arange(len(taken.lengths)), left_out))


def stream_of(taken, seed=3):
    return DocumentStream(taken.name, documents_of(taken, 256), seed)


def test_what_a_mask_leaves_out_is_never_given_and_the_rest_keeps_its_order():
    whole = source("text", Task.text, 1, np.arange(1, 101))
    plain, fewer = stream_of(whole), stream_of(masked(whole, 5, 17, *range(60, 100)))
    assert fewer.size == 58
    assert fewer.longest == 60
    assert fewer.mean == pytest.approx((np.arange(1, 61).sum() - 6 - 18) / 58)
    for epoch in range(3):
        given = fewer.read(58 * epoch, 58).document.tolist()
        assert given == [number for number in plain.order(epoch).tolist() if number < 60 and number not in (5, 17)]


def test_masked_samples_may_be_too_long_or_empty():
    lengths = np.array([20, 300, 0, 40])
    with pytest.raises(UserError, match="sample 2 has 0 tokens"):
        documents_of(masked(source("pictures", Task.generation, 1, lengths), 1), 256)
    with pytest.raises(UserError, match="sample 1 is a document of 300 tokens"):
        documents_of(masked(source("pictures", Task.generation, 1, lengths), 2), 256)
    stream = stream_of(masked(source("pictures", Task.generation, 1, lengths), 1, 2))
    assert sorted(stream.read(0, 4).document.tolist()) == [0, 0, 3, 3]


def test_pieces_of_a_masked_long_text_are_left_out_with_it():
    stream = stream_of(masked(source("text", Task.text, 1, [600, 20, 520], can_cut=True), 0))
    chunk = stream.read(0, stream.size)
    assert stream.size == 4
    assert set(stream.table.sample[chunk.document].tolist()) == {1, 2}


def captioned(counts, seed=0, **fields):
    """Images with these numbers of captions; lengths tell samples apart."""
    numbers = np.concatenate([np.arange(count) for count in counts])
    uids = np.random.default_rng(seed).integers(0, 2**63, (len(counts), 2), dtype=np.uint64)
    return replace(
        source("drawings", Task.generation, 1, 10 + np.arange(len(numbers)) % 90),
        captions=Captions.one,
        caption_number=numbers.astype(np.uint8),
        uids=np.repeat(uids, counts, axis=0),
        **fields,
    )


def test_one_caption_of_every_image_in_each_epoch():
    counts = [1, 3, 2, 5] * 100
    taken = captioned(counts)
    stream = stream_of(taken)
    image = np.repeat(np.arange(400), counts)
    assert stream.size == 400
    chosen = []
    for epoch in range(40):
        chunk = stream.read(400 * epoch, 400)
        assert sorted(image[chunk.document].tolist()) == list(range(400))
        assert (chunk.length == taken.lengths[chunk.document]).all()
        chosen.append(np.sort(chunk.document))
    # Over the epochs each caption comes as often as the others of its image.
    times = np.bincount(np.concatenate(chosen), minlength=len(image))
    expected = 40 / np.repeat(counts, counts)
    assert ((times - expected) ** 2 / expected).sum() / (len(image) - 400) == pytest.approx(1, abs=0.2)
    assert chosen[0].tolist() != chosen[1].tolist()
    lengths = [taken.lengths[image == number].mean() for number in range(400)]
    assert stream.mean == pytest.approx(np.mean(lengths))


def test_a_choice_depends_on_seed_uid_and_epoch_alone():
    counts = [4] * 200
    taken = captioned(counts)
    order = {seed: stream_of(taken, seed).read(0, 400).document for seed in (3, 4)}
    assert sorted(order[3].tolist()) != sorted(order[4].tolist())
    pieces = np.concatenate([stream_of(taken).read(first, 37).document for first in range(0, 400, 37)])[:400]
    assert pieces.tolist() == order[3].tolist()
    # The same images in another place: what was chosen moves with them.
    back = replace(taken, uids=taken.uids[::-1], caption_number=taken.caption_number)
    chosen = {tuple(taken.uids[i]): i % 4 for i in order[3][:200].tolist()}
    assert {tuple(back.uids[i]): i % 4 for i in stream_of(back).read(0, 200).document.tolist()} == chosen


def test_masks_take_captions_and_whole_images():
    counts = [2, 2, 1, 3]
    stream = stream_of(masked(captioned(counts), 0, 2, 3, 7))
    assert stream.size == 3
    for epoch in range(20):
        given = set(stream.read(3 * epoch, 3).document.tolist())
        assert {1, 4} < given <= {1, 4, 5, 6}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"caption_number": None}, "captions=one needs images with captions .* data.sources.drawings.captions=all"),
        ({"caption_number": np.array([1, 0, 1])}, "its first sample is caption 1 of an image"),
    ],
)
def test_captions_that_are_not_there_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        documents_of(replace(captioned([2, 1]), **fields), 256)


def test_limits_of_documents_are_what_was_written():
    stream = stream_of(source("text", Task.text, 1, [5] * 100))
    assert [stream.limit(epochs) for epochs in (0.29, 0.57, 1.0, 1.1, 2.5, 3)] == [29, 57, 100, 110, 250, 300]
