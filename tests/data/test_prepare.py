"""Raw data to shards and back: round trip, foreign readers, restart, rejects."""

import gc
import hashlib
import io
import json
import os
import pickle
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from data_pipeline.dialogue import DialogueBuilder, answer_text, caption_text
from data_pipeline.errors import UserError
from data_pipeline.images import decode_image, generation_view, understanding_view
from data_pipeline.manifest import open_source
from data_pipeline.prepare.interleaved import prepare_interleaved
from data_pipeline.prepare.options import OnBad, PrepareOptions
from data_pipeline.prepare.shard import ShardWriter
from data_pipeline.prepare.t2i import prepare_t2i
from data_pipeline.prepare.text import prepare_text
from data_pipeline.schema import TaskId
from data_pipeline.spec import ImageGeometry, Template
from data_pipeline.stream.read import SampleReader
from tests.support.raw import COLOURS, ColourTokenizer, train_tokenizer, write_jsonl, write_raw

GEOMETRY = ImageGeometry(
    understanding_size=16, understanding_tokens=16, generation_size=16, generation_tokens=16, codebook_size=64
)
OPTIONS = PrepareOptions(samples_per_shard=5, record_size=3, encode_batch_size=2)
KINDS = ("text", "interleaved", "t2i")
TASKS = {"text": TaskId.text, "interleaved": TaskId.understanding, "t2i": TaskId.generation}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return write_raw(tmp_path_factory.mktemp("raw"))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, raw, tokenizer):
    out = tmp_path_factory.mktemp("out")
    for kind in KINDS:
        prepare(kind, raw[kind], out / kind, tokenizer)
    return out


def prepare(kind, inputs, out, tokenizer, options=OPTIONS, progress=None):
    if kind == "text":
        return prepare_text([inputs], out, tokenizer, options=options, progress=progress)
    if kind == "interleaved":
        return prepare_interleaved([inputs], out, tokenizer, options=options, progress=progress)
    return prepare_t2i([inputs], out, tokenizer, ColourTokenizer(), options=options, progress=progress)


def records_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def files_of(directory):
    """sha256 of every file by its path below the directory."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


# ---- what went in comes out ------------------------------------------------------------------------------------------


def test_texts_round_trip(prepared, raw, tokenizer):
    source = open_source(prepared / "text")
    reader = SampleReader(source, GEOMETRY)
    texts = [tokenizer.decode(reader.read(i).segments[0].text_ids) for i in range(len(source))]
    assert texts == [record["text"] for record in records_of(raw["text"])]
    assert [entry.num_samples for entry in source.manifest.shards] == [5, 5, 2]


def test_captions_and_image_ids_round_trip(prepared, raw, tokenizer):
    source = open_source(prepared / "t2i")
    reader = SampleReader(source, GEOMETRY)
    expected = []
    for record in records_of(raw["t2i"]):
        view = generation_view(decode_image((raw["t2i"].parent / record["image"]).read_bytes()), 16)
        ids = ColourTokenizer().encode(view[None])[0].tolist()
        expected += [(caption_text(caption), ids) for caption in record["captions"]]
    samples = [reader.read(i) for i in range(len(source))]
    assert [(tokenizer.decode(sample.caption_ids), sample.image_ids.tolist()) for sample in samples] == expected
    assert len(expected) == 18 and source.num_gen_images.tolist() == [1] * 18


def test_documents_and_questions_round_trip(prepared, raw, tokenizer):
    source = open_source(prepared / "interleaved")
    reader = SampleReader(source, GEOMETRY)
    builder = DialogueBuilder(tokenizer, Template.deepseek, GEOMETRY)
    root = raw["interleaved"].parent
    for i, record in enumerate(records_of(raw["interleaved"])):
        sample = reader.read(i)
        if "question" in record:
            names = [record["image"]]
            prompt = builder.question_prompt(record["question"], 1).tolist()
            expected = prompt + tokenizer.encode(answer_text(record["answer"])) + [builder.ids.eos]
        else:
            names = [segment["image"] for segment in record["segments"] if "image" in segment]
            parts = [segment.get("text") for segment in record["segments"]]
            expected = [*builder.interleaved_prompt(parts).tolist(), builder.ids.eos]
            assert [segment.has_loss for segment in sample.segments] == [False, False, False, True]
        assert builder.build_document(sample, TaskId.understanding).input_ids.tolist() == expected
        views = [understanding_view(decode_image((root / name).read_bytes()), 16) for name in names]
        assert np.array_equal(np.stack(sample.images), np.stack(views))


@pytest.mark.parametrize("kind", KINDS)
def test_planned_lengths_are_exact(prepared, tokenizer, kind):
    source = open_source(prepared / kind)
    builder = DialogueBuilder(tokenizer, Template.deepseek, GEOMETRY)
    reader = SampleReader(source, GEOMETRY)
    built = [len(builder.build_document(reader.read(i), TASKS[kind]).input_ids) for i in range(len(source))]
    lengths = builder.document_lengths(source)
    assert lengths.tolist() == built and lengths.dtype == np.int32


@pytest.mark.parametrize("kind", KINDS)
def test_uids_are_unique_and_readers_pickle(prepared, kind):
    source = open_source(prepared / kind)
    captions = np.zeros(len(source)) if source.caption_number is None else source.caption_number
    assert len({(source.uid(i), int(captions[i])) for i in range(len(source))}) == len(source)
    reader = pickle.loads(pickle.dumps(SampleReader(source, GEOMETRY)))
    assert reader.source.digest == source.digest and reader.read(7).uid == source.uid(7)
    with pytest.raises(IndexError):
        source.uid(len(source))


def test_large_vocabularies_are_stored_in_four_bytes(tmp_path, raw, tokenizer, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "vocab_size", property(lambda _: 100_000))
    prepare("t2i", raw["t2i"], tmp_path / "out", tokenizer)
    source = open_source(tmp_path / "out")
    assert source.manifest.token_dtype == "<u4"
    assert tokenizer.decode(SampleReader(source, GEOMETRY).read(17).caption_ids) == " white, plainly"


@pytest.mark.parametrize("limit", [4, 13, 30])
def test_long_texts_are_cut_at_paragraphs_then_lines(tmp_path, tokenizer, limit):
    text = "one two\n\nthree four five\nsix seven\n\n" + "eight nine ten " * 9 + "\nend"
    path = write_jsonl(tmp_path / "r.jsonl", [{"id": "a", "text": text}, {"text": "short"}])
    options = PrepareOptions(record_size=2, max_document_tokens=limit)
    prepare("text", path, tmp_path / "out", tokenizer, options)
    source = open_source(tmp_path / "out")
    reader = SampleReader(source, GEOMETRY)
    pieces = [reader.read(i).segments[0].text_ids for i in range(len(source))]
    assert max(map(len, pieces)) <= limit < sum(map(len, pieces))
    texts = [tokenizer.decode(piece) for piece in pieces]
    assert "".join(texts) == text + "short"
    if limit >= len(tokenizer.encode("three four five\nsix seven\n\n")):
        assert texts[0].endswith("six seven\n\n"), "the border of a paragraph was not used"
    elif limit >= len(tokenizer.encode("three four five\n")):
        assert "three four five\n" in texts, "a line that fits was cut"


# ---- the tars are ordinary WebDatasets -------------------------------------------------------------------------------


def stock_samples(directory):
    urls = sorted(str(path) for path in (directory / "shards").glob("*.tar"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves the tars to the garbage collector
        samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
        gc.collect()
    return samples


def test_stock_webdataset_reads_block_records(prepared):
    source = open_source(prepared / "t2i")
    reader = SampleReader(source, GEOMETRY)
    i = 0
    for record in stock_samples(prepared / "t2i"):
        starts = [0, *record["off.npy"].tolist()]
        assert record["json"]["n"] == len(record["cap.npy"]) == len(record["uid.npy"]) <= OPTIONS.record_size
        for row, image_ids in enumerate(record["vq.npy"][record["cap.npy"]]):
            sample = reader.read(i)
            assert sample.image_ids.tolist() == image_ids.tolist()
            assert sample.caption_ids.tolist() == record["tok.npy"][starts[row] : starts[row + 1]].tolist()
            i += 1
    assert i == len(source)


def test_stock_webdataset_reads_interleaved_samples(prepared):
    source = open_source(prepared / "interleaved")
    samples = stock_samples(prepared / "interleaved")
    assert [sample["doc.json"]["uid"] for sample in samples] == [source.uid(i) for i in range(len(source))]
    for sample in samples:
        names = [part["name"] for part in sample["doc.json"]["seq"] if part["t"] == "image"]
        assert names and all(sample[name].shape[2] == 3 for name in names)
        assert len(sample["tok.npy"]) == sum(part.get("n", 0) for part in sample["doc.json"]["seq"])


@pytest.mark.parametrize("kind", KINDS)
def test_tars_are_plain_ustar_without_times_or_owners(prepared, kind):
    for path in (prepared / kind / "shards").glob("*.tar"):
        assert path.read_bytes()[257:265] == b"ustar\x0000"
        with tarfile.open(path) as tar:
            keys = [member.name.split(".")[0] for member in tar]
            assert keys == sorted(keys), "members of a sample are not contiguous"
            assert all((m.mtime, m.uid, m.gid, m.uname, m.gname) == (0, 0, 0, "", "") for m in tar.getmembers())


# ---- restart and reproduction ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_doing_it_again_gives_the_same_bytes_elsewhere(prepared, raw, tokenizer, tmp_path, kind):
    prepare(kind, raw[kind], tmp_path / "again", tokenizer)
    assert files_of(tmp_path / "again") == files_of(prepared / kind)


class Killed(BaseException):
    """Stands for a signal."""


@pytest.mark.parametrize(
    ("kind", "nth"),
    [
        *(("t2i", nth) for nth in range(1, 21)),
        *((kind, nth) for kind in ("text", "interleaved") for nth in (1, 3, 9, 17)),
    ],
)
def test_killed_at_any_rename_it_continues_to_the_same_bytes(
    prepared, raw, tokenizer, tmp_path, monkeypatch, kind, nth
):
    """Every durable effect is a rename: die before the nth one, then run again."""
    real, calls = Path.replace, []

    def dying_replace(self, target):
        calls.append(target)
        if len(calls) == nth:
            raise Killed
        return real(self, target)

    out = tmp_path / "out"
    monkeypatch.setattr(Path, "replace", dying_replace)
    try:
        prepare(kind, raw[kind], out, tokenizer)
        assert len(calls) < nth
    except Killed:
        with pytest.raises(UserError, match="continues where it stopped"):
            open_source(out)
    monkeypatch.setattr(Path, "replace", real)
    prepare(kind, raw[kind], out, tokenizer)
    assert files_of(out) == files_of(prepared / kind)


def test_finished_shards_are_not_made_again(raw, tokenizer, tmp_path, monkeypatch):
    class Second(ColourTokenizer):
        def encode(self, images):
            if self.num_encoded >= 5:
                raise KeyboardInterrupt
            return super().encode(images)

    with pytest.raises(KeyboardInterrupt):
        prepare_t2i([raw["t2i"]], tmp_path / "out", tokenizer, Second(), options=OPTIONS)
    assert not list((tmp_path / "out").rglob("*.tmp"))
    images, seen = ColourTokenizer(), []
    report = prepare_t2i(
        [raw["t2i"]],
        tmp_path / "out",
        tokenizer,
        images,
        options=OPTIONS,
        progress=lambda tally: seen.append((tally.done, tally.records)),
    )
    assert (report.num_shards_kept, report.num_shards, images.num_encoded) == (1, 3, 7)
    assert seen[0] == (5, 12) and seen[-1] == (12, 12)
    again = prepare_t2i([raw["t2i"]], tmp_path / "out", tokenizer, images, options=OPTIONS)
    assert again.num_shards_kept == 3 and images.num_encoded == 7 and again.num_samples == report.num_samples


def test_another_command_may_not_continue_in_a_directory(prepared, raw, tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"text: its shards were made with .* = .*; give a new output directory"):
        prepare("t2i", raw["t2i"], prepared / "text", tokenizer)
    with pytest.raises(UserError, match="samples_per_shard = 5, now it is 7"):
        prepare("text", raw["text"], prepared / "text", tokenizer, PrepareOptions(samples_per_shard=7, record_size=3))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        prepare("text", raw["text"], tmp_path, tokenizer)


# ---- rejects ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def spoiled(tmp_path, raw):
    """Good records with an undecodable picture, a missing one and a broken line between them."""
    root = raw["t2i"].parent
    for picture in (root / "pictures").iterdir():
        target = tmp_path / "pictures" / picture.name
        target.parent.mkdir(exist_ok=True)
        os.link(picture, target)
    good = next((tmp_path / "pictures").glob("000.*"))
    (tmp_path / "pictures" / "broken.png").write_bytes(good.read_bytes()[:60])
    base = {"question": "Which colour?", "answer": "red", "caption": "red"}
    names = ["000.png", "broken.png", "gone.png", "003.png"]
    path = write_jsonl(tmp_path / "r.jsonl", [{**base, "image": f"pictures/{name}"} for name in names])
    path.write_text(path.read_text() + "{oops\n")
    return path


@pytest.mark.parametrize("kind", ["interleaved", "t2i"])
def test_an_undecodable_picture_stops_by_default_and_is_named(spoiled, tokenizer, tmp_path, kind):
    with pytest.raises(
        UserError, match=r"r\.jsonl:2: image 'pictures/broken\.png' is no usable picture.*--on-bad skip"
    ):
        prepare(kind, spoiled, tmp_path / "out", tokenizer)
    assert not list((tmp_path / "out" / "shards").iterdir()), "something half-written is left"


@pytest.mark.parametrize("kind", ["interleaved", "t2i"])
def test_skipped_records_are_counted_by_reason(spoiled, tokenizer, tmp_path, kind):
    options = PrepareOptions(samples_per_shard=2, on_bad=OnBad.skip)
    report = prepare(kind, spoiled, tmp_path / "out", tokenizer, options)
    assert report.rejects == {"bad_record": 1, "missing_image": 1, "undecodable_image": 1}
    source = open_source(tmp_path / "out")
    assert source.manifest.rejects == report.rejects and len(source) == 2
    assert [SampleReader(source, GEOMETRY).read(i).uid for i in range(2)] == [source.uid(i) for i in range(2)]
    # the third task lost its only record and leaves no tar
    assert sorted(path.name for path in (tmp_path / "out" / "shards").iterdir()) == ["000000.tar", "000001.tar"]


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ({"segments": []}, "neither 'segments'"),
        ({"segments": [{"text": "a", "image": "b"}]}, "either 'text' or 'image'"),
        ({"segments": [{"text": "a", "loss": "no"}]}, "'loss' of a segment"),
        ({"segments": [{"text": "a", "loss": False}]}, "no text with loss"),
        ({"question": "a"}, "'answer' must be a text"),
        ({"question": "a", "answer": " "}, "the answer is empty"),
        ({"question": "a", "answer": "b", "images": "c.png"}, "'images' must be a list"),
        ({"segments": [{"image": "pictures/0.png"}] * 256 + [{"text": "a"}]}, "at most 255"),
    ],
)
def test_records_that_are_no_documents_are_explained(tmp_path, tokenizer, record, complaint):
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "pictures" / "0.png")
    path = write_jsonl(tmp_path / "r.jsonl", [record])
    with pytest.raises(UserError, match=rf"r\.jsonl:1: .*{complaint}"):
        prepare("interleaved", path, tmp_path / "out", tokenizer)


def test_empty_texts_are_left_out_and_nothing_at_all_is_an_error(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "r.jsonl", [{"text": ""}, {"text": "a"}])
    assert prepare("text", path, tmp_path / "out", tokenizer).rejects == {"empty_text": 1}
    path = write_jsonl(tmp_path / "e.jsonl", [{"text": ""}])
    with pytest.raises(UserError, match="no usable record"):
        prepare("text", path, tmp_path / "none", tokenizer)


def test_an_image_tokenizer_that_breaks_its_promise_is_refused(raw, tokenizer, tmp_path):
    class Wrong(ColourTokenizer):
        def encode(self, images):
            return super().encode(images) + np.uint16(64)

    with pytest.raises(UserError, match="below 64"):
        prepare_t2i([raw["t2i"]], tmp_path / "out", tokenizer, Wrong(), options=OPTIONS)


def test_templates_are_recorded_only_where_they_were_used(prepared, tokenizer, tmp_path):
    assert open_source(prepared / "interleaved").manifest.template == "deepseek"
    path = write_jsonl(tmp_path / "r.jsonl", [{"segments": [{"text": "plain"}]}])
    prepare("interleaved", path, tmp_path / "out", tokenizer)
    assert open_source(tmp_path / "out").manifest.template is None


def test_a_full_writer_holds_no_more_than_its_index(tmp_path):
    """The tar streams: what is kept of a sample is a row, not its bytes."""
    writer = ShardWriter(tmp_path / "000000.tar")
    stream = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), COLOURS["red"], np.uint8)).save(stream, "png")
    for _ in range(10):
        writer.add_sample("0" * 32, {"doc.json": b"{}", "0.png": stream.getvalue()}, 1, 1)
    rows = writer.finish()
    assert len(rows) == 10 and (np.diff(rows["off"]) == rows["len"][:-1]).all()
