"""Raw records: order, identity, refusals."""

import pytest

from data_pipeline.errors import UserError
from data_pipeline.prepare.records import (
    RawRecord,
    Reject,
    count_records,
    input_files,
    read_picture,
    read_records,
    text_field,
)


def test_records_come_in_the_order_given_and_directories_sorted(tmp_path):
    (tmp_path / "d" / "sub").mkdir(parents=True)
    (tmp_path / "d" / "b.txt").write_text("two\nlines")
    (tmp_path / "d" / "sub" / "a.md").write_text("md")
    (tmp_path / "d" / "ignored.png").write_bytes(b"")
    (tmp_path / "z.jsonl").write_text('{"text": "one"}\n\n  \n{"text": "three"}')
    files = input_files([tmp_path / "z.jsonl", tmp_path / "d"])
    records = list(read_records(files))
    assert [record.fields()["text"] for record in records] == ["one", "three", "two\nlines", "md"]
    assert count_records(files) == len(records)
    assert [str(record).rsplit("/", 1)[1] for record in records] == ["z.jsonl:1", "z.jsonl:4", "b.txt", "a.md"]
    assert records[1].identity({}) == "z.jsonl:4" and records[1].identity({"id": "me"}) == "me"


@pytest.mark.parametrize("name", ["missing.jsonl", "odd.parquet", "empty"])
def test_inputs_that_are_none_are_named(tmp_path, name):
    (tmp_path / "odd.parquet").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=name):
        input_files([tmp_path / name])


@pytest.mark.parametrize(
    "line", [b"{", b"[1]", b"\xff\xfe", b'{"text": 1}', b'{"text": "\\ud800"}', b"{}", b"[" * 99_999]
)
def test_bad_lines_are_rejected_with_a_reason(tmp_path, line):
    with pytest.raises(Reject) as caught:
        text_field(RawRecord(tmp_path / "a.jsonl", 1, line).fields(), "text")
    assert caught.value.reason == "bad_record"


@pytest.mark.parametrize("name", ["/etc/passwd", "../secret.png", "a/../../b.png", "", 7, None, "a\0b"])
def test_picture_paths_stay_below_their_record(tmp_path, name):
    with pytest.raises(Reject) as caught:
        read_picture(RawRecord(tmp_path / "a.jsonl", 1, b""), name)
    assert caught.value.reason in ("bad_path", "bad_record")


def test_a_missing_picture_is_named(tmp_path):
    with pytest.raises(Reject, match=r"gone\.png") as caught:
        read_picture(RawRecord(tmp_path / "a.jsonl", 1, b""), "gone.png")
    assert caught.value.reason == "missing_image"
