"""Saves beside training: each of one instant whatever training does meanwhile, none lost, and failures are told."""

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from janus_mega.checkpoint.claim import Superseded, claim
from janus_mega.checkpoint.disk import Disk
from janus_mega.checkpoint.manager import find_latest, list_checkpoints
from janus_mega.checkpoint.staging import GIB, Snapshot, Staging, in_file_order
from janus_mega.config.schema import HealthConfig
from janus_mega.observe.pulse import Pulse
from janus_mega.parallel.forked import codes_of_ranks
from janus_mega.train.saving import CHECKPOINTS_DIR, SaveFailed
from janus_mega.train.starting import Start
from janus_mega.train.watch import Watch
from tests.support.held import (
    DiskUntil,
    FullDisk,
    ShutDisk,
    SlowDisk,
    groups_of_process,
    held_saver,
    this_rank,
    value_at,
    wrong_elements,
)
from tests.support.ranks import results_of_ranks

pytestmark = pytest.mark.dist

STEPS = 5
HALF = 6000 / GIB
"""GiB that hold about half of what a rank has (10,560 bytes alone, 5,280 of two)."""
SOME = 2500 / GIB


def alias(self: Staging, slices: Any) -> Snapshot:
    """A snapshot that is none: the live tensors, said to be copies."""
    return Snapshot(in_file_order(slices), 0, lambda: None)


def not_holding(snapshot: Any) -> Any:
    """Snapshots that let go at once of what they have not copied."""

    def taken(self: Staging, slices: Any) -> Snapshot:
        found: Snapshot = snapshot(self, slices)
        found.free.set()
        return found

    return taken


def train_and_save(run_dir: Path, checkpoint: dict[str, Any], patch: str = "", seconds: float = 0.01) -> list[str]:
    """Every step is saved through a slow disk and followed at once by the next update; what is wrong in the end."""
    if patch == "no copy":
        Staging.snapshot = alias  # type: ignore[method-assign]
    with held_saver(run_dir, SlowDisk(seconds), keep_last=STEPS, **checkpoint) as (state, saver):
        if patch == "no hold":
            Staging.snapshot = not_holding(Staging.snapshot)  # type: ignore[method-assign]
        for step in range(1, STEPS + 1):
            state.train(step)
            saver.look()
            saver.save(step)
        state.train(STEPS + 1)
        saver.settle()
        assert saver.news()["checkpoint/failed"] == 0
    torch.distributed.barrier()
    found = list_checkpoints(run_dir / CHECKPOINTS_DIR)
    world_size = torch.distributed.get_world_size()
    wrong = [
        f"{entry.path.name}: {what}" for entry in found for what in wrong_elements(entry.path, entry.step, world_size)
    ]
    return [*wrong, *({f"missing {n}" for n in range(1, STEPS + 1)} - {f"missing {entry.step}" for entry in found})]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("staging_gib", [0.0, HALF, SOME, 1 / GIB], ids=["all", "half", "some", "none"])
def test_saves_that_pile_up_are_each_of_their_instant(run_dir: Path, world_size: int, staging_gib: float) -> None:
    found = results_of_ranks(train_and_save, world_size, run_dir, {"staging_gib": staging_gib})
    assert found == [[]] * world_size


@pytest.mark.parametrize(("patch", "staging_gib"), [("no copy", 0.0), ("no hold", SOME)])
def test_trap_without_copy_or_hold_instants_are_mixed(run_dir: Path, patch: str, staging_gib: float) -> None:
    found = results_of_ranks(train_and_save, 1, run_dir, {"staging_gib": staging_gib}, patch)
    assert found[0]


def digests_of_a_save(folder: Path) -> list[dict[str, str]]:
    """Digests of the tensor files by the way they were saved."""
    found = []
    for name, checkpoint in WAYS.items():
        with held_saver(folder / name, **checkpoint) as (state, saver):
            state.train(3)
            saver.save(3)
            saver.settle()
        torch.distributed.barrier()
        directory = find_latest(folder / name / CHECKPOINTS_DIR)
        assert directory
        found.append({p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.glob("tensors*")})
    return found


WAYS: dict[str, dict[str, Any]] = {
    "sync": {"asynchronous": False},
    "all staged": {},
    "half staged": {"staging_gib": HALF},
    "little staged": {"staging_gib": SOME},
    "none staged": {"staging_gib": 1 / GIB},
}


def test_files_do_not_depend_on_how_they_were_written(tmp_path: Path) -> None:
    first, second = results_of_ranks(digests_of_a_save, 2, tmp_path)
    assert first == second == [first[0]] * len(WAYS)
    assert len(first[0]) == 3  # two ranks and the index


def fail_in_the_middle(run_dir: Path, kind: str) -> dict[str, Any]:
    """Step 2 fails on the last rank alone; steps 1 and 3 do not."""
    rank, last = this_rank(), torch.distributed.get_world_size() - 1
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("janus_mega.train.saving").addHandler(handler)
    disk = FullDisk(lambda name: kind == "disk" and rank == last and "step-00000002" in name)
    news = {}
    with held_saver(run_dir, disk, keep_last=3) as (state, saver):
        snapshot = Staging.snapshot
        for step in (1, 2, 3):
            if kind == "copy" and step == 2 and rank == last:
                Staging.snapshot = lambda *_: (_ for _ in ()).throw(RuntimeError("no copy was made"))  # type: ignore
            state.train(step)
            saver.save(step)
            Staging.snapshot = snapshot  # type: ignore[method-assign]
            saver.settle()
            news |= saver.news()
        saver.finish(3)
    torch.distributed.barrier()
    found = list_checkpoints(run_dir / CHECKPOINTS_DIR)
    return {
        "steps": [entry.step for entry in found],
        "wrong": [what for entry in found for what in wrong_elements(entry.path, entry.step, last + 1)],
        "left": sorted(path.name for path in (run_dir / CHECKPOINTS_DIR).glob(".attempt-*/*")),
        "news": news,
        "messages": messages,
    }


@pytest.mark.parametrize(("kind", "reason"), [("disk", "No space left"), ("copy", "no copy was made")])
def test_a_save_that_fails_is_told_and_training_goes_on(run_dir: Path, kind: str, reason: str) -> None:
    first, second = results_of_ranks(fail_in_the_middle, 2, run_dir, kind)
    assert (first["steps"], first["wrong"], first["left"]) == ([1, 3], [], [])
    for rank in (first, second):
        assert (rank["news"]["checkpoint/failed"], rank["news"]["checkpoint/last_saved_step"]) == (1, 3)
        assert rank["news"]["checkpoint/write_seconds"] > 0
    assert any("step 2 was not saved" in message and reason in message for message in second["messages"])
    assert any("step 2 was not saved" in message and "another rank" in message for message in first["messages"])


def fail_at_the_end(run_dir: Path, saves_again: bool) -> list[Any]:
    """The last save fails on rank 1, for good or the first time."""
    fails = 10**9 if not saves_again else 1

    def is_full(name: str) -> bool:
        nonlocal fails
        if this_rank() == 1 and "step-00000002/tensors" in name and fails:
            fails -= 1
            return True
        return False

    with held_saver(run_dir, FullDisk(is_full)) as (state, saver):
        state.train(1)
        saver.save(1)
        state.train(2)
        saver.save(2)
        try:
            path = str(saver.finish(2).name)
        except SaveFailed as error:
            path = f"{error.exit_code} {error}"
    latest = find_latest(run_dir / CHECKPOINTS_DIR)
    assert latest
    return [path, latest.name, wrong_elements(latest, 1 + saves_again, 2)]


@pytest.mark.parametrize("saves_again", [False, True])
def test_the_last_save_is_tried_again_and_its_failure_ends_the_run(run_dir: Path, saves_again: bool) -> None:
    found = results_of_ranks(fail_at_the_end, 2, run_dir, saves_again)
    for path, latest, wrong in found:
        assert latest == ("step-00000002" if saves_again else "step-00000001")
        assert wrong == []
        if saves_again:
            assert path == "step-00000002"
        else:
            assert path.startswith("1 step 2: the last checkpoint was not saved: ")
    if not saves_again:
        assert "No space left" in found[1][0]


def be_superseded(run_dir: Path) -> list[Any]:
    """Another attempt claims the folder while a save is under way; the last rank hears of its end a border later."""
    disk, root, start, told = ShutDisk(), run_dir / CHECKPOINTS_DIR, Start(), []
    with held_saver(run_dir, disk, start, keep_last=3) as (state, saver):
        state.train(1)
        saver.save(1)
        assert disk.reached.wait(20.0)
        torch.distributed.barrier()  # both writers stand before the gate
        if this_rank() == 0:
            claim(root)
        torch.distributed.barrier()
        disk.gate.set()
        saver._writer.let_go(20.0)
        for border in (1, 2, 3):
            try:
                if border > 1 or this_rank() == 0:
                    saver.look()
            except Superseded as error:
                told.append([border, str(error)])
                break
            number = torch.tensor(start.stop.told, dtype=torch.float64)
            torch.distributed.all_reduce(number)  # as a step does with its losses
            start.stop.hear(float(number))
        try:
            saver.finish(1)
        except Superseded as error:
            told.append(["end", str(error)])
    return [told, start.stop.agreed, sorted(path.name for path in root.glob("step-*"))]


def test_all_ranks_of_an_older_attempt_end_at_one_border_and_publish_nothing(run_dir: Path) -> None:
    for told, is_stopped, published in results_of_ranks(be_superseded, 2, run_dir):
        assert [when for when, _ in told] == [2, "end"]
        assert (is_stopped, published) == (False, [])
    assert "attempt 2 has taken over" in told[0][1]


class OvertakenDisk(Disk):
    """Another attempt claims the folder as soon as a checkpoint is published."""

    def sync_directory(self, path: Path) -> None:
        super().sync_directory(path)
        if path.name.startswith(".attempt-") and list_checkpoints(path.parent):
            claim(path.parent)


def be_overtaken(run_dir: Path) -> list[Any]:
    """Rank 0 alone meets the newer attempt, when it looks for old checkpoints."""
    with held_saver(run_dir, OvertakenDisk()) as (state, saver):
        state.train(1)
        saver.save(1)
        try:
            saver.settle()
        except Superseded as error:
            return [str(error), find_latest(run_dir / CHECKPOINTS_DIR) is not None]
    return []


def test_what_one_rank_learns_of_a_newer_attempt_all_learn(run_dir: Path) -> None:
    first, second = results_of_ranks(be_overtaken, 2, run_dir)
    assert "attempt 2 has taken over" in first[0]
    assert second[0]
    assert first[1] and second[1]  # what was published stays


def go_back_at_once(run_dir: Path) -> list[Any]:
    """Goes back to a checkpoint that is still being written."""
    with held_saver(run_dir, SlowDisk(0.02), keep_last=1) as (state, saver):
        state.train(1)
        saver.save(1)
        state.train(2)
        found = saver.go_back(lambda step: step == 1, 2)
        values = [torch.equal(piece.tensor, value_at(1, piece)) for piece in state.owned]
        saver.settle()
    torch.distributed.barrier()
    return [found, values, [entry.step for entry in list_checkpoints(run_dir / CHECKPOINTS_DIR)]]


def test_going_back_waits_for_what_is_being_written(run_dir: Path) -> None:
    assert results_of_ranks(go_back_at_once, 2, run_dir) == [[1, [True] * 3, [2]]] * 2


def look_at_weights_at_once(run_dir: Path) -> list[Any]:
    with held_saver(run_dir, SlowDisk(0.02)) as (state, saver):
        state.train(1)
        saver.save(1)
        weights = saver.save_weights(run_dir / "weights", 1)
        again = saver.finish(1)
    return [weights.parent.name, again.parent.name, len(list_checkpoints(run_dir / CHECKPOINTS_DIR))]


def test_weights_for_others_are_no_checkpoint_of_the_run(run_dir: Path) -> None:
    assert results_of_ranks(look_at_weights_at_once, 2, run_dir) == [["weights", CHECKPOINTS_DIR, 1]] * 2


def keep_two(run_dir: Path) -> list[int]:
    with held_saver(run_dir, keep_last=2, keep_every=3) as (state, saver):
        for step in range(1, 7):
            state.train(step)
            saver.save(step)
        saver.settle()
    torch.distributed.barrier()
    return [entry.step for entry in list_checkpoints(run_dir / CHECKPOINTS_DIR)]


def test_old_checkpoints_go_in_the_background(run_dir: Path) -> None:
    assert results_of_ranks(keep_two, 2, run_dir) == [[3, 5, 6]] * 2


class Forking(torch.utils.data.Dataset[int]):
    """Its workers log, allocate and use threads of torch."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, number: int) -> int:
        logging.getLogger("janus_mega.train.saving").info("row %d", number)
        return int(torch.ones(1000, 100).sum()) + number


def fork_while_writing(run_dir: Path) -> list[Any]:
    disk = ShutDisk()
    with held_saver(run_dir, disk) as (state, saver):
        for step in (1, 2, 3):
            disk.gate.clear()
            state.train(step)
            saver.save(step)
            loader = torch.utils.data.DataLoader(Forking(), num_workers=2, timeout=20)
            rows = sorted(int(row) for row in loader)  # workers start, work and end while the writer stands
            disk.gate.set()
            saver.settle()
    return [rows[-1], wrong_elements(saver.finish(3), 3, 2), saver.news()["checkpoint/failed"]]


def test_workers_forked_beside_a_writer_neither_hang_nor_harm(run_dir: Path) -> None:
    assert results_of_ranks(fork_while_writing, 2, run_dir, timeout_s=60.0) == [[100_005, [], 0]] * 2


def wait_long(run_dir: Path, ticks: bool) -> list[str]:
    """The last save takes several times what the watchdog allows, or until it has noticed."""
    groups, pulse = groups_of_process(), Pulse()
    disk = SlowDisk(0.5) if ticks else DiskUntil(lambda: any(run_dir.glob("hang-*.json")))
    with (
        Watch(pulse, HealthConfig(hang_timeout_s=0.3), run_dir, groups),
        held_saver(run_dir, disk, Start(pulse=pulse) if ticks else None) as (state, saver),
    ):
        pulse.begin_step()
        pulse.end_step(1)
        pulse.begin_hook("CheckpointHook")
        state.train(1)
        saver.finish(1)
    return sorted(path.name for path in run_dir.glob("hang-*.json"))


@pytest.mark.parametrize("ticks", [True, False])
def test_a_long_wait_for_the_writer_is_no_hang(run_dir: Path, ticks: bool) -> None:
    ((reports),) = results_of_ranks(wait_long, 1, run_dir, ticks)
    assert bool(reports) == (not ticks)


def lose_a_peer(run_dir: Path) -> None:
    """Rank 1 dies in the middle of writing; rank 0 ends by itself, without a barrier that nobody else would come to."""
    disk, start = ShutDisk(), Start()
    with held_saver(run_dir, disk, start) as (state, saver):
        state.train(1)
        saver.save(1)
        assert disk.reached.wait(20.0)
        torch.distributed.barrier()
        if this_rank() == 1:
            os._exit(9)
        disk.gate.set()
        saver.settle()
        told = {**saver.news(), "lost": start.stop.lost}
        start.stop.hear(start.stop.told)  # as at the end of the next step
        try:
            saver.look()
        except SaveFailed as error:
            told["look"] = str(error)
        (run_dir / "told").write_text(json.dumps(told))
    os._exit(0)


def test_a_lost_peer_fails_the_save_and_hangs_nobody(run_dir: Path) -> None:
    assert codes_of_ranks(lose_a_peer, 2, run_dir, timeout_s=60.0) == [0, 9]
    told = json.loads((run_dir / "told").read_text())
    assert (told["checkpoint/failed"], told["lost"]) == (1, True)
    assert told["look"].startswith("the ranks can no longer agree on saves (")
    assert find_latest(run_dir / CHECKPOINTS_DIR) is None
