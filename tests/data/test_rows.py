"""From shards to rows: what the plan promised is what is read."""

import pickle
import subprocess
import sys

import numpy as np
import pytest

from data_pipeline.errors import UserError
from data_pipeline.plan.report import describe_plan
from data_pipeline.schema import BATCH_KEYS, LabelHead, TaskId, TokenKind
from data_pipeline.spec import SourceSpec, Task
from data_pipeline.stream.assemble import row_digest
from data_pipeline.stream.collate import split, to_batch
from data_pipeline.stream.dataset import RowDataset
from data_pipeline.stream.read import SampleReader
from tests.support.plain_rows import plain_row
from tests.support.shards import make_shards

NUM_ROWS = 160


def drawings_of(dataset, num_rows):
    """(planned document, its input ids) of every drawing in the first rows."""
    number = next(n for n, source in enumerate(dataset.data.plan.sources) if source.task is Task.generation)
    for row_no in range(num_rows):
        row, planned = dataset[row_no], dataset.data.plan.row(row_no)
        for at, document in enumerate(planned):
            if document.source_no == number:
                yield document, row.input_ids[row.cu_seqlens[at] : row.cu_seqlens[at + 1]]


def test_every_document_has_the_planned_length(shards):
    dataset = RowDataset(shards.open())
    for row_no in range(NUM_ROWS):
        row, planned = dataset[row_no], dataset.data.plan.row(row_no)
        lengths = [document.stop - document.start for document in planned]
        assert np.diff(row.cu_seqlens).tolist()[: len(lengths)] == lengths
        assert (row.token_kind == TokenKind.pad).sum() == 192 - sum(lengths)


def test_every_image_of_a_row_fills_one_run(shards):
    dataset = RowDataset(shards.open())
    assert sum(len(dataset[row_no].pixel_values) for row_no in range(NUM_ROWS)) > 50
    for row_no in range(NUM_ROWS):
        row = dataset[row_no]
        images = (row.token_kind == TokenKind.image_und).sum() / 16
        assert images == len(row.pixel_values) == dataset.data.plan.num_images(row_no // 8)[row_no % 8]


def test_no_label_leaks_over_a_border_and_tasks_keep_their_head(shards):
    dataset = RowDataset(shards.open())
    for row_no in range(NUM_ROWS):
        row = dataset[row_no]
        labelled = np.flatnonzero(row.label_head != LabelHead.none)
        assert not np.isin(labelled + 1, row.cu_seqlens).any()
        assert (row.labels[labelled] == row.input_ids[labelled + 1]).all()
        drawn = row.label_head == LabelHead.image
        assert (row.label_task[drawn] == TaskId.generation).all()
        assert (row.token_kind[np.flatnonzero(drawn) + 1] == TokenKind.image_gen).all()


def test_a_long_text_is_read_in_pieces_that_make_it_whole(shards):
    dataset = RowDataset(shards.open())
    number = next(n for n, source in enumerate(dataset.data.plan.sources) if source.name == "text")
    pieces = {}
    for row_no in range(NUM_ROWS):
        row = dataset[row_no]
        for at, document in enumerate(dataset.data.plan.row(row_no)):
            if (document.source_no, document.sample_no, document.epoch) == (number, 0, 0):
                pieces[document.start] = row.input_ids[row.cu_seqlens[at] : row.cu_seqlens[at + 1]]
    assert len(pieces) > 3
    sample = dataset.builder.documents.readers[number].read(0)
    whole = np.concatenate([pieces[start] for start in sorted(pieces)])
    ids = dataset.data.builder.ids
    assert whole.tolist() == [ids.bos, *sample.segments[0].text_ids.tolist(), ids.eos]


def test_guidance_dropout_hides_the_prompt_of_its_share(shards):
    dataset = RowDataset(shards.open())
    ids = dataset.data.builder.ids
    dropped, by_sample = [], {}
    for document, tokens in drawings_of(dataset, NUM_ROWS):
        boi = tokens.tolist().index(ids.begin_of_image)
        is_dropped = bool((tokens[1:boi] == ids.pad).all())
        assert is_dropped or not (tokens[1:boi] == ids.pad).any()
        assert is_dropped == dataset.drops_prompt(document)
        assert tokens[0] == ids.bos
        dropped.append(is_dropped)
        by_sample.setdefault(document.sample_no, set()).add(is_dropped)
    assert np.mean(dropped) == pytest.approx(0.3, abs=0.06)
    assert sum(len(seen) == 2 for seen in by_sample.values()) > 30, "every epoch must decide anew"


def test_no_dropout_drops_nothing(shards):
    dataset = RowDataset(shards.open(guidance_dropout=0.0))
    pad = dataset.data.builder.ids.pad
    assert not any(tokens[1] == pad for _, tokens in drawings_of(dataset, NUM_ROWS))


def assert_plain(data, rows_at_once):
    """Bit for bit: pieces of long texts, questions with pictures, drawings with and without their prompt, padding."""
    dataset = RowDataset(data)
    for first in range(0, NUM_ROWS // 2, rows_at_once):
        numbers = [NUM_ROWS // 2 - 1 - first - k for k in range(rows_at_once)]
        rows = split(to_batch(dataset.micro_batch(numbers).arrays))
        for row, expected in zip(rows, (plain_row(data, number) for number in numbers), strict=True):
            for name in BATCH_KEYS:
                found, wanted = getattr(row, name), getattr(expected, name)
                assert found.dtype == wanted.dtype and np.array_equal(found, wanted), name


@pytest.mark.parametrize("rows_at_once", [1, 5])
@pytest.mark.parametrize("seed", [0, 1])
def test_rows_are_what_plain_documents_make(shards, seed, rows_at_once):
    assert_plain(shards.open(seed=seed), rows_at_once)


@pytest.mark.parametrize(("token_dtype", "num_variants"), [("<u4", 1), ("<u2", 3), ("<u4", 3)])
def test_large_vocabularies_and_several_crops_make_plain_rows_too(tmp_path, token_dtype, num_variants):
    data = make_shards(tmp_path, 20, token_dtype, num_variants).open()
    assert_plain(data, 5)


def test_every_crop_of_a_picture_is_drawn_as_often(tmp_path):
    dataset = RowDataset(make_shards(tmp_path, 20, num_variants=3).open(guidance_dropout=0.0))
    source = next(source for source in dataset.data.sources if source.kind == "t2i")
    reader = SampleReader(source, dataset.data.spec.geometry)
    crops = {i: [reader.read(i, variant).image_ids.tolist() for variant in range(3)] for i in range(20)}
    drawn = [
        crops[document.sample_no].index(tokens[-17:-1].tolist()) for document, tokens in drawings_of(dataset, NUM_ROWS)
    ]
    assert np.bincount(drawn, minlength=3) / len(drawn) == pytest.approx(np.full(3, 1 / 3), abs=0.06)


def test_cache_and_pickling_change_nothing(shards):
    cached, bare = RowDataset(shards.open()), RowDataset(shards.open(cache_mib=0))
    assert cached.data.plan.digest == bare.data.plan.digest
    assert len(pickle.dumps(cached)) < 100_000
    for row_no in (*range(40), 3, 77, 12):
        digest = row_digest(cached[row_no])
        assert row_digest(bare[row_no]) == digest
    copy = pickle.loads(pickle.dumps(cached))
    assert [row_digest(copy[row_no]) for row_no in (77, 3)] == [row_digest(bare[row_no]) for row_no in (77, 3)]
    assert cached.builder.documents.cache
    assert not bare.builder.documents.cache
    assert not pickle.loads(pickle.dumps(cached)).builder.documents.cache
    assert len(pickle.dumps(cached)) < 100_000, "what grows while rows are read must not travel"


def test_the_cache_stays_within_its_budget(tmp_path):
    """One MiB holds the pictures here, none holds nothing; what is held is counted against what was promised."""
    shards = make_shards(tmp_path, num_samples=30)
    dataset = RowDataset(shards.open(cache_mib=1))
    for row_no in range(NUM_ROWS):
        _ = dataset[row_no]
    documents = dataset.builder.documents.cache.values()
    held = sum(
        sum(array.nbytes for array in (d.input_ids, d.token_kind, d.labels, d.label_head, *d.images)) + 1500
        for d in documents
    )
    assert len(documents) == 30
    assert 0 < held <= 1 << 20


def test_rows_change_with_the_seed(shards):
    one, two = RowDataset(shards.open()), RowDataset(shards.open(seed=1))
    assert one.step_hash(0) != two.step_hash(0)
    assert one.data.plan.digest != two.data.plan.digest


def test_rows_are_read_where_torch_is_not_installed():
    program = "import sys; sys.modules['torch'] = None; import data_pipeline.stream.dataset"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_describe_plan_opens_the_sources(shards):
    report = describe_plan(shards.spec, shards.tokenizer, global_batch_size=8, num_steps=12, dp_size=2)
    assert report.digest == shards.open().plan.digest
    assert [source.name for source in report.sources] == ["drawings", "questions", "text"]
    assert report.padding_fraction < 0.03


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": Task.text}, r"data.sources.drawings.task=text: .* is of kind t2i, which feeds generation"),
        ({"path": "nowhere"}, "nowhere"),
    ],
)
def test_a_wrong_source_is_refused_in_one_line(shards, change, message):
    spec = {"path": shards.spec.sources["drawings"].path, "task": Task.generation, **change}
    with pytest.raises(UserError, match=message) as caught:
        shards.open(sources={**shards.spec.sources, "drawings": SourceSpec(**spec)})
    assert "\n" not in str(caught.value)


def test_a_document_longer_than_a_row_is_refused_by_name(shards):
    with pytest.raises(UserError, match=r"source 'questions' .* is a document of 6\d tokens .* data.seq_len to 6\d"):
        shards.open(seq_len=60)


def test_a_source_without_weight_is_not_even_opened(shards):
    sources = {**shards.spec.sources, "ghost": SourceSpec(path="nowhere", weight=0)}
    assert shards.open(sources=sources).plan.digest == shards.open().plan.digest
