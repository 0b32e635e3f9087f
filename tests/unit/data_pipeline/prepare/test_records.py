"""Raw records: order, slices, identity, refusals."""

import json
import pickle

import pytest

from data_pipeline.errors import UserError
from data_pipeline.prepare.importing import Format, ImportOptions
from data_pipeline.prepare.records import Reject, open_records, read_texts, text_field
from tests.support.raw import picture, picture_bytes


def names(records):
    return [str(record).rsplit("/", 1)[1] for record in records]


def test_records_come_in_the_order_given_and_directories_sorted(tmp_path):
    (tmp_path / "d" / "sub").mkdir(parents=True)
    (tmp_path / "d" / "b.txt").write_text("two\nlines")
    (tmp_path / "d" / "sub" / "a.md").write_text("md")
    (tmp_path / "d" / ".hidden.txt").write_text("no")
    (tmp_path / "z.jsonl").write_text('{"text": "one"}\n\n  \n{"text": "three"}')
    source = open_records([tmp_path / "z.jsonl", tmp_path / "d"])
    assert source.files() == [tmp_path / "z.jsonl", tmp_path / "d" / "b.txt", tmp_path / "d" / "sub" / "a.md"]
    records = list(source.read(0, source.count()))
    assert [record.fields()["text"] for record in records] == ["one", "three", "two\nlines", "md"]
    assert source.count() == len(records)
    assert names(records) == ["z.jsonl:1", "z.jsonl:4", "b.txt", "a.md"]
    assert records[1].identity({}) == "z.jsonl:4" and records[2].identity({}) == "b.txt:0"
    assert records[3].identity({}) == "sub/a.md:0", "files of one name in two directories would be one"
    assert records[1].identity({"id": "me"}) == "me" and records[1].identity({"id": 12}) == "12"
    assert list(read_texts([tmp_path / "z.jsonl"])) == ["one", "three"]


def test_any_slice_equals_that_of_all_records(tmp_path):
    """Over marks of offsets, blank lines and files; also from a copy that another process got."""
    for number, count in enumerate((0, 5_000, 1, 9_001)):
        lines = [json.dumps({"text": f"{number}.{n}"}) + "\n" * (1 + n % 3) for n in range(count)]
        (tmp_path / f"{number}.jsonl").write_text("".join(lines))
    (tmp_path / "4.txt").write_text("whole")
    source = open_records([tmp_path])
    everything = [str(record) for record in source.read(0, source.count())]
    assert source.count() == len(everything) == 14_003
    copy = pickle.loads(pickle.dumps(source))
    (tmp_path / "4.txt").write_text("changed")
    for start, stop in (
        (0, 1),
        (4_095, 4_098),
        (4_990, 5_003),
        (9_000, 9_010),
        (13_999, 20_000),
        (7, 7),
        (20_000, 30_000),
    ):
        for one in (source, copy):
            assert [str(record) for record in one.read(start, stop)] == everything[start:stop]


def test_reading_the_end_does_not_read_the_beginning(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n' * 20_000)
    source = open_records([path])
    source.count()
    read = []
    real = type(path).open

    class Counting:
        def __init__(self, stream):
            self.stream = stream

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.stream.close()

        def __iter__(self):
            return self

        def __next__(self):
            read.append(1)
            return next(self.stream)

        def seek(self, offset):
            return self.stream.seek(offset)

    monkeypatch.setattr(type(path), "open", lambda self, mode: Counting(real(self, mode)))
    assert len(list(source.read(19_990, 20_000))) == 10
    assert len(read) < 5_000


@pytest.mark.parametrize("name", ["missing.jsonl", "odd.csv", "empty", "model.pth", "bad.parquet"])
def test_inputs_that_are_none_are_named(tmp_path, name):
    for file in ("odd.csv", "model.pth", "bad.parquet"):
        (tmp_path / file).write_bytes(b"PAR1 and so on")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=name):
        open_records([tmp_path / name]).count()


@pytest.mark.parametrize("given", ["pipe:cat x.tar", "https://host/a.jsonl", "s3://bucket/a.tar"])
def test_shells_and_addresses_are_refused_by_name(given):
    with pytest.raises(UserError, match=given):
        open_records([given])


def test_kinds_that_do_not_belong_together_need_a_format(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "b.json").write_text('[{"text": "two"}]')
    (tmp_path / "README.md").write_text("about")
    assert open_records([tmp_path]).count() == 3
    (tmp_path / "c.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"c\.parquet, a\.jsonl, b\.json, which are not read together.*--format"):
        open_records([tmp_path])
    assert open_records([tmp_path], ImportOptions(format=Format.jsonl)).count() == 2
    with pytest.raises(UserError, match=r"c\.parquet: no file of format jsonl"):
        open_records([tmp_path / "c.parquet"], ImportOptions(format=Format.jsonl))


@pytest.mark.parametrize(
    "line", [b"{", b"[1]", b"\xff\xfe", b'{"text": 1}', b'{"text": "\\ud800"}', b"{}", b"[" * 99_999]
)
def test_bad_lines_are_rejected_with_a_reason(tmp_path, line):
    (tmp_path / "a.jsonl").write_bytes(line)
    (record,) = open_records([tmp_path / "a.jsonl"]).read(0, 1)
    with pytest.raises(Reject) as caught:
        text_field(record.fields(), "text")
    assert caught.value.reason == "bad_record"


@pytest.fixture
def record(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n")
    return next(iter(open_records([tmp_path / "a.jsonl"]).read(0, 1)))


@pytest.mark.parametrize("name", ["/etc/passwd", "../secret.png", "a/../../b.png", "", 7, None, "a\0b", "pipe:cat x"])
def test_picture_paths_stay_below_their_record(record, name):
    with pytest.raises(Reject) as caught:
        record.picture(name)
    assert caught.value.reason in ("bad_path", "bad_record")


def test_a_missing_picture_is_named(record):
    with pytest.raises(Reject, match=r"gone\.png") as caught:
        record.picture("gone.png")
    assert caught.value.reason == "missing_image"


def test_a_picture_is_read_beside_its_record(record, tmp_path):
    (tmp_path / "p.png").write_bytes(picture_bytes(picture("red")))
    assert record.picture("p.png") == (tmp_path / "p.png").read_bytes() and record.home == tmp_path
