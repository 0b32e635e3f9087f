"""Lists of uids in every format that is accepted, and what is said of those that are not."""

import gzip
import json

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from data_pipeline.errors import UserError
from data_pipeline.manifest import open_source
from data_pipeline.masks.lookup import UidIndex, rows_of_uids
from data_pipeline.masks.uid_lists import listed_samples
from data_pipeline.prepare.options import PrepareOptions
from data_pipeline.prepare.text import prepare_text
from tests.support.raw import write_jsonl

LISTED = ["t3", "t7", "t0", "nowhere"]


@pytest.fixture
def source(prepared):
    return open_source(prepared / "text")


def uids_of(source, numbers, dtype):
    pairs = source.uids[numbers]
    return np.array([tuple(pair) for pair in pairs.tolist()], dtype) if dtype is not None else np.array(pairs)


def as_npy(path, source, dtype=None):
    np.save(path, uids_of(source, [3, 7, 0], dtype))


WRITERS = {
    "datacomp.npy": lambda path, source: as_npy(path, source, "u8,u8"),
    "named.npy": lambda path, source: as_npy(path, source, [("high", ">u8"), ("low", ">u8")]),
    "pairs.npy": as_npy,
    "ids.txt": lambda path, source: path.write_text("\n".join(LISTED) + "\n\n"),
    "uids.txt": lambda path, source: path.write_text("\r\n".join(source.uid(i) for i in (3, 7, 0))),
    "kept.jsonl": lambda path, source: write_jsonl(path, [{"text": "x", "id": name} for name in LISTED]),
    "kept.jsonl.gz": lambda path, source: path.write_bytes(
        gzip.compress("".join(json.dumps({"id": name}) + "\n" for name in LISTED).encode())
    ),
    "kept.parquet": lambda path, source: parquet.write_table(pyarrow.table({"text": LISTED, "id": LISTED}), path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_names_the_same_samples(source, tmp_path, name):
    WRITERS[name](tmp_path / name, source)
    named, found, listed = listed_samples(source, [tmp_path / name])
    assert np.flatnonzero(named).tolist() == [0, 3, 7]
    assert found == 3 and listed in (3, 4)


def test_a_directory_of_lists_is_read_whole(source, tmp_path):
    for name in ("a/00000.jsonl.gz", "a/00001.jsonl.gz", "stats.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / "a/00000.jsonl.gz").write_bytes(gzip.compress(b'{"id": "t3"}\n'))
    (tmp_path / "a/00001.jsonl.gz").write_bytes(gzip.compress(b'{"id": "t4"}\n{"id": "t3"}\n'))
    (tmp_path / "stats.json").write_text("not a list")
    named, found, listed = listed_samples(source, [tmp_path])
    assert np.flatnonzero(named).tolist() == [3, 4] and (found, listed) == (3, 3)


def test_all_captions_of_a_listed_image_are_named(prepared, tmp_path):
    source = open_source(prepared / "t2i")
    (tmp_path / "ids.txt").write_text("c1\nc4\n")
    named, found, _ = listed_samples(source, [tmp_path / "ids.txt"])
    assert found == 2 and [source.uid(i) for i in np.flatnonzero(named)] == [source.uid(1)] * 2 + [source.uid(6)]


def test_the_pieces_of_a_long_text_go_by_its_id(tmp_path, tokenizer):
    texts = [{"id": f"t{n}", "text": "one line of words\n" * 20} for n in range(3)]
    prepare_text(
        [write_jsonl(tmp_path / "raw.jsonl", texts)],
        tmp_path / "out",
        tokenizer,
        options=PrepareOptions(max_document_tokens=30),
    )
    source = open_source(tmp_path / "out")
    (tmp_path / "ids.txt").write_text("t1\n")
    named, found, listed = listed_samples(source, [tmp_path / "ids.txt"])
    assert len(source) % 3 == 0 and len(source) > 6 and (found, listed) == (1, 1)
    third = len(source) // 3
    assert np.flatnonzero(named).tolist() == list(range(third, 2 * third))


def test_lists_longer_than_a_piece(source, tmp_path, monkeypatch):
    monkeypatch.setattr("data_pipeline.masks.uid_lists._PIECE", 2)
    WRITERS["datacomp.npy"](tmp_path / "a.npy", source)
    WRITERS["ids.txt"](tmp_path / "ids.txt", source)
    named, found, listed = listed_samples(source, [tmp_path / "a.npy", tmp_path / "ids.txt"])
    assert np.flatnonzero(named).tolist() == [0, 3, 7] and (found, listed) == (6, 7)


def test_nothing_found_shows_both_sides(source, tmp_path):
    (tmp_path / "ids.txt").write_text("other-1\nother-2\n")
    with pytest.raises(UserError) as error:
        listed_samples(source, [tmp_path / "ids.txt"])
    said = str(error.value)
    assert "none of the 2 listed ids" in said and "'other-1'" in said and source.uid(0) in said and "\n" not in said


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.csv", b"t1", "lists of uids end in .npy, .txt"),
        ("a.txt", b"\n \n", "not one id is listed"),
        ("a.txt", b"\xff\xfe", "a.txt:1: the list of uids cannot be read"),
        ("a.jsonl", b'{"id": "t1"}\n{"id": 1.5}\n', "a.jsonl:2: a record of a list needs its id"),
        ("a.jsonl", b'{"id": "\\ud800"}\n', "a.jsonl:1: the id holds broken Unicode"),
        ("a.jsonl", b'{"name": "t1"}\n', "a.jsonl:1: a record of a list needs its id"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl:1: the list of uids cannot be read"),
        ("a.jsonl.gz", gzip.compress(b'{"id": "t1"}\n' * 99)[:-9], "a.jsonl.gz:.*cannot be read"),
        ("a.jsonl.gz", gzip.compress(b'{"id": "t1"}\n')[:12] + b"\xff" * 30, "a.jsonl.gz:.*cannot be read"),
        ("a.jsonl.gz", b'{"id": "t1"}\n', "a.jsonl.gz:0: .*cannot be read"),
        ("a.npy", b"\x93NUMPY", "no readable .npy"),
        ("a.parquet", b"PAR1", "no readable Parquet file"),
    ],
)
def test_bad_lists(source, tmp_path, name, content, complaint):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=complaint) as error:
        listed_samples(source, [tmp_path / name])
    assert "\n" not in str(error.value) and name in str(error.value)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((3, 2), np.int64),
        np.zeros((3, 3), np.uint64),
        np.zeros(4, np.uint64),
        np.zeros(4, "u8,u8,u8"),
        np.zeros(4, "u4,u4"),
        np.zeros((2, 2), "u8,u8"),
        np.array([["a", "b"]]),
    ],
)
def test_arrays_of_another_make(source, tmp_path, array):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(UserError, match=r"a\.npy: uids are pairs of u8"):
        listed_samples(source, [tmp_path / "a.npy"])


def test_pickles_are_refused(source, tmp_path):
    np.save(tmp_path / "a.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(UserError, match="no readable .npy"):
        listed_samples(source, [tmp_path / "a.npy"])


def test_missing_files_and_columns(source, tmp_path):
    with pytest.raises(UserError, match="no such file or directory"):
        listed_samples(source, [tmp_path / "none.txt"])
    with pytest.raises(UserError, match="no list of uids in this directory"):
        listed_samples(source, [tmp_path])
    parquet.write_table(pyarrow.table({"name": ["t1"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="no column uid or id, there are name"):
        listed_samples(source, [tmp_path / "a.parquet"])


def test_words_that_share_a_half_are_told_apart():
    uids = np.array([[5, 1], [5, 2], [7, 2], [5, 2]], np.uint64)
    queries, samples = UidIndex(uids).find(np.array([[5, 2], [5, 3], [7, 1], [5, 1], [8, 8]], np.uint64))
    assert sorted(zip(queries.tolist(), samples.tolist(), strict=True)) == [(0, 1), (0, 3), (3, 0)]


def test_sources_are_joined_by_uid(prepared):
    drawings, texts = open_source(prepared / "t2i"), open_source(prepared / "text")
    rows = rows_of_uids(drawings, drawings)
    assert all(drawings.uid(row) == drawings.uid(i) and row <= i for i, row in enumerate(rows.tolist()))
    assert (rows_of_uids(texts, drawings) == -1).all()
