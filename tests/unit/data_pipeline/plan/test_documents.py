"""Documents of a source and their endless stream."""

import pickle

import numpy as np
import pytest

from data_pipeline.errors import UserError
from data_pipeline.plan.documents import DocumentStream, documents_of
from data_pipeline.spec import Task
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
