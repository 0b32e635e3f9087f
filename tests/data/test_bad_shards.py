"""Shards that are damaged, incomplete or made for another run: one line each, naming file and remedy."""

import json
import shutil

import numpy as np
import pytest

from data_pipeline.dialogue import DialogueBuilder
from data_pipeline.errors import UserError
from data_pipeline.explain.inspection import inspect_source, inspection_lines
from data_pipeline.manifest import open_source
from data_pipeline.prepare.directory import Facts, ShardDirectory
from data_pipeline.prepare.interleaved import prepare_interleaved
from data_pipeline.prepare.options import PrepareOptions
from data_pipeline.prepare.shard import ShardWriter, npy_bytes
from data_pipeline.prepare.t2i import prepare_t2i
from data_pipeline.prepare.text import prepare_text
from data_pipeline.spec import ImageGeometry, Template
from data_pipeline.stream.read import SampleReader
from tests.support.raw import PROSE, ColourTokenizer, train_tokenizer, write_raw

GEOMETRY = ImageGeometry(
    understanding_size=16, understanding_tokens=16, generation_size=16, generation_tokens=16, codebook_size=64
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """All three kinds, prepared well."""
    root = tmp_path_factory.mktemp("whole")
    raw, tokenizer = write_raw(root / "raw"), train_tokenizer(root)
    options = PrepareOptions(samples_per_shard=5, record_size=3)
    prepare_text([raw["text"]], root / "text", tokenizer, options=options)
    prepare_interleaved([raw["interleaved"]], root / "interleaved", tokenizer, options=options)
    prepare_t2i([raw["t2i"]], root / "t2i", tokenizer, ColourTokenizer(), options=options)
    return root


@pytest.fixture
def tokenizer(whole):
    from data_pipeline.text.load import load_text_tokenizer

    return load_text_tokenizer(whole / "text.model")


@pytest.fixture(params=["text", "interleaved", "t2i"])
def directory(request, whole, tmp_path):
    """A copy to damage."""
    return shutil.copytree(whole / request.param, tmp_path / request.param)


def read_all(directory):
    source = open_source(directory)
    reader = SampleReader(source, GEOMETRY)
    return [reader.read(i) for i in range(len(source))]


def one_line(error):
    return "\n" not in str(error.value)


# ---- found when a source is opened -----------------------------------------------------------------------------------


def test_a_missing_shard_is_found_at_open(directory):
    (directory / "shards" / "000001.tar").unlink()
    with pytest.raises(UserError, match=r"000001\.tar: the shard is missing.*copy it again, or delete") as error:
        open_source(directory)
    assert one_line(error)


@pytest.mark.parametrize("change", [-1, -10_240, +512])
def test_a_tar_of_another_size_is_found_at_open(directory, change):
    tar = directory / "shards" / "000001.tar"
    content = tar.read_bytes()
    tar.write_bytes(content[:change] if change < 0 else content + bytes(change))
    what = "truncated" if change < 0 else "longer than written"
    size = len(content) + change
    with pytest.raises(UserError, match=rf"000001\.tar: the tar is {what}: {size} bytes, {len(content)} in") as error:
        open_source(directory)
    assert one_line(error)


@pytest.mark.parametrize("name", ["off", "crc", "ptr"])
def test_a_damaged_index_is_found_at_open(directory, name):
    path = directory / "index" / f"{name}.npy"
    array = np.load(path)
    for content in (b"", path.read_bytes()[:40], npy_bytes(array[:-1]), npy_bytes(array.astype(np.float32))):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"{name}\.npy: .*copy it again") as error:
            open_source(directory)
        assert one_line(error)
    path.unlink()
    with pytest.raises(UserError, match=rf"{name}\.npy"):
        open_source(directory)


def test_pickles_in_the_index_are_refused(directory):
    np.save(directory / "index" / "off.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(UserError, match=r"off\.npy"):
        open_source(directory)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"schema": "janus-shards/2"}, "its schema is 'janus-shards/2'"),
        ({"kind": "movies"}, "'movies' is neither a kind"),
        ({"shards": [{"name": "../../x.tar", "bytes": 1, "sha256": "", "num_samples": 1}]}, "plain tar name"),
        ({"shards": [{"name": "x.tar"}]}, "damaged shard manifest"),
        ({"num_samples": 3}, "disagrees"),
    ],
)
def test_a_manifest_of_another_make_is_refused(directory, change, complaint):
    path = directory / "janus.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=complaint) as error:
        open_source(directory)
    assert one_line(error)


def test_no_manifest_is_explained(directory):
    (directory / "janus.json").write_text("{")
    with pytest.raises(UserError, match=r"janus\.json: not a shard manifest"):
        open_source(directory)
    (directory / "janus.json").unlink()
    with pytest.raises(UserError, match=r"janus\.json: cannot be read, it is no directory of shards"):
        open_source(directory)


def test_unknown_fields_of_a_newer_minor_version_are_ignored(directory):
    path = directory / "janus.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "licence": "CC0"}))
    assert len(read_all(directory)) >= 12


# ---- found when a sample is read -------------------------------------------------------------------------------------


def test_every_flipped_bit_of_a_sample_is_found(directory):
    source = open_source(directory)
    reader = SampleReader(source, GEOMETRY)
    shard, _ = source.place_of(6)
    tar = source.shard_path(shard)
    content = tar.read_bytes()
    places = [int(source.offset[6]), int(source.offset[6]) + int(source.length[6]) - 1]
    if source.kind == "t2i":
        start = source.image_ids_offset(6)
        places += [start, start + 31]
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 0x10
        tar.write_bytes(damaged)
        with pytest.raises(UserError, match=rf"{tar.name}: sample .*: its crc32 is .*the tar is damaged") as error:
            SampleReader(open_source(directory), GEOMETRY).read(6)
        assert one_line(error)
    tar.write_bytes(content)
    assert reader.read(6).uid == source.uid(6)


def test_a_tar_truncated_after_open_is_found(directory):
    source = open_source(directory)
    tar = source.shard_path(0)
    tar.write_bytes(tar.read_bytes()[:700])
    with pytest.raises(UserError, match=r"000000\.tar: sample \w{32}: the tar is truncated: .* bytes wanted"):
        SampleReader(source, GEOMETRY).read(3)
    tar.unlink()
    with pytest.raises(UserError, match=r"000000\.tar: the shard cannot be opened"):
        SampleReader(source, GEOMETRY).read(3)


def test_an_undecodable_picture_names_shard_and_member(tmp_path, tokenizer):
    directory = ShardDirectory(tmp_path / "out", {})
    writer = ShardWriter(directory.shard_path(0))
    document = {"v": 1, "seq": [{"t": "image", "name": "0.png"}, {"t": "text", "n": 1, "loss": True, "s": "a"}]}
    members = {"0.png": b"\x89PNG\r\n\x1a\n broken", "doc.json": json.dumps(document).encode()}
    writer.add_sample("0" * 32, {**members, "tok.npy": npy_bytes(np.array([300], "<u2"))}, 1, 1)
    directory.commit(0, writer)
    directory.finish(1, Facts(kind="interleaved", text_tokenizer=tokenizer.digest, token_dtype="<u2"))
    with pytest.raises(UserError, match=r"000000\.tar: sample 0{32}: member '0\.png' is no usable") as error:
        read_all(tmp_path / "out")
    assert one_line(error) and "remove or replace the raw picture" in str(error.value)


# ---- made for another run --------------------------------------------------------------------------------------------


def test_another_tokenizer_is_refused_with_both_digests(directory, tokenizer, tmp_path):
    (tmp_path / "other.txt").write_text("quite another text\n" + PROSE[0] * 3)
    from data_pipeline.text.train import train_sentencepiece

    other = train_sentencepiece([tmp_path / "other.txt"], 310, tmp_path / "other.model")
    source = open_source(directory)
    DialogueBuilder(tokenizer, Template.deepseek, GEOMETRY).document_lengths(source)
    with pytest.raises(UserError, match=rf"{tokenizer.digest}.*other\.model is sha256 {other.digest}") as error:
        DialogueBuilder(other, Template.deepseek, GEOMETRY).document_lengths(source)
    assert one_line(error)


def test_another_template_is_refused_for_rendered_questions_only(directory, tokenizer):
    builder = DialogueBuilder(tokenizer, Template.deepseek_old, GEOMETRY)
    source = open_source(directory)
    if source.kind == "interleaved":
        with pytest.raises(UserError, match=r"rendered with template deepseek, the run uses deepseek_old"):
            builder.document_lengths(source)
    else:
        assert len(builder.document_lengths(source)) == len(source)


@pytest.mark.parametrize("change", [{"codebook_size": 65}, {"generation_tokens": 25}, {"generation_size": 32}])
def test_another_image_geometry_is_refused_for_image_ids_only(directory, tokenizer, change):
    sizes = {name: getattr(GEOMETRY, name) for name in ImageGeometry.__dataclass_fields__}
    builder = DialogueBuilder(tokenizer, Template.deepseek, ImageGeometry(**(sizes | change)))
    source = open_source(directory)
    if source.kind == "t2i":
        with pytest.raises(UserError, match=r"16 of 64 codes for 16 px, data\.geometry says"):
            builder.document_lengths(source)
    else:
        assert len(builder.document_lengths(source)) == len(source)


# ---- inspection ------------------------------------------------------------------------------------------------------


def test_inspection_tells_what_is_there(directory):
    found = json.loads(json.dumps(inspect_source(directory)))
    source = open_source(directory)
    tokens = np.asarray(source.num_text_tokens)
    assert found["kind"] == source.kind and found["digest"] == source.digest
    assert found["text_tokens"]["total"] == int(tokens.sum()) and found["text_tokens"]["max"] == int(tokens.max())
    histogram = found["text_tokens"]["histogram"]
    assert sum(count for *_, count in histogram) == len(source)
    for first, last, count in histogram:
        assert count == int(((tokens >= first) & (tokens <= last)).sum())
    assert len(found["examples"]) == 3
    expected = {"text": {"tok.npy"}, "t2i": {"tok.npy", "vq.npy"}, "interleaved": {"doc.json", "tok.npy", "0.png"}}
    assert expected[source.kind] <= set(found["members"])
    lines = inspection_lines(found)
    assert any(source.digest in line for line in lines) and any("#" in line for line in lines)


def test_the_index_costs_22_bytes_a_sample(directory):
    source = open_source(directory)
    per_sample = sum(
        np.load(directory / "index" / f"{name}.npy").nbytes for name in ("off", "len", "ntok", "nund", "ngen", "crc")
    )
    assert per_sample == 22 * len(source)
