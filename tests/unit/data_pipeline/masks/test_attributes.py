"""Attributes of samples: from the index, from what prepare kept, from the samples themselves."""

import shutil

import numpy as np
import pytest

from data_pipeline.errors import UserError
from data_pipeline.manifest import open_source
from data_pipeline.masks.attributes import read_columns
from data_pipeline.prepare.importing import ImportOptions
from data_pipeline.prepare.interleaved import prepare_interleaved
from data_pipeline.prepare.options import PrepareOptions
from data_pipeline.prepare.t2i import prepare_t2i
from tests.support.raw import ColourTokenizer, picture_bytes, write_jsonl

SIZES = [(30, 20), (16, 64), (50, 50), (8, 9)]
"""Width and height of the pictures."""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, tokenizer):
    """Directories of documents and drawings of the same pictures; the last document has two of them, one has none."""
    root = tmp_path_factory.mktemp("pairs")
    for number, (width, height) in enumerate(SIZES):
        pixels = np.random.default_rng(number).integers(0, 255, (height, width, 3), dtype=np.uint8)
        (root / f"{number}.png").write_bytes(picture_bytes(pixels))
    facts = [{"aesthetic": 4.5, "lang": "en"}, {"aesthetic": 5.1, "lang": "de"}, {"aesthetic": 6}, {"lang": "en"}]
    rows = [{"id": f"s{n}", "image": f"{n}.png", "caption": "word " * (n + 1), **facts[n]} for n in range(len(SIZES))]
    drawn = write_jsonl(root / "pairs.jsonl", rows)
    several = [{"image": "0.png"}, {"image": "1.png"}, {"text": "two pictures"}]
    rows += [{"id": "several", "segments": several}, {"id": "none", "segments": [{"text": "no picture"}]}]
    options = PrepareOptions(samples_per_shard=4, importing=ImportOptions(keep_columns=("aesthetic",)))
    prepare_interleaved([write_jsonl(root / "all.jsonl", rows)], root / "documents", tokenizer, options=options)
    prepare_t2i([drawn], root / "drawings", tokenizer, ColourTokenizer(), options=options)
    return root


def without_meta(pairs, tmp_path, kind):
    """The same source as older versions prepared it."""
    source = shutil.copytree(pairs / kind, tmp_path / kind)
    shutil.rmtree(source / "index" / "meta")
    return open_source(source)


EXPECTED = {
    "min_side": [20, 16, 50, 8, 16, np.nan],
    "max_side": [30, 64, 50, 9, 64, np.nan],
    "aspect": [1.5, 4, 1, 1.125, 4, np.nan],
    "width": [30, 16, 50, 8, 30, np.nan],
    "images": [1, 1, 1, 1, 2, 0],
}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("name", EXPECTED)
def test_sizes_and_counts(pairs, tmp_path, name, old):
    source = without_meta(pairs, tmp_path, "documents") if old else open_source(pairs / "documents")
    columns = read_columns(source, [name])
    np.testing.assert_allclose(columns.by_name[name].values, EXPECTED[name], rtol=1e-6)
    assert not columns.damaged.any()


@pytest.mark.parametrize("old", [False, True])
def test_scores_languages_and_captions(pairs, tmp_path, old):
    source = without_meta(pairs, tmp_path, "documents") if old else open_source(pairs / "documents")
    columns = read_columns(source, ["aesthetic", "language", "caption_chars", "tokens"]).by_name
    np.testing.assert_allclose(columns["aesthetic"].values, [4.5, 5.1, 6, np.nan, np.nan, np.nan], rtol=1e-6)
    language = columns["language"]
    assert [language.labels[code] for code in language.values] == ["en", "de", "", "en", "", ""]
    assert (np.diff(columns["caption_chars"].values[:4]) == 5).all()
    assert columns["tokens"].values.tolist() == source.num_text_tokens.tolist()


def test_the_index_is_enough_where_prepare_kept_it(pairs, tmp_path):
    shutil.copytree(pairs / "documents", tmp_path / "copy")
    source = open_source(tmp_path / "copy")
    for number in range(2):
        source.shard_path(number).write_bytes(bytes(source.shard_path(number).stat().st_size))
    assert read_columns(source, ["aesthetic", "language", "width", "tokens"]).by_name["aesthetic"].known.sum() == 3
    columns = read_columns(source, ["min_side"])  # of two pictures the index knows one: that sample is read
    assert columns.damaged.tolist() == [False] * 4 + [True, False]


def test_drawings_know_the_size_of_their_pictures(pairs):
    source = open_source(pairs / "drawings")
    assert read_columns(source, ["min_side"]).by_name["min_side"].values.tolist() == [20, 16, 50, 8]
    assert read_columns(source, ["language"]).by_name["language"].known.tolist() == [True, True, False, True]


def test_drawings_ask_the_source_of_their_pictures(pairs, tmp_path):
    drawings, images = without_meta(pairs, tmp_path, "drawings"), open_source(pairs / "documents")
    with pytest.raises(UserError, match="no sample has 'min_side'; attributes there are: images, tokens; .*--images"):
        read_columns(drawings, ["min_side"])
    columns = read_columns(drawings, ["min_side", "language", "tokens"], images=images).by_name
    assert columns["min_side"].values.tolist() == [20, 16, 50, 8]
    assert [columns["language"].labels[code] for code in columns["language"].values] == ["en", "de", "", "en"]
    drawings.uids = drawings.uids + np.array([[0, 1], [0, 0], [0, 0], [0, 0]], np.uint64)
    assert np.isnan(read_columns(drawings, ["aspect"], images=images).by_name["aspect"].values).tolist()[:2] == [
        True,
        False,
    ]


@pytest.mark.parametrize("old", [False, True])
def test_an_attribute_that_nothing_has_names_those_there_are(pairs, tmp_path, old):
    source = without_meta(pairs, tmp_path, "documents") if old else open_source(pairs / "documents")
    with pytest.raises(UserError) as error:
        read_columns(source, ["tokens", "nsfw"])
    said = str(error.value)
    assert "no sample has 'nsfw'" in said and "\n" not in said
    for name in ("aesthetic", "aspect", "caption_chars", "images", "language", "min_side", "tokens"):
        assert name in said


def test_damaged_pictures_and_samples_are_told_apart_from_absent_ones(pairs, tmp_path):
    source = without_meta(pairs, tmp_path, "documents")
    content = bytearray(source.shard_path(0).read_bytes())
    content[int(source.offset[1]) + 600] ^= 1
    source.shard_path(0).write_bytes(content)
    columns = read_columns(source, ["min_side"])
    assert columns.damaged.tolist() == [False, True, False, False, False, False]
    assert columns.by_name["min_side"].known.tolist() == [True, False, True, True, True, False]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("aesthetic.npy", b""),
        ("aesthetic.npy", b"\x93NUMPY"),
        ("language.json", b"[]"),
        ("language.json", b'{"names": [""]}'),
    ],
)
def test_damaged_columns_are_refused(pairs, tmp_path, file, content):
    shutil.copytree(pairs / "documents", tmp_path / "copy")
    (tmp_path / "copy" / "index" / "meta" / file).write_bytes(content)
    source = open_source(tmp_path / "copy")
    with pytest.raises(UserError, match=r"missing or damaged index file.*prepare") as error:
        read_columns(source, [file.partition(".")[0]])
    assert "\n" not in str(error.value)


def test_columns_of_another_length_are_refused(pairs, tmp_path):
    shutil.copytree(pairs / "documents", tmp_path / "copy")
    for array in (np.zeros(3, np.float32), np.zeros((6, 1), np.float32), np.array(["a"] * 6)):
        np.save(tmp_path / "copy" / "index" / "meta" / "aesthetic.npy", array)
        with pytest.raises(UserError, match=r"aesthetic\.npy: expected numbers \[6\]"):
            read_columns(open_source(tmp_path / "copy"), ["aesthetic"])
