"""Coming into a run directory: what an older attempt does meanwhile refuses no start, and --fresh counts once."""

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data_pipeline.errors import UserError
from janus_mega.checkpoint import finding
from janus_mega.checkpoint.finding import Seekers
from janus_mega.checkpoint.manager import list_checkpoints, save_checkpoint
from janus_mega.checkpoint.tensor_file import damaged
from janus_mega.train import entering
from janus_mega.train.entering import Entry, enter
from janus_mega.train.exits import RunEnded, exit_code_of
from janus_mega.train.starting import FRESH_FILE, Start, started
from tests.support.checkpoints import agreement, rows_of, state
from tests.support.crash_traces import on_threads

WORLD = 2
VARIABLES = ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher, no pauses, no data plan to compare."""
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(finding, "_LOOK_AGAIN_S", (0.0,))
    monkeypatch.setattr(entering, "check_resume", lambda reader, workload, recipe: reader.step)


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Lets two ranks, which are threads, enter together; returns what each of them got, or was told."""
    agree, said = agreement(WORLD), dict[str, Any]()

    def on_rank_0(rank: int, fn: Callable[[], str | None]) -> str:
        if rank == 0:
            try:
                said["answer"] = fn() or ""
            except UserError as error:
                said["answer"] = error
        agree(True)
        answer = said["answer"]
        agree(True)
        if isinstance(answer, UserError):
            raise answer
        return str(answer)

    def share(rank: int, content: bytes) -> bytes:
        return on_rank_0(rank, content.decode).encode()

    monkeypatch.setattr(entering, "on_rank_0", on_rank_0)
    monkeypatch.setattr(entering, "seekers_of", lambda rank: Seekers(rank, WORLD, agree, lambda c: share(rank, c)))

    def run(run_dir: Path, start: Start | None = None) -> list[Any]:
        recipe: Any = SimpleNamespace(run_dir=run_dir, name="x", last_step=99)

        def of(rank: int) -> Entry | str:
            try:
                return enter(None, recipe, rank, start or Start())  # type: ignore[arg-type]
            except (UserError, RunEnded) as error:
                return f"{exit_code_of(error)}: {error}"

        return on_threads(WORLD, of, lambda: None)

    return run


def publish(run_dir: Path, step: int) -> Path:
    return save_checkpoint(run_dir / "checkpoints", rows_of(0, 1), state(step))


def go_on(run_dir: Path) -> None:
    """What an older attempt does: the next checkpoint, and the one before goes."""
    (before,) = list_checkpoints(run_dir / "checkpoints")
    publish(run_dir, before.step + 2)
    shutil.rmtree(before.path)


def steps_of(entries: list[Any]) -> list[Any]:
    return [entry.first_step if isinstance(entry, Entry) else entry for entry in entries]


def test_a_checkpoint_that_goes_before_all_have_opened_it_is_looked_for_again(
    run_dir: Path, ranks: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(run_dir, 2)
    opened, real = list[Path](), entering._open

    def open_late(newest: Path, *rest: Any) -> Any:
        if opened:
            return real(newest, *rest)
        found = real(newest, *rest)  # the first rank still gets it, the other one does not
        opened.append(newest)
        go_on(run_dir)
        return found

    lock = threading.Lock()

    def one_by_one(*arguments: Any) -> Any:
        with lock:
            return open_late(*arguments)

    monkeypatch.setattr(entering, "_open", one_by_one)
    assert steps_of(ranks(run_dir)) == [4] * WORLD


def test_nothing_found_while_an_older_attempt_prunes_is_looked_for_again(
    run_dir: Path, ranks: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(run_dir, 2)
    real, late = entering.find_newest, iter([True, True])

    def find_late(root: Path, seekers: Seekers, **rest: Any) -> Path | None:
        if not next(late, False):
            return real(root, seekers, **rest)
        if seekers.rank == 0:
            go_on(run_dir)
        seekers.agree(True)
        return None

    monkeypatch.setattr(entering, "find_newest", find_late)
    assert steps_of(ranks(run_dir)) == [4] * WORLD


def test_a_rank_that_gets_the_checkpoint_at_its_second_try_goes_on(
    run_dir: Path, ranks: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(run_dir, 2)
    real, first = entering._open, iter([True])

    def open_late(*arguments: Any) -> Any:
        if next(first, False):
            raise damaged(Path("x"), OSError(5, "I/O error"))
        return real(*arguments)

    monkeypatch.setattr(entering, "_open", open_late)
    assert steps_of(ranks(run_dir)) == [2] * WORLD


@pytest.fixture
def start_of(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Start]]:
    """A start with --fresh, as a launcher would make it."""

    def make(restarts: int, job: str = "41", names: tuple[str, str] = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT")) -> Start:
        for name in VARIABLES:
            os.environ.pop(name, None)
        os.environ.update({names[0]: job, names[1]: str(restarts)})
        with started(run_dir, 0.0, fresh=True) as start:
            return start

    yield make
    for name in VARIABLES:
        os.environ.pop(name, None)


BY = [("SLURM_JOB_ID", "SLURM_RESTART_COUNT"), ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")]


@pytest.mark.parametrize("names", BY, ids=["slurm", "torchrun"])
@pytest.mark.parametrize("is_used", [True, False], ids=["used", "empty"])
def test_a_restart_goes_on_where_the_first_start_has_begun_anew(
    is_used: bool,
    names: tuple[str, str],
    run_dir: Path,
    ranks: Callable[..., list[Any]],
    start_of: Callable[..., Start],
) -> None:
    if is_used:
        publish(run_dir, 8)
    assert steps_of(ranks(run_dir, start_of(0, names=names))) == [0] * WORLD
    assert len(list(run_dir.glob("checkpoints.replaced-*"))) == is_used
    assert (run_dir / FRESH_FILE).read_text() == "41"
    publish(run_dir, 2)
    assert steps_of(ranks(run_dir, start_of(1, names=names))) == [2] * WORLD


@pytest.mark.parametrize("names", BY, ids=["slurm", "torchrun"])
def test_a_restart_begins_anew_where_the_first_start_did_not_come_so_far(
    names: tuple[str, str], run_dir: Path, ranks: Callable[..., list[Any]], start_of: Callable[..., Start]
) -> None:
    publish(run_dir, 8)
    start_of(0, names=names)  # preempted before it had entered
    assert steps_of(ranks(run_dir, start_of(1, names=names))) == [0] * WORLD
    assert len(list(run_dir.glob("checkpoints.replaced-*"))) == 1


@pytest.mark.parametrize("job", ["41", "42"], ids=["same name", "another name"])
def test_what_an_earlier_job_has_carried_out_is_not_this_ones(
    job: str, run_dir: Path, ranks: Callable[..., list[Any]], start_of: Callable[..., Start]
) -> None:
    ranks(run_dir, start_of(0))
    publish(run_dir, 8)
    if job == "41":
        start_of(0)  # preempted before it had entered
    assert steps_of(ranks(run_dir, start_of(1, job))) == [0] * WORLD


def test_a_restart_that_finds_its_checkpoints_gone_does_not_begin_again(
    run_dir: Path, ranks: Callable[..., list[Any]], start_of: Callable[..., Start]
) -> None:
    """--fresh was the first start's."""
    ranks(run_dir, start_of(0))
    saved = publish(run_dir, 2)
    assert steps_of(ranks(run_dir, start_of(1))) == [2] * WORLD
    shutil.rmtree(saved)
    assert all("does not begin at step 0 by itself" in str(told) for told in ranks(run_dir, start_of(2)))


def test_another_job_that_never_enters_changes_nothing(
    run_dir: Path, ranks: Callable[..., list[Any]], start_of: Callable[..., Start]
) -> None:
    ranks(run_dir, start_of(0))
    publish(run_dir, 2)
    start_of(0, "42")  # with --fresh too, by mistake: it ends before it had entered
    assert steps_of(ranks(run_dir, start_of(1))) == [2] * WORLD


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (damaged(Path("x"), OSError(5, "I/O error")), 1),
        (MemoryError("x: too large"), 1),
        (UserError("x: another plan"), 2),
    ],
)
def test_what_one_rank_cannot_open_is_refused_by_all_alike(
    error: Exception, code: int, run_dir: Path, ranks: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 cannot go on from what all have verified; only bad input keeps a job from being started again."""
    publish(run_dir, 2)
    real, first = entering._open, iter([True])

    def open_once(*arguments: Any) -> Any:
        if next(first, False):
            return real(*arguments)
        raise error

    monkeypatch.setattr(entering, "_open", open_once)
    told = sorted(ranks(run_dir))
    assert [line.split(": ")[0] for line in told] == [str(code)] * WORLD
    assert any("another rank cannot go on" in line for line in told) and any("x: " in line for line in told)
