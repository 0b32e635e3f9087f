"""Readers killed at random moments go on with the same global batches, also in another layout.

A case is a run of some legs. A leg is a process of its own that reads every rank of some layout through the real
loader, logs the hash of each global batch and saves where it stands, until it is killed; the next leg has another
layout.
"""

import json
import os
import random
import signal
import time
import warnings
from pathlib import Path

import pytest

from data_pipeline.files import write_aside
from data_pipeline.stream.assemble import combine_digests
from data_pipeline.stream.dataset import RowDataset
from data_pipeline.stream.loader import build_loader, row_digests

NUM_STEPS = 24
GLOBAL_BATCH_SIZE = 8
CASES = 50
DEADLINE_S = 60.0


@pytest.fixture(scope="module")
def expected(shards):
    dataset = RowDataset(shards.open(global_batch_size=GLOBAL_BATCH_SIZE))
    return [dataset.step_hash(step) for step in range(NUM_STEPS)]


def read_leg(shards, folder: Path, world_size: int, num_workers: int) -> None:
    """Goes on from the saved state to the last step."""
    data = shards.open(global_batch_size=GLOBAL_BATCH_SIZE, num_workers=num_workers)
    state_file = folder / "state.json"
    first_step = 0
    if state_file.exists():
        state = json.loads(state_file.read_bytes())
        data.plan.restore(state["cursor"])
        first_step = state["consumed_rows"] // GLOBAL_BATCH_SIZE
    loaders = [
        build_loader(
            data,
            micro_batch_size=1,
            dp_rank=rank,
            dp_size=world_size,
            first_step=first_step,
            num_steps=NUM_STEPS - first_step,
        )
        for rank in range(world_size)
    ]
    for step, ranks in enumerate(zip(*loaders, strict=True), start=first_step):
        digest = combine_digests([digest for batches in ranks for digest in row_digests(batches)])
        with (folder / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps([step, digest]) + "\n")
        state = {"consumed_rows": (step + 1) * GLOBAL_BATCH_SIZE, "cursor": data.plan.cursor_at(step + 1)}
        write_aside(state_file, json.dumps(state).encode())


def start_leg(*args) -> int:
    """Forks a leg into a process group of its own, so that a kill takes its workers along; returns its pid."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking where torch has threads
        pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read_leg(*args)
        code = 0
    finally:
        os._exit(code)


def logged(folder: Path) -> list[list]:
    """Whole lines of the log; a kill may have cut the last one."""
    path = folder / "log.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def wait_for_lines(folder: Path, count: int, pid: int) -> bool:
    """Waits until the log has `count` lines; whether the leg ended before."""
    deadline = time.monotonic() + DEADLINE_S
    while len(logged(folder)) < count:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return True
        assert time.monotonic() < deadline, "the leg stands still"
        time.sleep(0.001)
    return False


def run_case(shards, folder: Path, choose: random.Random) -> int:
    """Reads all steps, killed up to two times; returns how often it was."""
    kills = 0
    while True:
        layout = choose.choice([1, 2, 4, 8]), choose.choice([0, 0, 0, 0, 1, 3])
        pid = start_leg(shards, folder, *layout)
        if kills == 2:
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
            return kills
        if wait_for_lines(folder, len(logged(folder)) + choose.randrange(1, 7), pid):
            return kills
        time.sleep(choose.random() * 0.005)
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        kills += 1


@pytest.mark.parametrize("case", range(CASES))
def test_killed_readers_go_on_with_the_same_batches(shards, expected, tmp_path, case):
    choose = random.Random(case)
    for attempt in range(3):  # a busy machine may let a leg finish before it is killed
        folder = tmp_path / str(attempt)
        folder.mkdir()
        kills = run_case(shards, folder, choose)
        found = logged(folder)
        assert {step for step, _ in found} == set(range(NUM_STEPS))
        assert all(digest == expected[step] for step, digest in found)
        if kills:
            return
    pytest.fail("no leg could be killed")
