"""Tars of others, indexed where they lie: what is read, what training gets, what is refused."""

import hashlib
import io
import json
import os
import tarfile

import numpy as np
import pytest

from data_pipeline.dialogue import DialogueBuilder, pair_text
from data_pipeline.errors import BrokenSample, UserError
from data_pipeline.images import decode_image, understanding_view
from data_pipeline.manifest import open_source
from data_pipeline.prepare.foreign import IndexOptions, index_tars
from data_pipeline.prepare.options import OnBad
from data_pipeline.schema import TaskId
from data_pipeline.spec import ImageGeometry, Template
from data_pipeline.stream.read import SampleReader
from data_pipeline.uid import uid_text
from tests.support.raw import picture, picture_bytes, train_tokenizer

GEOMETRY = ImageGeometry(
    understanding_size=16, understanding_tokens=16, generation_size=16, generation_tokens=16, codebook_size=64
)
SKIP = IndexOptions(on_bad=OnBad.skip)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def img2dataset_members(number, **facts):
    """One sample as img2dataset writes it."""
    key = f"{number:09d}"
    content = picture_bytes(picture("red", 16 + number, 16, number), "jpeg")
    caption = f"a red thing, number {number}"
    facts = {"caption": caption, "url": f"http://x/{number}", "key": key, "status": "success", **facts}
    return [(f"{key}.jpg", content), (f"{key}.json", json.dumps(facts).encode()), (f"{key}.txt", caption.encode())]


def write_tar(path, members, form=tarfile.GNU_FORMAT):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(content), 1.25
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def tars(tmp_path):
    """Two tars by different tools, the second with long names, captions in .json alone and mixed suffixes."""
    first = [
        member for number in range(3) for member in img2dataset_members(number, uid=f"{number:032x}", score=number)
    ]
    second = []
    for number, kind in enumerate(("png", "webp", "jpeg")):
        key = "deep/" * 30 + f"n{number}"
        facts = {"caption": f"blue as {kind}", "lang": "en"}
        content = picture_bytes(picture("blue", 20, 30, number), kind)
        second += [
            (f"{key}.{kind.upper()}", content),
            (f"{key}.json", json.dumps(facts).encode()),
            (f"{key}.cls", b"7"),
        ]
    write_tar(tmp_path / "tars" / "00000.tar", first)
    write_tar(tmp_path / "tars" / "00001.tar", second, tarfile.PAX_FORMAT)
    return tmp_path / "tars"


def test_pairs_are_read_where_they_lie(tars, tmp_path, tokenizer):
    before = {path.name: path.read_bytes() for path in tars.iterdir()}
    manifest = index_tars([tars], tmp_path / "out", tokenizer)
    assert {path.name: path.read_bytes() for path in tars.iterdir()} == before
    assert not list((tmp_path / "out").rglob("*.tar")) and not (tmp_path / "out" / "shards").exists()
    assert (manifest.layout, manifest.shards_dir, manifest.num_samples) == ("pairs", str(tars), 6)
    assert [entry.sha256 for entry in manifest.shards] == [
        hashlib.sha256(before[name]).hexdigest() for name in ("00000.tar", "00001.tar")
    ]
    source = open_source(tmp_path / "out")
    reader = SampleReader(source, GEOMETRY, tokenizer)
    captions = [f"a red thing, number {n}" for n in range(3)] + [f"blue as {kind}" for kind in ("png", "webp", "jpeg")]
    with tarfile.open(tars / "00000.tar") as first, tarfile.open(tars / "00001.tar") as second:
        contents = [
            tar.extractfile(member).read()
            for tar in (first, second)
            for member in tar
            if member.name.lower().endswith(("jpg", "jpeg", "png", "webp"))
        ]
    builder = DialogueBuilder(tokenizer, Template.deepseek, GEOMETRY)
    lengths = builder.document_lengths(source)
    for i, (caption, content) in enumerate(zip(captions, contents, strict=True)):
        sample = reader.read(i)
        assert np.array_equal(sample.images[0], understanding_view(decode_image(content), 16))
        document = builder.build_document(sample, TaskId.understanding)
        ids = tokenizer.encode(pair_text(caption))
        assert document.input_ids.tolist() == [*builder.interleaved_prompt([None]), *ids, builder.ids.eos]
        assert np.flatnonzero(document.label_head).tolist() == list(range(18, 18 + len(ids) + 1))
        assert len(document.input_ids) == lengths[i]
    assert source.uid(1) == f"{1:032x}" and source.uid(4) == uid_text("00001/" + "deep/" * 30 + "n1")


def test_facts_become_columns_and_processes_change_nothing(tars, tmp_path, tokenizer):
    options = IndexOptions(keep_columns=("score",))
    alone = index_tars([tars], tmp_path / "alone", tokenizer, options)
    seen = []
    shared = index_tars(
        sorted(tars.iterdir()),
        tmp_path / "shared",
        tokenizer,
        IndexOptions(keep_columns=("score",), workers=2),
        lambda *step: seen.append(step),
    )
    assert alone == shared and seen == [(1, 2), (2, 2)]
    column = {path.stem: np.load(path).tolist() for path in (tmp_path / "alone" / "index" / "meta").glob("*.npy")}
    assert column["width"] == [16, 17, 18, 20, 20, 20] and column["height"] == [16] * 3 + [30] * 3
    assert column["caption_chars"][:2] == [21, 21] and column["score"][:3] == [0, 1, 2]
    assert np.isnan(column["score"][3:]).all() and column["language"] == [0, 0, 0, 1, 1, 1]
    names = json.loads((tmp_path / "alone" / "index" / "meta" / "language.json").read_bytes())["names"]
    assert names == ["", "en"] and {"meta/score.npy", "meta/language.json"} <= set(alone.index)


def test_it_continues_after_a_kill_and_knows_other_tars(tars, tmp_path, tokenizer, monkeypatch):
    class Killed(BaseException):
        pass

    def kill(done, total):
        raise Killed

    with pytest.raises(Killed):
        index_tars([tars], tmp_path / "out", tokenizer, progress=kill)
    seen = []
    again = index_tars([tars], tmp_path / "out", tokenizer, progress=lambda *step: seen.append(step))
    assert seen == [(2, 2)] and again == index_tars([tars], tmp_path / "other", tokenizer)
    with (tars / "00001.tar").open("r+b") as tar:
        tar.seek(10)
        tar.write(b"x")
    with pytest.raises(UserError, match=r"input '00001\.tar' has other content"):
        index_tars([tars], tmp_path / "out", tokenizer)


def test_damage_after_indexing_is_a_broken_sample(tars, tmp_path, tokenizer):
    index_tars([tars], tmp_path / "out", tokenizer)
    source = open_source(tmp_path / "out")
    descriptor = os.open(tars / "00000.tar", os.O_RDWR)
    os.pwrite(descriptor, b"!!", int(source.offset[1]) + 700)
    os.close(descriptor)
    reader = SampleReader(source, GEOMETRY, tokenizer)
    assert reader.read(0).images and reader.read(2).images
    with pytest.raises(BrokenSample, match="crc32") as caught:
        reader.read(1)
    assert caught.value.shard.endswith("00000.tar")


def bomb(width):
    """A PNG header that promises many pixels."""
    content = bytearray(picture_bytes(picture("red")))
    content[16:24] = width.to_bytes(4, "big") * 2
    return bytes(content)


@pytest.mark.parametrize(
    ("members", "reason", "complaint"),
    [
        ([("a.txt", b"caption")], "missing_image", "no .jpg"),
        ([("a.png", bomb(16))], "bad_record", "no caption"),
        ([("a.png", bomb(16)), ("a.txt", b" \n")], "bad_record", "no caption"),
        ([("a.png", bomb(16)), ("a.txt", b"\xff")], "bad_record", "decode"),
        ([("a.png", bomb(16)), ("a.json", b"[1]")], "bad_record", "no object"),
        ([("a.png", bomb(60_000)), ("a.txt", b"boom")], "too_many_pixels", "60000 x 60000 pixels"),
        ([("a.jpg", b"GIF89a"), ("a.txt", b"x")], "undecodable_image", "neither JPEG"),
    ],
)
def test_bad_pairs_are_named_or_counted(tars, tmp_path, tokenizer, members, reason, complaint):
    write_tar(tars / "00002.tar", members)
    with pytest.raises(UserError, match=rf"00002\.tar: a: .*{complaint}.*--on-bad skip"):
        index_tars([tars], tmp_path / "stopped", tokenizer)
    manifest = index_tars([tars], tmp_path / "out", tokenizer, SKIP)
    assert manifest.rejects == {reason: 1} and manifest.num_samples == 6 and len(manifest.shards) == 2
    assert len(open_source(tmp_path / "out")) == 6


@pytest.mark.parametrize(
    ("members", "complaint"),
    [
        ([("a.jpg", b"1"), ("b.jpg", b"2"), ("a.txt", b"3")], "key 'a' do not lie behind one another"),
        ([("a.jpg", b"1"), ("a.png", b"2")], "'a.jpg' and 'a.png' are of one kind"),
        ([("a.jpg", b"1"), ("a.pyd", b"2")], "'a.pyd' is a pickle"),
        ([("a.features.pth", b"2")], "'a.features.pth' is a pickle"),
        ([("../a.jpg", b"1")], "leads out of its directory"),
    ],
)
def test_tars_that_are_no_pairs_are_refused_even_when_skipping(tars, tmp_path, tokenizer, members, complaint):
    write_tar(tars / "00002.tar", members)
    with pytest.raises(UserError, match=rf"00002\.tar: .*{complaint}"):
        index_tars([tars], tmp_path / "out", tokenizer, SKIP)


def test_inputs_that_are_no_tars_are_refused(tars, tmp_path, tokenizer):
    elsewhere = write_tar(tmp_path / "elsewhere" / "00009.tar", [])
    for inputs, complaint in (
        (["pipe:curl http://x/0.tar"], "never through a shell"),
        (["http://x/0.tar"], "never through a shell"),
        ([tmp_path / "gone.tar"], "no such .tar"),
        ([tars, elsewhere], "another directory"),
        ([tars, tars / "00000.tar"], "given twice"),
        ([tmp_path], "no .tar in this directory"),
        ([], "no tar given"),
    ):
        with pytest.raises(UserError, match=complaint):
            index_tars(inputs, tmp_path / "out", tokenizer)
