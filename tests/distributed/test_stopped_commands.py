"""Signals and faults meet the command line: `janus-mega train` on real shards, with loader workers, alone and on ranks.

Each command is a fork that leads a process group of its own. Signals go to the whole group, as terminals and SLURM send
them: to the parent, to its ranks and to every worker of their loaders.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from janus_mega.checkpoint.claim import claim
from janus_mega.checkpoint.manager import list_checkpoints
from janus_mega.checkpoint.reader import open_checkpoint
from janus_mega.cli import main as cli
from janus_mega.config.load import save
from janus_mega.config.schema import CheckpointConfig, HangAction, HealthConfig
from janus_mega.parallel.groups import ProcessGroups
from janus_mega.train.faults import VARIABLE
from janus_mega.train.janus import JanusWorkload
from tests.distributed.test_watching import plain_config
from tests.support.ranks import import_what_ranks_need
from tests.support.shards import TinyShards, make_shards
from tests.support.tiny import fp32

pytestmark = [pytest.mark.dist, pytest.mark.filterwarnings("ignore:This DataLoader will create")]

import_what_ranks_need()

STEPS = 12
PATIENCE_S = 60.0


@dataclass
class Command:
    """A command that runs in a process group of its own."""

    pid: int
    log: Path

    def wait(self) -> int:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        os.killpg(self.pid, signal.SIGKILL)
        raise AssertionError(f"the command does not end:\n{self.said()}")

    def said(self) -> str:
        return self.log.read_text()


class Border:
    """A step that ranks begin when the test says so, so that what it does meanwhile comes in time."""

    def __init__(self, folder: Path, step: int = 4) -> None:
        self._folder = folder / f"border-{step}"
        self._folder.mkdir()
        self._step = step

    def hold(self) -> None:
        """In a command, before it begins: each of its ranks waits before that step."""
        place, steps = JanusWorkload.place, JanusWorkload.batches

        def batches(workload: JanusWorkload, dp_rank: int, dp_size: int, first: int, last: int) -> Iterator[Any]:
            for number, loaded in enumerate(steps(workload, dp_rank, dp_size, first, last), first + 1):
                workload.is_held = number == self._step  # type: ignore[attr-defined]
                yield loaded

        def placed(workload: JanusWorkload, batch: Any, groups: ProcessGroups) -> Any:
            if getattr(workload, "is_held", False):
                (self._folder / f"rank-{groups.layout.rank}").touch()
                wait_for((self._folder / "open").exists)
            return place(workload, batch, groups)

        JanusWorkload.batches, JanusWorkload.place = batches, placed  # type: ignore[method-assign, assignment]

    def wait(self, num_ranks: int) -> None:
        """Until all ranks have come to it."""
        wait_for(lambda: len(list(self._folder.glob("rank-*"))) == num_ranks)

    def open(self) -> None:
        (self._folder / "open").touch()


def start(*words: object, faults: str = "", folder: Path, border: Border | None = None) -> Command:
    log = folder / f"log-{len(list(folder.glob('log-*')))}"
    log.touch()
    pid = os.fork()
    if pid == 0:
        if border is not None:
            border.hold()
        _become_command([str(word) for word in words], faults, log)
    return Command(pid, log)


def _become_command(words: list[str], faults: str, log: Path) -> None:
    code = 1
    try:
        os.setpgid(0, 0)
        os.environ[VARIABLE] = faults
        for number in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        sys.argv = ["janus-mega", *words]
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        cli.main()
        code = 0
    except SystemExit as ended:
        code = ended.code or 0  # type: ignore[assignment]
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(code)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> TinyShards:
    return make_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def make_run(shards: TinyShards, tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """Writes the YAML of a run; returns it and the run directory."""
    return maker(shards, tmp_path)


def maker(shards: TinyShards, tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    def make(name: str = "run", health: HealthConfig | None = None, **changes: Any) -> tuple[Path, Path]:
        config = plain_config(shards, tmp_path / name, fp32())
        config = replace(
            config,
            data=replace(config.data, num_workers=changes.get("num_workers", 2)),
            stage=replace(config.stage, num_steps=STEPS),
            checkpoint=CheckpointConfig(save_every=changes.get("save_every", 0)),
            logging=replace(config.logging, log_every=1),
            health=health or HealthConfig(hang_timeout_s=0.0),
        )
        save(config, tmp_path / f"{name}.yaml")
        return tmp_path / f"{name}.yaml", tmp_path / name

    return make


def outcome_of(run_dir: Path) -> str:
    last = max((run_dir / "attempts").iterdir())
    return str(json.loads((last / "command.json").read_text())["outcome"])


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture(scope="module")
def undisturbed(shards: TinyShards, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("undisturbed")
    yaml, run_dir = maker(shards, folder)(num_workers=0)
    assert start("train", yaml, "--ranks", 2, folder=folder).wait() == 0
    return tensors(run_dir)


def tensors(run_dir: Path) -> dict[str, Any]:
    reader = open_checkpoint(list_checkpoints(run_dir / "checkpoints")[-1].path)
    assert reader.step == STEPS
    return {name: reader.read(name).numpy().tobytes() for name in reader.names}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_to_the_whole_group_stops_a_run_that_then_goes_on(
    number: signal.Signals, make_run: Callable[..., tuple[Path, Path]], undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    yaml, run_dir = make_run()
    border = Border(tmp_path)
    command = start("train", yaml, "--ranks", 2, folder=tmp_path, border=border)
    border.wait(2)
    os.killpg(command.pid, number)
    border.open()
    assert command.wait() == 75, command.said()
    (saved,) = list_checkpoints(run_dir / "checkpoints")
    assert 4 <= saved.step < STEPS
    told = f"stopped by {number.name} on rank 0, 1; step {saved.step} of {STEPS} is saved as {saved.path}"
    assert told in outcome_of(run_dir) and told in command.said()
    assert f"{number.name} on rank 1 in step" in command.said()
    again = start("train", yaml, "--ranks", 2, folder=tmp_path)
    assert again.wait() == 0, again.said()
    assert tensors(run_dir) == undisturbed


def test_one_process_alone_ends_with_the_same_code(make_run: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    yaml, _ = make_run()
    border = Border(tmp_path)
    command = start("train", yaml, folder=tmp_path, border=border)
    border.wait(1)
    os.killpg(command.pid, signal.SIGTERM)
    os.killpg(command.pid, signal.SIGUSR1)
    border.open()
    assert command.wait() == 75, command.said()
    assert "janus-mega: tiny: stopped by SIG" in command.said()
    assert "the run is stopping already, nothing changes" in command.said()


HANGING = HealthConfig(hang_timeout_s=1.0, hang_action=HangAction.abort)


@pytest.mark.parametrize(
    ("fault", "health", "code", "said"),
    [
        ("rank=1,step=3,kind=sigkill", None, 137, "rank 1 died of SIGKILL"),
        ("rank=1,step=3,kind=exception", None, 1, "injected fault on rank 1"),
        ("rank=1,step=3,kind=sigterm", None, 75, "stopped by SIGTERM on rank 1"),
        ("rank=1,step=3,kind=sigstop", HANGING, 86, "its heartbeat stopped"),
        ("rank=1,step=3,kind=sigill", None, 2, "kind must be one of sigkill, "),
    ],
)
def test_forked_ranks_end_with_the_most_telling_code(
    fault: str,
    health: HealthConfig | None,
    code: int,
    said: str,
    make_run: Callable[..., tuple[Path, Path]],
    tmp_path: Path,
) -> None:
    yaml, _ = make_run(health=health, num_workers=0)
    command = start("train", yaml, "--ranks", 2, faults=fault, folder=tmp_path)
    assert command.wait() == code, command.said()
    assert said in command.said()


def test_a_stop_that_finds_no_step_border_ends_in_time(
    make_run: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    """Rank 1 is stopped, rank 0 sits in a collective; the signal is noticed there, and its grace runs out."""
    yaml, run_dir = make_run(health=HealthConfig(hang_timeout_s=0.0, stop_grace_s=1.5), num_workers=0, save_every=2)
    command = start("train", yaml, "--ranks", 2, faults="rank=1,step=8,kind=sigstop", folder=tmp_path)
    wait_for(lambda: (run_dir / "faults.jsonl").exists())
    time.sleep(0.5)
    sent = time.monotonic()
    os.killpg(command.pid, signal.SIGTERM)
    assert command.wait() == 77, command.said()
    assert 1.5 <= time.monotonic() - sent < 12
    assert outcome_of(run_dir).startswith("NotSaved: rank 0 reached no end within 1.5 s (health.stop_grace_s)")
    assert 2 <= list_checkpoints(run_dir / "checkpoints")[-1].step < 8


def test_a_newer_attempt_ends_the_old_one(make_run: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    yaml, run_dir = make_run(num_workers=0, save_every=1)
    command = start("train", yaml, "--ranks", 2, faults="rank=0,step=6,kind=slow,seconds=2", folder=tmp_path)
    wait_for(lambda: (run_dir / "faults.jsonl").exists())
    claim(run_dir / "checkpoints", 7)
    assert command.wait() == 76, command.said()
    assert "attempt 7 has taken over" in command.said()


def test_a_used_directory_without_a_good_checkpoint_is_refused(
    make_run: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    yaml, run_dir = make_run(num_workers=0)
    short = ("stage.stop_at_step=2", "--ranks", 2)
    assert start("train", yaml, *short, folder=tmp_path).wait() == 0
    (saved,) = list_checkpoints(run_dir / "checkpoints")
    victim = saved.path / "tensors-00001.safetensors"
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    refused = start("train", yaml, *short, folder=tmp_path)
    assert refused.wait() == 2, refused.said()
    assert "none of its checkpoints is whole" in refused.said() and "--fresh" in refused.said()
    assert str(victim) in refused.said()
    fresh = start("train", yaml, *short, "--fresh", folder=tmp_path)
    assert fresh.wait() == 0, fresh.said()
    (aside,) = run_dir.glob("checkpoints.replaced-*")
    assert (aside / saved.path.name / victim.name).read_bytes() == content
    assert [entry.step for entry in list_checkpoints(run_dir / "checkpoints")] == [2]


@pytest.mark.slow
def test_under_torchrun_each_process_ends_with_its_code(
    make_run: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    yaml, run_dir = make_run(num_workers=0)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, "-m", "janus_mega.cli.main", "train", str(yaml)],
        env={**os.environ, VARIABLE: "rank=1,step=3,kind=sigterm"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=150,
    )
    assert done.returncode == 1, done.stdout  # torchrun's own: a process failed
    assert "exitcode  : 75" in done.stdout and "stopped by SIGTERM on rank 1" in outcome_of(run_dir)
    assert len(list_checkpoints(run_dir / "checkpoints")) == 1
