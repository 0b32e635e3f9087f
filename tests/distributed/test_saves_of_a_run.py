"""A run that saves beside training trains and saves, bit for bit, what one does that waits for each save."""

import os
import re
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from janus_mega.checkpoint.disk import Disk
from janus_mega.checkpoint.manager import list_checkpoints
from janus_mega.checkpoint.staging import GIB, Snapshot, Staging, in_file_order
from janus_mega.config.schema import CheckpointConfig, ParallelConfig, Schedule
from janus_mega.observe.sinks import read_metrics
from janus_mega.parallel.groups import build_groups
from janus_mega.train import run as run_module
from janus_mega.train import saving
from janus_mega.train.saving import CHECKPOINTS_DIR, SaveFailed
from tests.support.held import FullDisk, SlowDisk
from tests.support.ranks import results_of_ranks
from tests.support.tiny import STAGE3, TinyWorkload, fp32, tiny_recipe

pytestmark = pytest.mark.dist

ROOT = Path(__file__).resolve().parents[2]
STEPS = 4


def alias(self: Staging, slices: Any) -> Snapshot:
    """A snapshot that is none: the live tensors, said to be copies."""
    return Snapshot(in_file_order(slices), 0, lambda: None)


class LateDisk(Disk):
    """Tensors of a step are written when those in memory are of the next one."""

    def __init__(self) -> None:
        self.num_updates = 0
        self._changed = threading.Condition()
        plain = run_module.train

        def train_and_tell(engine: Any, *rest: Any) -> int:
            step = engine.train_step

            def step_and_tell(*arguments: Any) -> Any:
                result = step(*arguments)
                with self._changed:
                    self.num_updates += 1
                    self._changed.notify_all()
                return result

            engine.train_step = step_and_tell
            return plain(engine, *rest)

        run_module.train = train_and_tell

    def write(self, file: BinaryIO, content: bytes | memoryview) -> None:
        path = Path(str(file.name))
        if path.suffix == ".safetensors":
            step = int(re.search(r"step-(\d{8})", str(path))[1])  # type: ignore[index]
            with self._changed:
                assert self._changed.wait_for(lambda: self.num_updates >= min(step + 1, STEPS), timeout=60.0)
        super().write(file, content)


def train(run_dir: Path, parallel: ParallelConfig, checkpoint: dict[str, Any], patch: str = "") -> str:
    """One run that saves every step, beside training if it can no earlier than the next step; why it failed, or
    empty."""
    saving.DISK = SlowDisk(0.002) if checkpoint else LateDisk()
    if patch == "no copy":
        Staging.snapshot = alias  # type: ignore[method-assign]
    if patch == "full":
        saving.DISK = FullDisk(lambda name: f"step-{STEPS:08d}" in name)
    groups = build_groups(parallel.tp_size, parallel.pp_size)
    recipe = tiny_recipe(run_dir, parallel, STEPS, schedule=Schedule.cosine, warmup_steps=2)
    recipe = replace(recipe, checkpoint=CheckpointConfig(save_every=1, keep_last=2 * STEPS, **checkpoint))
    try:
        run_module.run(TinyWorkload(STAGE3, parallel), recipe, groups)
    except SaveFailed as error:
        return f"{error.exit_code} {error}"
    return ""


def tensor_bytes(run_dir: Path) -> dict[str, bytes]:
    """Content of all files of tensors and their tables, checkpoint by checkpoint."""
    found = list_checkpoints(run_dir / CHECKPOINTS_DIR)
    assert [entry.step for entry in found] == list(range(1, STEPS + 1))
    paths = (path for entry in found for path in sorted(entry.path.glob("tensors*")))
    return {str(path.relative_to(run_dir)): path.read_bytes() for path in paths}


def losses(run_dir: Path) -> list[Any]:
    return [row["loss"] for row in read_metrics(run_dir) if "loss" in row]


LAYOUTS = {
    "dp2_zero1_bf16": (ParallelConfig(), {}),
    "dp2_zero3_some_staged": (fp32(zero_stage=3), {"staging_gib": 300_000 / GIB}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_saving_beside_training_changes_neither_files_nor_training(name: str, tmp_path: Path) -> None:
    parallel, checkpoint = LAYOUTS[name]
    assert results_of_ranks(train, 2, tmp_path / "sync", parallel, {"asynchronous": False}) == ["", ""]
    assert results_of_ranks(train, 2, tmp_path / "async", parallel, checkpoint) == ["", ""]
    expected, found = tensor_bytes(tmp_path / "sync"), tensor_bytes(tmp_path / "async")
    assert found.keys() == expected.keys()
    assert [path for path in expected if found[path] != expected[path]] == []
    assert losses(tmp_path / "async") == losses(tmp_path / "sync")
    rows = read_metrics(tmp_path / "async")
    assert max(row.get("checkpoint/last_saved_step", 0) for row in rows) == STEPS
    assert {row["checkpoint/failed"] for row in rows if "checkpoint/failed" in row} == {0}
    if not checkpoint:
        assert results_of_ranks(train, 2, tmp_path / "trap", parallel, {}, "no copy") == ["", ""]
        assert tensor_bytes(tmp_path / "trap") != expected


def test_a_run_whose_last_save_fails_ends_with_an_error(run_dir: Path) -> None:
    for told in results_of_ranks(train, 2, run_dir, ParallelConfig(), {}, "full"):
        assert told.startswith(f"1 step {STEPS}: the last checkpoint was not saved")
    assert [entry.step for entry in list_checkpoints(run_dir / CHECKPOINTS_DIR)] == list(range(1, STEPS))
    assert read_metrics(run_dir)[-1]["checkpoint/failed"] == 2  # tried again at the end


ENDINGS = """
import os, signal, sys, time
from pathlib import Path
from janus_mega.parallel.groups import init_distributed
from janus_mega.train import saving
from tests.support.held import ShutDisk, SlowDisk, held_saver
init_distributed(timeout_s=60.0)
run_dir, ending = Path(sys.argv[1]), sys.argv[2]
saving.LAST_WAIT_S = 30.0 if ending == "error" else 1.0
disk = SlowDisk(0.2) if ending == "error" else ShutDisk()
with held_saver(run_dir, disk) as (state, saver):
    state.train(1)
    saver.save(1)
    if ending == "stopped peer":
        assert disk.reached.wait(60.0)
        peer = run_dir / "peer"
        if os.environ["RANK"] == "1":
            peer.with_suffix(".new").write_text(str(os.getpid()))
            peer.with_suffix(".new").rename(peer)
            os.kill(os.getpid(), signal.SIGSTOP)
        while not peer.exists() or "State:\tT" not in Path(f"/proc/{peer.read_text()}/status").read_text():
            time.sleep(0.01)
        disk.gate.set()
    raise RuntimeError("the run met an error")
"""


@pytest.mark.parametrize(("ending", "world_size"), [("error", 1), ("error", 2), ("stuck disk", 1), ("stopped peer", 2)])
def test_a_process_that_ends_by_an_error_neither_hangs_nor_crashes(run_dir: Path, ending: str, world_size: int) -> None:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    ranks = []
    for rank in range(world_size):
        job = dict(
            os.environ, RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
        command = [sys.executable, "-W", "ignore", "-c", ENDINGS, str(run_dir), ending]
        with (run_dir / f"said-{rank}").open("wb") as errors:
            ranks.append(subprocess.Popen(command, cwd=ROOT, env=job, stderr=errors))
    try:
        ranks[0].wait(timeout=60)
        said = (run_dir / "said-0").read_text()
        assert ranks[0].returncode == 1, said
        assert "RuntimeError: the run met an error" in said
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    saved = [entry.step for entry in list_checkpoints(run_dir / CHECKPOINTS_DIR)]
    assert saved == ([1] if ending == "error" else [])
