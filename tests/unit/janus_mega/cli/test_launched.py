"""Tasks of srun become ranks, unless somebody else has said which they are."""

import pytest
from typer.testing import CliRunner

from data_pipeline.errors import UserError
from janus_mega.cli.launched import take_srun_place
from janus_mega.cli.main import app

TASK = {
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
}


def place(**changes: str | None) -> dict[str, str]:
    environ = {name: value for name, value in (TASK | changes).items() if value is not None}
    take_srun_place(environ)
    return {name: environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in environ}


def test_a_task_is_the_rank_of_its_number():
    assert place() == {"RANK": "11", "WORLD_SIZE": "16", "LOCAL_RANK": "3"}


def test_torchrun_under_srun_has_said_it():
    told = {"RANK": "2", "WORLD_SIZE": "8", "LOCAL_RANK": "2"}
    assert place(**told, MASTER_ADDR=None) == told


def test_one_task_or_no_srun_is_left_alone():
    assert place(SLURM_STEP_NUM_TASKS="1") == place(SLURM_STEP_NUM_TASKS=None) == {}


@pytest.mark.parametrize("missing", ["MASTER_ADDR", "MASTER_PORT"])
def test_nowhere_to_meet_is_refused(missing):
    with pytest.raises(UserError, match=f"16 tasks, and no {missing} says where.*before srun: export MASTER_ADDR"):
        place(**{missing: None})


@pytest.mark.parametrize("words", [["train"], ["tokenizer", "train-image"], ["verify-layout"]], ids=" ".join)
def test_commands_that_train_take_their_place(words, monkeypatch):
    for name in (*TASK, "RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    refused = CliRunner().invoke(app, [*words, "run/tiny_cpu.yaml"])
    assert "2 tasks, and no MASTER_ADDR" in str(refused.exception)
