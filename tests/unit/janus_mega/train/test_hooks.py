"""Metrics are means over steps and labels, summed over dp; checkpoints are saved when due and never twice."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from janus_mega.config.schema import LoggingConfig
from janus_mega.engine.interface import StepResult
from janus_mega.observe.progress import Progress
from janus_mega.observe.sinks import SinkGroup
from janus_mega.parallel.groups import build_groups
from janus_mega.train.hooks.checkpoints import CheckpointHook
from janus_mega.train.hooks.metrics import MetricsHook
from janus_mega.train.loop import StepEvent
from janus_mega.train.order import FixedOrder
from tests.support.ranks import results_of_ranks
from tests.support.tiny import fp32, tiny_recipe


class Recorder:
    """A sink that remembers."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.rows.append((step, dict(values)))

    def close(self) -> None:
        """Nothing to close."""


class Measured:
    """A workload whose batches are their own amounts."""

    order = FixedOrder("measured")

    def measure(self, batch: dict[str, int]) -> dict[str, int]:
        return batch

    def flops(self, amounts: Mapping[str, int], label_counts: Mapping[str, int]) -> dict[str, float]:
        return {"mfu_causal": 1e12 * amounts["tokens"] + label_counts["text"]}


def event(step: int, loss: float, counts: dict[str, int], batches: list[dict[str, int]]) -> StepEvent:
    task_losses = {name: loss + position for position, name in enumerate(counts) if counts[name]}
    seconds = {"forward_backward": 0.4, "update": 0.1}
    result = StepResult(loss, task_losses, counts, grad_norm=2 * loss, lr=0.1 * step, seconds=seconds)
    return StepEvent(step, result, batches, data_s=0.5, step_s=2.0)


EVENTS = (
    (1, 1.0, {"text": 10, "image": 0}, [{"tokens": 8, "images": 1}, {"tokens": 4, "images": 0}]),
    (2, 3.0, {"text": 30, "image": 5}, [{"tokens": 20, "images": 2}]),
    (3, 5.0, {"text": 1, "image": 1}, [{"tokens": 6, "images": 3}]),
)


def write_metrics() -> list[Any]:
    groups = build_groups(tp_size=1, pp_size=1)
    recorder = Recorder()
    with Progress("test", 3, enabled=False) as progress:
        recipe = replace(tiny_recipe(Path(), fp32(), 3), logging=LoggingConfig(log_every=2, peak_flops=4e12))
        hook_seconds = {}
        hook = MetricsHook(Measured(), recipe, groups, SinkGroup([recorder]), progress, hook_seconds)
        hook_seconds["save"] = 7.0
        for given in EVENTS:
            hook.after_step(event(*given))
        hook.at_end(3)
        hook.at_end(3)
    return recorder.rows


@pytest.mark.dist
def test_metrics_of_two_ranks() -> None:
    first, second = results_of_ranks(write_metrics, 2)
    assert [row["loss"] for _, row in first] == [row["loss"] for _, row in second]
    (step, row), (last_step, last_row) = first
    assert (step, last_step) == (2, 3)
    assert row["loss"] == pytest.approx(2.0)
    assert row["loss/text"] == pytest.approx((1 * 10 + 3 * 30) / 40)
    assert row["loss/image"] == pytest.approx(4.0)
    assert row["grad_norm"] == pytest.approx(4.0)
    assert row["seconds/forward_backward"] == pytest.approx(0.4)
    assert row["seconds/data"] == pytest.approx(0.5)
    assert row["amount/tokens"] == pytest.approx(2 * 32 / 2)  # two ranks, per step
    assert row["amount/images"] == pytest.approx(2 * 3 / 2)
    assert row["tokens_per_s"] == pytest.approx(2 * 32 / 4.0)
    assert row["tokens_per_s_per_device"] == pytest.approx(32 / 4.0)
    assert row["tflops_per_device/mfu_causal"] == pytest.approx(64 / (4.0 * 2))
    assert row["mfu_causal"] == pytest.approx(64 / (4.0 * 2) / 4)
    assert row["memory/host_peak_gib"] > 0
    assert (row["hook_seconds/save"], "hook_seconds/save" in last_row) == (7.0, False)
    assert row["lr"] == pytest.approx(0.2)
    assert last_row["loss"] == pytest.approx(5.0)
    assert last_row["amount/tokens"] == pytest.approx(12.0)
    assert "lr" not in last_row


def write_skipped() -> Any:
    groups = build_groups(tp_size=1, pp_size=1)
    recorder = Recorder()
    with Progress("test", 3, enabled=False) as progress:
        recipe = replace(tiny_recipe(Path(), fp32(), 3), logging=LoggingConfig(log_every=3))
        hook = MetricsHook(Measured(), recipe, groups, SinkGroup([recorder]), progress, {})
        for step, loss, skipped in ((1, 2.0, ""), (2, float("nan"), "the loss is no number"), (3, 4.0, "")):
            told = event(step, loss, {"text": 10}, [{"tokens": 6}])
            hook.after_step(replace(told, result=replace(told.result, skipped=skipped)))
    return recorder.rows


@pytest.mark.dist
def test_skipped_steps_stay_out_of_losses() -> None:
    (((step, row),),) = results_of_ranks(write_skipped, 1)
    assert (step, row["loss"], row["loss/text"], row["grad_norm"]) == (3, 3.0, 3.0, 6.0)
    assert (row["skipped_steps"], row["amount/tokens"], row["seconds/step"]) == (1, 6.0, 2.0)


class RecordingSaver:
    """A saver that saves nothing; each save has news at the border after it."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.finished: list[int] = []
        self._ended: dict[str, float] = {}

    def save(self, step: int) -> None:
        self.begun.append(step)

    def finish(self, step: int) -> Path:
        self.finished.append(step)
        self.look()
        return Path()

    def look(self) -> None:
        self._ended = {"checkpoint/last_saved_step": self.begun[-1]} if self.begun else {}

    def news(self) -> dict[str, float]:
        ended, self._ended = self._ended, {}
        return ended


@pytest.mark.parametrize(
    ("save_every", "last_step", "begun"), [(2, 4, [2, 4]), (2, 5, [2, 4]), (0, 3, []), (10, 3, [])]
)
def test_saves_begin_when_due_and_the_last_is_waited_for(save_every: int, last_step: int, begun: list[int]) -> None:
    saver, recorder, hook_seconds = RecordingSaver(), Recorder(), {}
    hook = CheckpointHook(saver, save_every, -1, SinkGroup([recorder]), hook_seconds)
    for step in range(1, last_step + 1):
        hook.after_step(event(step, 1.0, {"text": 1}, []))
    hook.at_end(last_step)
    assert (saver.begun, saver.finished) == (begun, [last_step])
    assert ("save" in hook_seconds) == bool(begun)
    assert all(row["checkpoint/last_saved_step"] < step or step == last_step for step, row in recorder.rows)
    assert bool(recorder.rows) == bool(begun)


def test_nothing_is_saved_where_nothing_was_trained() -> None:
    saver = RecordingSaver()
    CheckpointHook(saver, 1, 7, SinkGroup([]), {}).at_end(7)
    assert saver.finished == []
