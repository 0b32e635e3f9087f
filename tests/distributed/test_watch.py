"""A rank that stops is named by the others, soon and with stacks; slow savings and validations alarm nobody."""

import json
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from janus_mega.config.schema import CheckpointConfig, HangAction, HealthConfig
from janus_mega.parallel.forked import _rank_main
from janus_mega.parallel.groups import build_groups
from janus_mega.train import run as run_module
from janus_mega.train.hooks.checkpoints import CheckpointHook
from janus_mega.train.watch import HANG_EXIT_CODE
from tests.distributed.layout_runs import import_what_ranks_need
from tests.support.tiny import STAGE3, TinyWorkload, fp32, tiny_recipe

pytestmark = pytest.mark.dist

import_what_ranks_need()

TIMEOUT_S = 1.0
STEPS = 60  # far more than are done before a rank stops
STOPS_AT_FORWARD = 20  # of its own; 4 a step, so the sixth step
STOPPED_FILE = "stopped"


def train_run(run_dir: Path, last_step: int, action: HangAction, disturb: Callable[[Any, Path], None]) -> None:
    """A run on this rank, disturbed."""
    logging.disable(logging.NOTSET)
    parallel = fp32()
    groups = build_groups(1, 1)
    recipe = replace(
        tiny_recipe(run_dir, parallel, last_step),
        checkpoint=CheckpointConfig(save_every=2 if action is HangAction.report else 0),
        health=HealthConfig(hang_timeout_s=TIMEOUT_S, hang_action=action),
    )
    build = run_module.build_engine

    def build_disturbed(*arguments: Any) -> Any:
        engine, shards = build(*arguments)
        disturb(engine, run_dir)
        return engine, shards

    run_module.build_engine = build_disturbed
    run_module.run(TinyWorkload(STAGE3, parallel), recipe, groups)


def _at_forward(engine: Any, run_dir: Path, stop: Callable[[], None]) -> None:
    """Rank 1 stops in one of its forward passes."""
    if dist.get_rank() != 1:
        return
    (scheduled,) = engine._scheduled
    forward, calls = scheduled._forward, iter(range(10**6))

    def stopping(micro_batch: Any) -> Any:
        if next(calls) == STOPS_AT_FORWARD:
            (run_dir / STOPPED_FILE).write_text(str(time.time()))
            stop()
        return forward(micro_batch)

    object.__setattr__(scheduled, "_forward", stopping)


def sigstop(engine: Any, run_dir: Path) -> None:
    _at_forward(engine, run_dir, lambda: os.kill(os.getpid(), signal.SIGSTOP))


def endless_python(engine: Any, run_dir: Path) -> None:
    def stuck_in_python() -> None:
        time.sleep(600)

    _at_forward(engine, run_dir, stuck_in_python)


def slow_hooks(engine: Any, run_dir: Path) -> None:
    """Rank 0 saves for several timeouts while rank 1 waits for it; both do something slow beside."""
    after_step = CheckpointHook.after_step

    def slow(self: CheckpointHook, event: Any) -> None:
        if event.step % 2 == 0 and dist.get_rank() == 0:
            time.sleep(3 * TIMEOUT_S)
        after_step(self, event)

    CheckpointHook.after_step = slow  # type: ignore[method-assign]


def start(run_dir: Path, *arguments: Any) -> list[Any]:
    run_dir.mkdir()
    context = multiprocessing.get_context("fork")
    rest = (2, str(run_dir / "store"), 60.0, 1, train_run, (run_dir, *arguments))
    processes = [context.Process(target=_rank_main, args=(rank, *rest), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    return processes


def end(processes: list[Any]) -> None:
    for process in processes:
        process.kill()
        process.join()


def reports(run_dir: Path) -> list[Path]:
    return sorted(run_dir.glob("hang-*.json"))


@pytest.mark.parametrize("disturb", [sigstop, endless_python])
def test_a_rank_that_stops_is_named(disturb: Callable[..., None], tmp_path: Path, record_property: Any) -> None:
    run_dir = tmp_path / "run"
    processes = start(run_dir, STEPS, HangAction.abort, disturb)
    try:
        processes[0].join(40)
        (path,) = reports(run_dir)
        report = json.loads(path.read_text())
        after_s = report["time"] - float((run_dir / STOPPED_FILE).read_text())
        record_property("named_after_s", after_s)
        assert report["limit_s"] <= after_s <= report["limit_s"] + 5
        (culprit,) = report["culprits"]
        assert culprit["rank"] == 1
        assert culprit["step"] <= report["ranks"][0]["step"] == 5
        assert culprit["pid"] == processes[1].pid
        waiting = report["ranks"][0]
        assert waiting["waits_in"] == "all_reduce over world"
        assert waiting["at"].startswith("janus_mega/engine/step.py")
        assert any("_read" in line for line in report["stacks"]["0"])
        assert processes[0].exitcode == HANG_EXIT_CODE
        if disturb is endless_python:
            assert culprit["why"] == "is busy while others wait in all_reduce over world"
            assert (culprit["phase"], culprit["step"], culprit["micro_batch"]) == ("forward_backward", 5, 1)
            assert "stuck_in_python" in culprit["at"]
            assert any("stuck_in_python" in line for line in report["stacks"]["1"])
            processes[1].join(10)
            assert processes[1].exitcode == HANG_EXIT_CODE
        else:
            assert culprit["why"] == "its heartbeat stopped"
    finally:
        end(processes)


def test_slow_hooks_alarm_nobody(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    processes = start(run_dir, 4, HangAction.report, slow_hooks)
    try:
        for process in processes:
            process.join(60)
            assert process.exitcode == 0
        assert reports(run_dir) == []
        beats = [json.loads(path.read_text()) for path in sorted((run_dir / "heartbeat").glob("rank-*.json"))]
        assert [beat["rank"] for beat in beats] == [0, 1]
        assert not list((run_dir / "heartbeat").glob("*.stacks.txt"))
    finally:
        end(processes)
