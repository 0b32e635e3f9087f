"""Progress is the end of a step or the begin of what follows it; phases within a step are none."""

import time

from janus_mega.observe.pulse import Pulse


def test_phases_of_a_step_are_no_progress() -> None:
    pulse = Pulse()
    pulse.begin_step()
    began = pulse.progress_at
    pulse.enter("forward_backward")
    pulse.micro_batch += 3
    assert (pulse.phase, pulse.micro_batch, pulse.progress_at) == ("forward_backward", 3, began)
    pulse.end_step(1)
    assert pulse.progress_at > began
    pulse.begin_step()
    assert (pulse.step, pulse.phase, pulse.micro_batch) == (1, "data", 0)


def test_before_the_first_step_and_in_hooks_all_takes_long() -> None:
    pulse = Pulse()
    pulse.begin_step()
    assert pulse.is_long_phase
    pulse.end_step(1)
    pulse.begin_hook("CheckpointHook")
    assert (pulse.phase, pulse.is_long_phase) == ("CheckpointHook", True)
    pulse.begin_step()
    assert not pulse.is_long_phase


def test_the_median_leaves_hooks_out() -> None:
    pulse = Pulse()
    assert pulse.median_step_s() == 0
    for step in range(3):
        pulse.begin_step()
        time.sleep(0.01)
        pulse.end_step(step + 1)
        time.sleep(0.3)
    assert 0.01 <= pulse.median_step_s() < 0.2
