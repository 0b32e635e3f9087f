"""Ranks on one machine: forked on the CPU, new processes beside GPUs; what forks by itself hides these."""

import multiprocessing
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from typer.testing import CliRunner

from data_pipeline.errors import UserError
from janus_mega.cli.main import app
from janus_mega.cli.ranks import on_ranks
from janus_mega.demo.run import _import_libraries
from janus_mega.parallel import forked
from janus_mega.parallel.groups import init_distributed
from janus_mega.train.exits import RunEnded

HIDDEN = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


@pytest.fixture
def eight_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7")
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)


def join_and_end(config: tuple[Path, int]) -> None:
    folder, code = config
    init_distributed()
    total = torch.tensor([float(os.environ["LOCAL_RANK"]) + 1.0])
    dist.all_reduce(total)
    (folder / os.environ["RANK"]).write_text(f"{total.item()} {type(multiprocessing.current_process()).__name__}")
    ended = RunEnded("told by a rank")
    ended.exit_code = code
    raise ended


@pytest.mark.dist
def test_ranks_with_gpus_are_new_processes_that_join(eight_gpus: None, tmp_path: Path) -> None:
    """New processes see the truth, so they join on the CPU here."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    with pytest.raises(RunEnded, match="told by a rank") as ended:
        on_ranks(join_and_end, (tmp_path, 75), 2, 1)
    assert ended.value.exit_code == 75
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["3.0 SpawnProcess"] * 2


def test_more_ranks_than_gpus_are_refused(eight_gpus: None) -> None:
    with pytest.raises(UserError, match="--ranks 9 needs a GPU for each rank, 8 are visible") as caught:
        on_ranks(print, None, 9, 1)
    assert "\n" not in str(caught.value)


def test_asking_for_gpus_leaves_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("CUDA was started in the forking process"))
    monkeypatch.setattr(forked, "codes_of_ranks", lambda *_, **__: [0, 0])
    on_ranks(print, None, 2, 1)


def test_one_rank_runs_beside_gpus(eight_gpus: None) -> None:
    ran: list[str] = []
    on_ranks(ran.append, "here", 1, 1)
    assert ran == ["here"]


def test_the_demo_hides_gpus_before_it_imports(eight_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)  # the first import fails
    with pytest.raises(UserError, match="scikit-learn"):
        _import_libraries()
    assert {name: os.environ[name] for name in HIDDEN} == HIDDEN


def test_comparing_layouts_hides_gpus_before_it_imports(eight_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setitem(sys.modules, "janus_mega.config.load", None)  # the first import fails
    failed = CliRunner().invoke(app, ["verify-layout", "run/tiny_cpu.yaml"])
    assert isinstance(failed.exception, ImportError)
    assert {name: os.environ[name] for name in HIDDEN} == HIDDEN
