"""The loop: every step's micro-batches, counts and rate reach the engine in order; hooks hear of each step once."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from janus_mega.config.schema import Schedule
from janus_mega.engine.interface import StepResult
from janus_mega.parallel.groups import ProcessGroups
from janus_mega.parallel.layout import Layout
from janus_mega.train.loop import StepEvent, train
from tests.support.tiny import fp32, tiny_recipe


class CountingWorkload:
    """Batches are (step, dp_rank, number)."""

    def batches(self, dp_rank: int, dp_size: int, first_step: int, last_step: int) -> Any:
        for step in range(first_step, last_step):
            yield [(step, dp_rank, number) for number in range(4 // dp_size)]

    def place(self, batch: Any, groups: ProcessGroups) -> Any:
        return ("placed", *batch)

    def count_labels(self, batch: Any) -> Tensor:
        return torch.tensor([1, batch[2]])


class RecordingEngine:
    """Says what it was asked; optionally fails at a step."""

    def __init__(self, fails_at: int = -1) -> None:
        self.calls: list[tuple[list[Any], list[int], float]] = []
        self._fails_at = fails_at

    def train_step(self, micro_batches: Sequence[Any], label_counts: Tensor, lr: float) -> StepResult:
        if len(self.calls) == self._fails_at:
            raise FloatingPointError("loss sums per task are [nan]")
        self.calls.append((list(micro_batches), label_counts.tolist(), lr))
        return StepResult(1.0, {}, {}, 1.0, lr, {})


class Listener:
    def __init__(self, name: str, heard: list[Any]) -> None:
        self._name, self._heard = name, heard

    def after_step(self, event: StepEvent) -> None:
        assert 0 <= event.data_s <= event.step_s
        self._heard.append((self._name, event.step, len(event.batches)))

    def at_end(self, step: int) -> None:
        self._heard.append((self._name, "end", step))


def groups_of(rank: int, world_size: int) -> ProcessGroups:
    group: Any = None
    return ProcessGroups(Layout(world_size, 1, 1, rank), torch.device("cpu"), *[group] * 6)


def recipe(last_step: int) -> Any:
    return replace(
        tiny_recipe(Path("unused"), fp32(), last_step, schedule=Schedule.cosine, warmup_steps=2), num_steps=4
    )


def test_engine_gets_every_step_of_its_dp_rank() -> None:
    engine = RecordingEngine()
    assert train(engine, CountingWorkload(), recipe(3), groups_of(1, 2), [], first_step=1) == 3
    batches, counts, rates = zip(*engine.calls, strict=True)
    assert batches == (
        [("placed", 1, 1, 0), ("placed", 1, 1, 1)],
        [("placed", 2, 1, 0), ("placed", 2, 1, 1)],
    )
    assert counts == ([2, 1], [2, 1])
    assert rates == pytest.approx((1e-3, 1e-3))  # end of the warm-up, peak: steps count from the stage's start


def test_hooks_hear_in_order_and_of_the_end() -> None:
    heard: list[Any] = []
    train(
        RecordingEngine(),
        CountingWorkload(),
        recipe(2),
        groups_of(0, 1),
        [Listener("a", heard), Listener("b", heard)],
        0,
    )
    assert heard == [("a", 1, 4), ("b", 1, 4), ("a", 2, 4), ("b", 2, 4), ("a", "end", 2), ("b", "end", 2)]


class Sleeper:
    """A hook that takes its time, and notes what steps took."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def after_step(self, event: StepEvent) -> None:
        self.seconds.append(event.step_s)
        time.sleep(0.5)

    def at_end(self, step: int) -> None:
        """Nothing."""


def test_what_hooks_take_belongs_to_no_step() -> None:
    sleeper = Sleeper()
    train(RecordingEngine(), CountingWorkload(), recipe(4), groups_of(0, 1), [sleeper], 0)
    assert len(sleeper.seconds) == 4
    assert sum(sleeper.seconds) < 1.0  # three naps would be 1.5


def test_a_step_that_failed_is_not_told() -> None:
    heard: list[Any] = []
    with pytest.raises(FloatingPointError):
        train(RecordingEngine(fails_at=1), CountingWorkload(), recipe(4), groups_of(0, 1), [Listener("a", heard)], 0)
    assert heard == [("a", 1, 4)]
