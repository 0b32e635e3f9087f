"""Item-level records come back as written; a damaged line is named."""

import pytest

from data_pipeline.errors import UserError
from janus_mega.evaluate.records import read_records, write_records


def test_round_trip(tmp_path):
    records = [{"uid": "a", "right": True, "answer": "drei ü"}, {"uid": "b", "ids": [1, 2]}]
    write_records(tmp_path / "deep" / "items.jsonl", iter(records))
    assert list(read_records(tmp_path / "deep" / "items.jsonl")) == records
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["items.jsonl"]


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text('{"uid": 1}\n{"uid": \n')
    with pytest.raises(UserError, match=r"items.jsonl:2"):
        list(read_records(path))
    path.write_text("[1]\n")
    with pytest.raises(UserError, match="object"):
        list(read_records(path))
