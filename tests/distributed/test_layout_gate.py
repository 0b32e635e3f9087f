"""Before the first step: a layout that was asked for must have passed, once."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.errors import UserError
from janus_mega.config.load import load_config
from janus_mega.config.schema import RunConfig, VerifyLayout
from janus_mega.train import layout_gate
from janus_mega.train.layout_gate import PASSED_FILE, require_verified

pytestmark = pytest.mark.dist

UNDER_SRUN = {
    "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "RANK": "0", "WORLD_SIZE": "8",
    "LOCAL_RANK": "0", "MASTER_ADDR": "node1", "MASTER_PORT": "29500",
}  # fmt: skip


@pytest.fixture
def config(run_dir: Path) -> RunConfig:
    options = [f"run_dir={run_dir}", "parallel.verify_layout=before_start", "parallel.zero_stage=2"]
    return load_config(RunConfig, "run/tiny_cpu.yaml", options).config


def _must_not_run(*arguments: object) -> tuple[int, str]:
    raise AssertionError("the layout was checked again")


def test_a_layout_passes_once(config: RunConfig, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in UNDER_SRUN.items():
        monkeypatch.setenv(name, value)
    require_verified(config, world_size=8)  # checked on two ranks
    kept = json.loads((run_dir / PASSED_FILE).read_text(encoding="utf-8"))
    assert kept["passed"] and kept["world_size"] == 2 and kept["layout"] == "tp 1 x pp 1 x dp 2, ZeRO-2"
    assert [path.name for path in run_dir.iterdir()] == [PASSED_FILE]
    monkeypatch.setattr(layout_gate, "_run_command", _must_not_run)
    require_verified(config, world_size=16)
    require_verified(replace(config, name="another", stage=replace(config.stage, num_steps=7)), world_size=2)
    with pytest.raises(AssertionError, match="checked again"):
        require_verified(replace(config, parallel=replace(config.parallel, zero_stage=3)), world_size=2)


def test_a_layout_that_trains_wrong_starts_nothing(
    config: RunConfig, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout_gate, "_run_command", lambda *arguments: (1, "weights  2.0e-03  <-- OFF\nNOT EQUAL"))
    with pytest.raises(UserError, match=r"(?s)does not train as one process does.*NOT EQUAL.*--ranks 2; train on"):
        require_verified(config, world_size=2)
    assert not (run_dir / PASSED_FILE).exists()


def test_nothing_is_checked_unasked(config: RunConfig, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout_gate, "_run_command", _must_not_run)
    require_verified(config, world_size=1)
    require_verified(replace(config, parallel=replace(config.parallel, verify_layout=VerifyLayout.off)), world_size=2)
    assert list(run_dir.iterdir()) == []
