"""Ranks are forked on the CPU only: machines with GPUs are for torchrun, and what forks by itself hides them."""

import os
import sys

import pytest
import torch
from typer.testing import CliRunner

from data_pipeline.errors import UserError
from janus_mega.cli.main import app
from janus_mega.cli.ranks import on_ranks
from janus_mega.demo.run import _import_libraries
from janus_mega.parallel import forked

HIDDEN = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


@pytest.fixture
def eight_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7")
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)


def test_forking_beside_gpus_is_refused(eight_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forked, "codes_of_ranks", lambda *_, **__: pytest.fail("ranks were forked"))
    with pytest.raises(UserError, match=r"8 GPUs are visible; .*torchrun --standalone --nproc_per_node=8") as caught:
        on_ranks(print, None, 2, 1)
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


def test_comparing_layouts_hides_gpus(eight_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    refused = CliRunner().invoke(app, ["verify-layout", "run/tiny_cpu.yaml", "--steps", "0"])
    assert isinstance(refused.exception, UserError)
    assert {name: os.environ[name] for name in HIDDEN} == HIDDEN
