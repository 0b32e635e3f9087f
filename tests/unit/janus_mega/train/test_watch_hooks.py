"""Hooks that only look: drawn codes counted, drawings laid out, windows of the profiler, garbage at the same steps."""

import gc
import json
import weakref
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import UserError
from janus_mega.config.schema import SamplesConfig
from janus_mega.engine.interface import StepResult
from janus_mega.train.hooks.collection import CollectionHook
from janus_mega.train.hooks.drawings import code_use, sheet
from janus_mega.train.hooks.profiler import ProfilerHook
from janus_mega.train.hooks.samples import SamplesHook
from janus_mega.train.loop import StepEvent


def event(step: int) -> StepEvent:
    return StepEvent(step, StepResult(1.0, {}, {}, 1.0, 0.1, {}), [], data_s=0.0, step_s=0.0)


def test_codes_are_counted_over_all_drawings() -> None:
    assert code_use(np.array([[0, 1], [2, 3]], np.uint16), 16) == (0.25, 2.0)
    assert code_use(np.full((3, 4), 5, np.uint16), 16) == (1 / 16, 0.0)


def test_drawings_lie_in_rows_of_eight() -> None:
    pictures = np.stack([np.full((3, 2, 2), number, np.uint8) for number in range(9)])
    grid = sheet(pictures)
    assert grid.shape == (4, 16, 3)
    assert grid[0, 15, 0] == 7 and grid[2, 0, 0] == 8 and grid[3, 2, 0] == 255


def test_a_picture_that_cannot_be_read_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "no.png").write_bytes(b"text")
    for name in ("no.png", "missing.png"):
        config = SamplesConfig(every=1, questions={str(tmp_path / name): "what is it"})
        with pytest.raises(UserError, match=f"samples.questions: .*{name}"):
            SamplesHook(config, tmp_path, None, None, None, {})  # type: ignore[arg-type]


@pytest.mark.parametrize(("completed", "last", "is_written"), [(0, 4, True), (1, 2, True), (2, 4, True), (3, 5, False)])
def test_the_window_is_written_once_it_was_entered(completed: int, last: int, is_written: bool, tmp_path: Path) -> None:
    hook = ProfilerHook(tmp_path, 1, (2, 3), completed)
    for step in range(completed + 1, last + 1):
        hook.after_step(event(step))
    hook.at_end(last)
    path = tmp_path / "profile" / "steps-2-3-rank-1.json"
    assert path.exists() == is_written
    if is_written:
        assert "traceEvents" in json.loads(path.read_text())


def test_a_trace_that_cannot_be_written_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "profile").write_text("a file where the folder would be")
    hook = ProfilerHook(tmp_path, 0, (1, 1), 0)
    hook.after_step(event(1))
    assert "steps-1-1-rank-0.json: could not be written" in caplog.text


def test_garbage_is_collected_at_given_steps_only(monkeypatch: pytest.MonkeyPatch) -> None:
    collected: list[int] = []
    hook = CollectionHook(every=3)
    monkeypatch.setattr(gc, "collect", lambda: collected.append(0))
    assert not gc.isenabled()
    for step in range(1, 8):
        hook.after_step(event(step))
    hook.at_end(7)
    assert gc.isenabled()
    assert len(collected) == 2


class Knot:
    """Garbage that only a collection finds."""

    def __init__(self) -> None:
        self.itself = self


def test_a_collection_finds_what_steps_leave_behind_and_passes_over_the_rest() -> None:
    before = Knot()
    hook = CollectionHook(every=1)
    left_behind = weakref.ref(Knot())
    assert gc.get_freeze_count() > 0 and all(thing is not before for thing in gc.get_objects())
    hook.after_step(event(1))
    assert left_behind() is None
    hook.at_end(1)
    assert gc.get_freeze_count() == 0 and any(thing is before for thing in gc.get_objects())
