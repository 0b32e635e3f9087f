"""Hooks that write on a full disk: what they would write is missing, training and the other ranks go on."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from janus_mega.checkpoint.tensor_file import damaged
from janus_mega.config.schema import HealthConfig, SamplesConfig
from janus_mega.engine.interface import StepResult
from janus_mega.observe.sinks import SinkGroup
from janus_mega.train.exits import ReplicasDiffer
from janus_mega.train.health import Health
from janus_mega.train.hooks import samples as samples_module
from janus_mega.train.hooks.replicas import ReplicaHook
from janus_mega.train.hooks.samples import SAMPLES_DIR, SamplesHook
from janus_mega.train.hooks.skips import SKIPPED_FILE, SkipHook
from janus_mega.train.loop import StepEvent
from janus_mega.train.order import FixedOrder
from tests.support.full_disk import fill


def event(step: int, skipped: str = "") -> StepEvent:
    return StepEvent(step, StepResult(1.0, {}, {}, 1.0, 0.1, {}, skipped=skipped), [], data_s=0.0, step_s=0.0)


def test_skipped_steps_need_no_record(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path / SKIPPED_FILE)
    config = HealthConfig()
    hook = SkipHook(Health(config), config, FixedOrder("order"), tmp_path, lambda *_: None)
    for step in (1, 2):
        hook.after_step(event(step, "no number"))
    told = [record.getMessage() for record in caplog.records if "could not be written" in record.getMessage()]
    assert len(told) == 1 and str(tmp_path / SKIPPED_FILE) in told[0]


class Seen:
    """A sink that notes names."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def scalars(self, step: int, values: Any) -> None:
        self.names += values

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        self.names.append(name)

    def text(self, step: int, name: str, content: str) -> None:
        self.names.append(name)

    def close(self) -> None:
        pass


@pytest.mark.parametrize("broken", ["files", "reading", "removing"])
def test_samples_reach_the_other_ranks(broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, barriers, sink = tmp_path / SAMPLES_DIR, [], Seen()

    def fail(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    def refuse(*_: object) -> None:
        raise damaged(folder, OSError(5, "Input/output error"))

    def save_weights(scratch: Path, step: int) -> Path:
        scratch.mkdir(parents=True)
        if broken == "files":
            fill(folder / "step-00000001.png")
            fill(folder / "step-00000001.json.tmp")
        if broken == "removing":
            monkeypatch.setattr(os, "rmdir", fail)
        return scratch

    drawn = (np.zeros((1, 4), np.uint16), np.zeros((1, 3, 2, 2), np.uint8))
    geometry = SimpleNamespace(codebook_size=16)
    model = SimpleNamespace(draw=lambda *_, **__: drawn, dialogue=SimpleNamespace(geometry=geometry))
    monkeypatch.setattr(samples_module, "load_trained", refuse if broken == "reading" else lambda *_: model)
    monkeypatch.setattr(samples_module.dist, "barrier", barriers.append)
    groups: Any = SimpleNamespace(device=torch.device("cpu"), layout=SimpleNamespace(rank=0), host="host")
    saver: Any = SimpleNamespace(own="1", save_weights=save_weights)
    hook = SamplesHook(SamplesConfig(every=1, captions=["a"]), tmp_path, groups, SinkGroup([sink]), saver, {})
    hook.after_step(event(1))
    assert barriers == ["host", "host"]  # rank 0 may draw for longer than collectives of the device wait
    assert ("samples/drawings" in sink.names) == (broken != "reading")
    assert (folder / "step-00000001.json").exists() == (broken == "removing")


def test_ranks_that_differ_are_named_without_a_report(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    odd = [SimpleNamespace(parameter="decoder.weight", why="of 2 copies one differs")]
    replicas: Any = SimpleNamespace(
        differ=lambda: True, find_odd=lambda: odd, note_published=lambda: None, engine=SimpleNamespace()
    )
    groups: Any = SimpleNamespace(layout=SimpleNamespace(rank=0, world_size=1))
    hook = ReplicaHook(replicas, groups, every=4, run_dir=tmp_path / "gone", first_step=8)
    with pytest.raises(ReplicasDiffer, match="rank 0 on .*decoder.weight"):
        hook.look(is_refused=True)
    assert "could not be written" in caplog.text
