"""Fingerprints of raw files: what they see, and what they never read."""

import numpy as np
import pytest

from data_pipeline.errors import UserError
from data_pipeline.prepare import inputs
from data_pipeline.prepare.inputs import check_inputs, describe_inputs, inputs_setting


def test_a_change_at_either_end_of_a_large_file_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "EDGE_BYTES", 1000)
    path = tmp_path / "a"
    content = np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8)
    path.write_bytes(content.tobytes())
    before = describe_inputs([path])
    for place, seen in [(0, True), (999, True), (2500, False), (4000, True), (4999, True)]:
        changed = content.copy()
        changed[place] ^= 1
        path.write_bytes(changed.tobytes())
        assert (describe_inputs([path]) != before) == seen


@pytest.mark.parametrize("size", [0, 1, 1000, 1500, 2000])
def test_small_files_are_read_whole(tmp_path, monkeypatch, size):
    monkeypatch.setattr(inputs, "EDGE_BYTES", 1000)
    path = tmp_path / "a"
    path.write_bytes(bytes(size))
    before = describe_inputs([path])
    for place in {0, size // 2, size - 1} if size else ():
        changed = bytearray(size)
        changed[place] = 1
        path.write_bytes(changed)
        assert describe_inputs([path]) != before


def test_very_many_files_are_summarised_and_still_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "MAX_LISTED", 2)
    entries = [("a", 1, "x"), ("b", 2, "y"), ("c", 3, "z")]
    assert inputs_setting(entries[:2]) == [["a", 1, "x"], ["b", 2, "y"]]
    then, now = inputs_setting(entries), inputs_setting([*entries[:2], ("c", 3, "other")])
    assert then["files"] == 3 and then["bytes"] == 6
    check_inputs(then, inputs_setting(entries), tmp_path)
    with pytest.raises(UserError, match="of other inputs"):
        check_inputs(then, now, tmp_path)


def test_of_too_many_files_name_and_size_must_do(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "MAX_OPENED", 2)
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.write_text("x")
    assert describe_inputs(paths) == [(name, 1, "") for name in "abc"]
    assert all(fingerprint for _, _, fingerprint in describe_inputs(paths[:2]))


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=r"gone\.jsonl: cannot be read"):
        describe_inputs([tmp_path / "gone.jsonl"])
