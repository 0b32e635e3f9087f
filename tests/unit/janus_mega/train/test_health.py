"""Which updates stand: values that are no numbers and spikes are left out and never enter the window."""

import json
import math

import pytest

from janus_mega.config.schema import HealthConfig
from janus_mega.train.health import Health

SPIKES = HealthConfig(spike_sigmas=6.0, spike_window=16)


def values(step: int, loss: float | None = None) -> dict[str, float]:
    """Losses and norm that wander a little."""
    wave = 0.05 * math.sin(step)
    return {"loss": 2.0 + wave if loss is None else loss, "loss/text": 2.0 - wave, "grad_norm": 1.0 + wave}


def feed(health: Health, steps: range, bad: dict[int, float] | None = None) -> list[int]:
    """Steps whose update was left out."""
    skipped = []
    for step in steps:
        reason = health.judge(values(step, (bad or {}).get(step)))
        health.note(step, reason)
        if reason:
            skipped.append(step)
    return skipped


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e6])
def test_one_bad_value_costs_one_step(bad: float) -> None:
    assert feed(Health(SPIKES), range(1, 200), {100: bad}) == [100]


def test_every_value_is_watched() -> None:
    for name in values(0):
        health = Health(HealthConfig())
        assert name in health.judge(values(0) | {name: math.nan})
        assert health.judge(values(1)) == ""


def test_spikes_are_left_alone_unless_asked_for_and_before_the_window_is_half_full() -> None:
    assert feed(Health(HealthConfig()), range(1, 50), {40: 1e6}) == []
    assert feed(Health(SPIKES), range(1, 50), {8: 1e6}) == []
    assert feed(Health(SPIKES), range(1, 50), {9: 1e6}) == [9]


def test_a_fall_and_a_plateau_are_no_spikes() -> None:
    assert feed(Health(SPIKES), range(1, 50), {40: 0.1}) == []
    flat = Health(SPIKES)
    assert [flat.judge({"loss": 2.0}) for _ in range(20)] == [""] * 20
    assert flat.judge({"loss": 2.001}) == ""
    assert flat.judge({"loss": 2.1}) != ""


def test_another_rank_that_refuses_is_followed() -> None:
    """Sums may differ in the last bit; the window of the rank that saw nothing stays as the others'."""
    answers = iter([False] * 10 + [True] + [False] * 5)
    health = Health(SPIKES, lambda mine: mine or next(answers))
    assert feed(health, range(1, 16)) == [11]
    assert len(health.state()["windows"]["loss"]) == 14


def test_a_resumed_record_judges_alike() -> None:
    whole, halves = Health(SPIKES), Health(SPIKES)
    bad = {30: math.nan, 31: 5.0, 32: 2.3}
    feed(whole, range(1, 33), bad)
    feed(halves, range(1, 31), bad)
    state = json.loads(json.dumps(halves.state()))
    assert (state["updates"], state["last_update"], state["skips_in_a_row"]) == (29, 29, 1)
    resumed = Health(SPIKES)
    resumed.restore(state, 30)
    feed(resumed, range(31, 33), bad)
    assert resumed.state() == whole.state()


def test_a_checkpoint_without_a_record_had_all_updates() -> None:
    health = Health(SPIKES)
    health.restore({}, 7)
    assert (health.updates, health.last_update) == (7, 7)


def test_only_older_checkpoints_of_the_same_line_will_do() -> None:
    health = Health(HealthConfig())
    feed(health, range(1, 11), {9: math.nan, 10: math.nan})
    assert [step for step in range(12) if health.is_before_spike(step)] == list(range(8))  # 8 holds the present weights
    early = Health(HealthConfig())
    feed(early, range(1, 5))
    health.go_back(early.state(), 4, 10)
    assert (health.updates, health.last_update, health.skips_in_a_row) == (4, 4, 0)
    assert [step for step in range(12) if health.is_before_spike(step)] == [0, 1, 2, 3]
    feed(health, range(11, 13))
    assert (health.updates, health.last_update) == (6, 12)
    assert [step for step in range(14) if health.is_before_spike(step)] == [0, 1, 2, 3, 4, 10, 11]  # 5 to 9 given up
