"""What older versions wrote is read, what newer ones wrote is refused with the way out."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.errors import UserError
from janus_mega.checkpoint.format import SCHEMA, UnknownSchema, dump_json, find_damage, read_manifest
from janus_mega.checkpoint.manager import find_latest, save_checkpoint
from janus_mega.checkpoint.reader import open_checkpoint
from janus_mega.checkpoint.retention import apply_retention
from tests.support.checkpoints import TENSORS, rows_of, state

V1 = Path(__file__).parents[3] / "data_files" / "checkpoint_v1" / "step-00000003"
"""Written by two ranks of the version that knew schema 1 alone; the values are `TENSORS`."""


@pytest.fixture
def old(tmp_path: Path) -> Path:
    shutil.copytree(V1, tmp_path / V1.name)
    return tmp_path / V1.name


def rewrite_manifest(directory: Path, **changes: Any) -> None:
    """Changes a manifest and makes its digest right again, as another version would have written it."""
    body = {**json.loads((directory / "manifest.json").read_bytes()), **changes}
    del body["sha256"]
    body["sha256"] = hashlib.sha256(dump_json(body)).hexdigest()
    (directory / "manifest.json").write_bytes(dump_json(body))


def test_schema_1_loads_and_its_damage_is_found(old: Path) -> None:
    assert find_damage(old) is None and find_latest(old.parent) == old
    reader = open_checkpoint(old)
    for name, tensor in TENSORS.items():
        assert torch.equal(reader.read(name), tensor)
    loaded = reader.read_state(1)
    assert (loaded.step, loaded.data_cursor, loaded.counters, loaded.health) == (
        3,
        {"a": [1]},
        {"tokens": 5},
        {"updates": 2},
    )
    assert loaded.rng["torch"].tolist() == [1] * 4
    file = old / "tensors-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1  # of one of that file's tensors, so all of them are refused: it was hashed as a whole
    file.write_bytes(content)
    assert "tensors-00001" in str(find_damage(old))
    with pytest.raises(UserError, match="tensors-00001.*use an older one"):
        open_checkpoint(old).read(next(iter(TENSORS)))


def test_the_manifest_tells_who_wrote_what(tmp_path: Path) -> None:
    about = {"layout": {"tp_size": 2, "zero_stage": 3}, "commit": "abc123"}
    directory = save_checkpoint(tmp_path, rows_of(0, 1), state(4), about=about)
    manifest = read_manifest(directory)
    assert manifest["schema"] == SCHEMA and manifest["layout"] == about["layout"] and manifest["commit"] == "abc123"
    assert (manifest["step"], manifest["attempt"], manifest["world_size"]) == (4, 0, 1)
    assert manifest["config_sha256"] == hashlib.sha256((directory / "config.yaml").read_bytes()).hexdigest()
    assert manifest["plan_digest"] == "ab12"


def test_an_unknown_schema_is_refused_not_passed_over(tmp_path: Path) -> None:
    older = save_checkpoint(tmp_path, rows_of(0, 1), state(1))
    newest = save_checkpoint(tmp_path, rows_of(0, 1), state(2))
    rewrite_manifest(newest, schema="janus-checkpoint/9")
    for look in (open_checkpoint, lambda path: find_latest(path.parent)):
        with pytest.raises(UnknownSchema, match=r"'janus-checkpoint/9' is unknown.*use the version that wrote it"):
            look(newest)
    assert apply_retention(tmp_path, 1) == [] and older.exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"step": "2"},
        {"world_size": -1},
        {"files": []},
        {"files": {}},
        {"files": {"../config.yaml": {"bytes": 1, "sha256": "0" * 64}}},
        {"files": {"/etc/passwd": {"bytes": 1, "sha256": "0" * 64}}},
        {"files": {"tensors.json": {"bytes": 1}, "state.json": {}, "config.yaml": {}}},
    ],
)
def test_a_manifest_of_another_form_is_one_line(tmp_path: Path, changes: dict[str, Any]) -> None:
    directory = save_checkpoint(tmp_path, rows_of(0, 1), state(2))
    if isinstance(changes.get("files"), dict) and len(changes["files"]) == 1:
        changes = {"files": {**read_manifest(directory)["files"], **changes["files"]}}
    rewrite_manifest(directory, **changes)
    with pytest.raises(UserError, match="fields are missing or of another kind; the checkpoint is damaged"):
        open_checkpoint(directory)
