"""Lines come back as objects; damage is named, and only half a line at the end of a log is none."""

from pathlib import Path

import pytest

from data_pipeline.errors import UserError
from janus_mega.observe.json_lines import json_objects, read_lines


def test_only_what_follows_the_last_newline_may_be_no_line(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"step": 1}\n{"text": "a\u2028b"}\n{"step"', encoding="utf-8")
    assert read_lines(path) == [{"step": 1}, {"text": "a\u2028b"}]
    for damaged in (b'{"step": 1}\n{"st\n{"step": 3}\n', b'{"step": 1}\n\xff\n', b'{"step": 1}\n[]\n'):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"lines\.jsonl:2: damaged.*remove the line"):
            read_lines(path)


def test_lines_nested_without_end_are_damaged() -> None:
    with pytest.raises(UserError, match="items:1: damaged"):
        list(json_objects([b"[" * 200_000], Path("items")))
