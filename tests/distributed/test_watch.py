"""A rank that stops is named by the others, soon and with stacks; what is slow and goes on alarms nobody."""

import json
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from janus_mega.checkpoint.disk import Disk
from janus_mega.config.schema import CheckpointConfig, HangAction, HealthConfig
from janus_mega.observe.pulse import Pulse
from janus_mega.parallel.forked import _rank_main, codes_of_ranks
from janus_mega.parallel.groups import build_groups
from janus_mega.train import run as run_module
from janus_mega.train import watch
from janus_mega.train.hooks.checkpoints import CheckpointHook
from janus_mega.train.watch import HANG_EXIT_CODE, Watch
from tests.distributed.layout_runs import import_what_ranks_need
from tests.support.full_disk import largest_file
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
        checkpoint=CheckpointConfig(save_every=2 if disturb in SLOW else 0),
        validate_every=2 if disturb in (slow_loading, slow_scoring) else 0,
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


def sigstop_in_last_save(engine: Any, run_dir: Path) -> None:
    """Rank 1 stops while it writes the last checkpoint, for which the other one waits."""
    create = Disk.create

    def stopping(self: Disk, path: Path) -> Any:
        if dist.get_rank() == 1:
            (run_dir / STOPPED_FILE).write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGSTOP)
        return create(self, path)

    Disk.create = stopping  # type: ignore[method-assign]


def endless_python(engine: Any, run_dir: Path) -> None:
    def stuck_in_python() -> None:
        time.sleep(600)

    _at_forward(engine, run_dir, stuck_in_python)


def endless_python_and_late_notice(engine: Any, run_dir: Path) -> None:
    """Rank 0, which reports, begins to look into it when rank 1 is nearly done with that."""
    endless_python(engine, run_dir)
    investigate = Watch._investigate

    def late(self: Watch) -> None:
        if dist.get_rank() == 0:
            time.sleep(1.0)
        investigate(self)

    Watch._investigate = late  # type: ignore[method-assign]


def step_limit_s(engine: Any) -> float:
    return max(TIMEOUT_S, watch.STEP_FACTOR * engine.settings.pulse.median_step_s())


def slow_hooks(engine: Any, run_dir: Path) -> None:
    """Rank 0 begins to save after several timeouts, while rank 1 waits for it, in the next step or in the save."""
    after_step = CheckpointHook.after_step

    def slow(self: CheckpointHook, event: Any) -> None:
        if event.step % 2 == 0 and dist.get_rank() == 0:
            time.sleep(2 * step_limit_s(engine))
        after_step(self, event)

    CheckpointHook.after_step = slow  # type: ignore[method-assign]


def slow_loading(engine: Any, run_dir: Path) -> None:
    """Rank 0 takes several timeouts to read each validation set, while rank 1 waits for its first scores."""
    sets = TinyWorkload.validation_sets

    def slow(self: TinyWorkload, dp_rank: int, dp_size: int) -> Any:
        def read(name: str) -> Any:
            if dp_rank == 0:
                time.sleep(3 * TIMEOUT_S)
            return sets(self, dp_rank, dp_size)[name]()

        return {name: partial(read, name) for name in sets(self, dp_rank, dp_size)}

    TinyWorkload.validation_sets = slow  # type: ignore[method-assign]


def slow_scoring(engine: Any, run_dir: Path) -> None:
    """Each of the two parts of a validation takes less than a hook may, both take more."""
    score = engine.score

    def slow(*arguments: Any) -> Any:
        if dist.get_rank() == 0:
            time.sleep(0.6 * watch.LONG_PHASE_FACTOR * step_limit_s(engine))
        return score(*arguments)

    engine.score = slow


def slow_writing(engine: Any, run_dir: Path) -> None:
    """A checkpoint takes several timeouts, beside training, which overtakes it and then waits for it."""
    create = Disk.create

    def slow(self: Disk, path: Path) -> Any:
        time.sleep(0.5 * TIMEOUT_S)
        return create(self, path)

    Disk.create = slow  # type: ignore[method-assign]


def slow_first_step(engine: Any, run_dir: Path) -> None:
    """As if rank 0 compiled, while rank 1 is done with its part and waits."""
    (scheduled,) = engine._scheduled
    forward, calls = scheduled._forward, iter(range(10**6))

    def slow(micro_batch: Any) -> Any:
        if next(calls) == 0 and dist.get_rank() == 0:
            time.sleep(5 * TIMEOUT_S)
        return forward(micro_batch)

    object.__setattr__(scheduled, "_forward", slow)


SLOW = (slow_hooks, slow_loading, slow_scoring, slow_writing, slow_first_step)


def start(run_dir: Path, *arguments: Any, main: Callable[..., None] = train_run) -> list[Any]:
    run_dir.mkdir()
    context = multiprocessing.get_context("fork")
    rest = (2, str(run_dir / "store"), 60.0, 1, main, (run_dir, *arguments))
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


@pytest.mark.parametrize("disturb", [sigstop, endless_python, endless_python_and_late_notice])
def test_a_rank_that_stops_is_named(disturb: Callable[..., None], tmp_path: Path, record_property: Any) -> None:
    run_dir = tmp_path / "run"
    processes = start(run_dir, STEPS, HangAction.abort, disturb)
    try:
        processes[0].join(90)
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
        assert any("janus_mega/engine/step.py" in line for line in report["stacks"]["0"])
        assert processes[0].exitcode == HANG_EXIT_CODE
        if disturb is not sigstop:
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


def test_a_rank_that_stops_in_the_last_save_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for a save makes progress with its own writing only, or a stopped peer would never be noticed."""
    monkeypatch.setattr(watch, "STEP_FACTOR", 8)
    run_dir = tmp_path / "run"
    processes = start(run_dir, 3, HangAction.abort, sigstop_in_last_save)
    try:
        processes[0].join(90)
        assert processes[0].exitcode == HANG_EXIT_CODE
        (path,) = reports(run_dir)
        report = json.loads(path.read_text())
        assert [(culprit["rank"], culprit["why"]) for culprit in report["culprits"]] == [(1, "its heartbeat stopped")]
        assert report["time"] - float((run_dir / STOPPED_FILE).read_text()) <= report["limit_s"] + 5
        assert report["ranks"][0]["phase"] == "CheckpointHook"
    finally:
        end(processes)


def sleep_in_enter(run_dir: Path) -> None:
    """Rank 1 comes to no end of reading the checkpoint to go on from."""
    enter = run_module.enter

    def stuck_in_enter(*arguments: Any) -> Any:
        if dist.get_rank() == 1:
            time.sleep(600)
        return enter(*arguments)

    run_module.enter = stuck_in_enter
    train_run(run_dir, 3, HangAction.abort, lambda engine, run_dir: None)


def test_a_rank_that_stops_before_it_has_found_its_checkpoint_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "LONG_PHASE_FACTOR", 2)
    run_dir = tmp_path / "run"
    processes = start(run_dir, main=sleep_in_enter)
    try:
        processes[0].join(40)
        assert processes[0].exitcode == HANG_EXIT_CODE
        (path,) = reports(run_dir)
        (culprit,) = json.loads(path.read_text())["culprits"]
        assert culprit["rank"] == 1 and "stuck_in_enter" in culprit["at"]
    finally:
        end(processes)


@pytest.mark.parametrize("disturb", SLOW)
def test_what_is_slow_and_goes_on_alarms_nobody(
    disturb: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    monkeypatch.setattr(watch, "STEP_FACTOR", 8)  # the limits of short steps are short, even where the machine is busy
    begun = time.monotonic()
    processes = start(run_dir, 2 if disturb in (slow_loading, slow_scoring) else 4, HangAction.abort, disturb)
    try:
        for process in processes:
            process.join(60)
            assert process.exitcode == 0
        assert time.monotonic() - begun > 4 * TIMEOUT_S
        assert reports(run_dir) == []
        beats = [json.loads(path.read_text()) for path in sorted((run_dir / "heartbeat").glob("rank-*.json"))]
        assert [beat["rank"] for beat in beats] == [0, 1]
    finally:
        end(processes)


def stand_still_without_a_disk(run_dir: Path) -> None:
    pulse = Pulse()
    watching = Watch(pulse, HealthConfig(hang_timeout_s=0.3, hang_action=HangAction.abort), run_dir, None)
    watching._heartbeat.path(0, "stacks.txt").mkdir(parents=True)  # in the way
    with watching, largest_file(0):
        pulse.begin_step()
        pulse.end_step(1)
        time.sleep(30.0)


def test_a_full_disk_keeps_no_hang_from_ending(tmp_path: Path) -> None:
    assert codes_of_ranks(stand_still_without_a_disk, 1, tmp_path) == [HANG_EXIT_CODE]
    assert not list(tmp_path.glob("hang-*"))
