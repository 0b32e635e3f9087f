"""What a run must not go on without: agreement on saves, and the checkpoint of a state it has gone back to."""

import logging
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from janus_mega.checkpoint.manager import list_checkpoints
from janus_mega.checkpoint.staging import Staging
from janus_mega.train.saving import CHECKPOINTS_DIR, SaveFailed
from janus_mega.train.starting import Start
from tests.support.held import FullDisk, ShutDisk, held_saver, this_rank, wrong_elements
from tests.support.ranks import results_of_ranks

pytestmark = pytest.mark.dist


def lose_the_agreement(run_dir: Path) -> list[Any]:
    """Rank 0 waits for rank 1 for longer than the group allows; rank 1 is still writing when rank 0 hears of it."""
    disk, start, told = ShutDisk(), Start(), []
    with held_saver(run_dir, disk, start) as (state, saver):
        saver._writer._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=1))
        state.train(1)
        if this_rank() == 0:
            disk.gate.set()
        saver.save(1)
        if this_rank() == 0:
            saver._writer.let_go(20.0)
        dist.barrier()
        for border in (1, 2, 3):
            try:
                saver.look()
            except SaveFailed as error:
                told = [border, error.exit_code, str(error), saver._writer.is_busy]
                break
            if this_rank() == 0:
                saver.save(border + 1)  # fails at once, and joins no group that is broken
            number = torch.tensor(start.stop.told, dtype=torch.float64)
            dist.all_reduce(number)  # as a step does with its losses
            start.stop.hear(float(number))
        disk.gate.set()
    return [*told, start.stop.agreed, start.stop.taken_over]


def test_ranks_that_can_no_longer_agree_on_saves_end_at_one_border(run_dir: Path) -> None:
    first, second = results_of_ranks(lose_the_agreement, 2, run_dir, timeout_s=60.0)
    for border, code, message, _, *others in (first, second):
        assert (border, code, others) == (2, 1, [False, False])
        assert "can no longer agree on saves" in message and "start again" in message
    assert second[3]  # it did not wait for its own save


def go_back(run_dir: Path, fails: bool) -> list[Any]:
    """Step 2 is saved, then given up for step 1; saving what is there instead fails on rank 1 or does not."""
    saves = 0

    def is_full(name: str) -> bool:
        nonlocal saves
        saves += "step-00000002/tensors" in name
        return fails and this_rank() == 1 and saves > num_first

    num_first = 10**9
    with held_saver(run_dir, FullDisk(is_full), keep_last=9) as (state, saver):
        for step in (1, 2):
            state.train(step)
            saver.save(step)
        saver.settle()
        num_first = saves
        try:
            saver.go_back(lambda step: step == 1, 2)
        except SaveFailed as error:
            return [str(error)]
        is_busy = saver._writer.is_busy
        saver.save(2)  # as the hook does at the same border
        saver.settle()
    dist.barrier()
    return [is_busy, sorted(entry.path.name for entry in list_checkpoints(run_dir / CHECKPOINTS_DIR))]


def test_what_a_run_went_back_to_is_saved_once_before_it_goes_on(run_dir: Path) -> None:
    names = ["step-00000001", "step-00000002", "step-00000002-1"]
    assert results_of_ranks(go_back, 2, run_dir, False) == [[False, names]] * 2


def test_going_back_without_saving_ends_the_run(run_dir: Path) -> None:
    for (message,) in results_of_ranks(go_back, 2, run_dir, True):
        assert "step 2: the last checkpoint was not saved" in message


def save_without_memory(run_dir: Path) -> list[Any]:
    """There is no memory for copies, neither ahead nor when they are due."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("janus_mega").addHandler(handler)

    def grow(*_: Any) -> None:
        raise MemoryError("no room for a copy")

    Staging._grow = grow  # type: ignore[method-assign,assignment]
    with held_saver(run_dir) as (state, saver):
        state.train(1)
        saver.look()
        saver.save(1)
        state.train(2)  # the save has let go of what it wrote
        path = saver.finish(1)
        state.outlines = None  # type: ignore[assignment]
        saver._is_prepared = False
        saver.look()
    return [wrong_elements(path, 1, 1), messages]


def test_without_memory_for_a_copy_training_waits_and_the_save_is_whole(run_dir: Path) -> None:
    ((wrong, messages),) = results_of_ranks(save_without_memory, 1, run_dir)
    assert wrong == []
    for part in ("no staging memory of", "training waits until it is written", "is not made ahead: TypeError"):
        assert any(part in message for message in messages), messages
