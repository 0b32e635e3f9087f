"""Whoever lives counts as alive, however long it takes to read what all ranks tell."""

import errno
import itertools
import json
import time
from pathlib import Path
from typing import Any

import pytest

from janus_mega.config.schema import HealthConfig
from janus_mega.observe.pulse import Pulse
from janus_mega.parallel.groups import COLLECTIVE_TIMEOUT_S
from janus_mega.train import watch
from janus_mega.train.watch import LONG_PHASE_FACTOR, Watch, collective_timeout_s

TIMEOUT_S = 0.3
READING_S = 0.4  # longer than a rank is given to beat


@pytest.mark.parametrize(
    ("beats", "reports"), [(itertools.count(), 0), (itertools.repeat(1), 1)], ids=["lives", "dead"]
)
def test_a_slow_rank_is_waited_for_where_reading_is_slow_too(
    beats: Any, reports: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "_LIVE_S", 0.1)
    pulse = Pulse()
    pulse.is_long_phase = False
    watching = Watch(pulse, HealthConfig(hang_timeout_s=TIMEOUT_S), tmp_path, None)

    def read_all() -> dict[int, dict[str, Any]]:
        told = {"rank": 1, "beat": next(beats), "waits_in": "", "without_progress_s": 0.0, "limit_s": 9.0}
        time.sleep(READING_S)
        return {1: told}

    monkeypatch.setattr(watching._heartbeat, "read_all", read_all)
    with watching:
        time.sleep(6 * READING_S)
    assert len(list(tmp_path.glob("hang-*.json"))) == reports


def test_where_nobody_is_heard_nobody_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full disk the beats of all ranks are old, this one's too."""
    monkeypatch.setattr(watch, "_LIVE_S", 0.1)
    pulse = Pulse()
    pulse.is_long_phase = False
    watching = Watch(pulse, HealthConfig(hang_timeout_s=TIMEOUT_S), tmp_path, None)

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(watching._heartbeat, "beat", refuse)
    with watching:
        time.sleep(2.0)
    (report,) = tmp_path.glob("hang-*.json")
    assert json.loads(report.read_text())["culprits"] == []


@pytest.mark.parametrize("hang_timeout_s", [0.0, 60.0, 600.0, 7200.0])
def test_a_watchdog_ends_a_job_before_torch_does(hang_timeout_s: float, tmp_path: Path) -> None:
    """In its longest phases too, such as that before the end of the first step; with time to look around."""
    config = HealthConfig(hang_timeout_s=hang_timeout_s)
    longest = Watch(Pulse(), config, tmp_path, None).limit_s()
    assert longest == LONG_PHASE_FACTOR * hang_timeout_s
    assert collective_timeout_s(config) >= max(COLLECTIVE_TIMEOUT_S, longest + 60.0 * (longest > COLLECTIVE_TIMEOUT_S))
