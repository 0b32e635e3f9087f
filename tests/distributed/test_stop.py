"""Stop signals: noticed inside collectives, taken back afterwards, and no business of anybody forked meanwhile."""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from janus_mega.config.schema import ParallelConfig, RunConfig, VerifyLayout
from janus_mega.observe.pulse import Pulse
from janus_mega.observe.stopping import StopFlag
from janus_mega.train import layout_gate, stages, stop
from janus_mega.train.exits import NOT_SAVED, NotSaved
from janus_mega.train.stop import STOP_SIGNALS, StopSignals
from tests.support.ranks import results_of_ranks
from tests.support.shards import make_shards

pytestmark = [pytest.mark.dist, pytest.mark.filterwarnings("ignore:This DataLoader will create")]

HELD_S = 2.0


@pytest.fixture
def flag() -> StopFlag:
    return StopFlag()


@pytest.fixture
def entered(flag: StopFlag) -> Iterator[StopSignals]:
    with StopSignals(flag, Pulse(), rank=0, grace_s=0.0) as signals:
        yield signals


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def noticed_after_s(take: bool) -> float:
    """Rank 0 waits for rank 1 in an all-reduce; a signal reaches it meanwhile. Seconds until it knows."""
    flag, found = StopFlag(), []
    value = torch.ones(1)
    dist.all_reduce(value)  # connected
    if dist.get_rank() == 1:
        time.sleep(HELD_S)
        dist.all_reduce(value)
        return 0.0

    def look() -> None:
        sent = time.monotonic()
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for(lambda: flag.signal == signal.SIGTERM)
        found.append(time.monotonic() - sent)

    thread = threading.Timer(0.3, look)
    if take:
        with StopSignals(flag, Pulse(), 0, 0.0):
            thread.start()
            dist.all_reduce(value)
            thread.join()
    else:
        signal.signal(signal.SIGTERM, lambda number, frame: setattr(flag, "signal", number))
        thread.start()
        dist.all_reduce(value)
        thread.join()
    return found[0]


def test_a_signal_is_noticed_inside_a_collective(record_property: Callable[..., None]) -> None:
    seconds = results_of_ranks(noticed_after_s, 2, True)[0]
    record_property("noticed_after_s", seconds)
    assert seconds < 0.5  # measured 0.001


def test_a_plain_handler_would_wait_for_the_collective() -> None:
    assert results_of_ranks(noticed_after_s, 2, False)[0] > HELD_S / 2


def test_what_was_set_before_is_set_again(flag: StopFlag) -> None:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    heard: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    mine = signal.getsignal(signal.SIGUSR1)
    try:
        with StopSignals(flag, Pulse(), 0, 0.0):
            assert signal.getsignal(signal.SIGUSR1) is not mine
            os.kill(os.getpid(), signal.SIGUSR1)
            wait_for(lambda: flag.asked)
        assert signal.getsignal(signal.SIGUSR1) is mine and heard == []
        assert signal.set_wakeup_fd(-1) == -1
        os.kill(os.getpid(), signal.SIGUSR1)
        assert heard == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before[signal.SIGUSR1])
    assert {number: signal.getsignal(number) for number in STOP_SIGNALS} == before
    assert not any(thread.name == "janus-mega-stop" for thread in threading.enumerate())


def test_a_second_signal_changes_nothing_and_is_told(
    flag: StopFlag, entered: StopSignals, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("janus_mega").propagate = True
    os.kill(os.getpid(), signal.SIGUSR1)
    wait_for(lambda: flag.signal == signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGTERM)
    wait_for(lambda: "SIGTERM on rank 0: the run is stopping already" in caplog.text)
    assert flag.signal == signal.SIGUSR1


class HangingHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        time.sleep(60)


@pytest.mark.parametrize("hangs", ["record", "log"])
def test_a_disk_that_hangs_does_not_keep_a_process_from_ending(hangs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop, "_TELL_S", 0.3)
    pid = os.fork()
    if pid == 0:
        with StopSignals(StopFlag(), Pulse(), 0, 0.1) as signals:
            if hangs == "record":
                signals.note_end = lambda outcome: time.sleep(60)
            else:
                logging.getLogger("janus_mega").addHandler(HangingHandler())
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)
        os._exit(0)
    ended: list[int] = []

    def has_ended() -> bool:
        found, status = os.waitpid(pid, os.WNOHANG)
        ended.extend([os.waitstatus_to_exitcode(status)] if found else [])
        return bool(found)

    try:
        wait_for(has_ended)
    finally:
        if not ended:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    assert ended == [NOT_SAVED]


def test_other_signals_are_none_of_it(flag: StopFlag, entered: StopSignals) -> None:
    before = signal.signal(signal.SIGCHLD, lambda number, frame: None)
    try:
        os.kill(os.getpid(), signal.SIGCHLD)
        time.sleep(0.1)
        assert not flag.asked
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_outside_the_main_thread_signals_are_left_alone(flag: StopFlag) -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen: list[Any] = []

    def train() -> None:
        with StopSignals(flag, Pulse(), 0, 1.0):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert seen == [before]


def test_forked_children_have_the_handlers_of_before(flag: StopFlag, entered: StopSignals, tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        (tmp_path / "ready").touch()
        time.sleep(30)
        os._exit(0)
    wait_for((tmp_path / "ready").exists)
    os.kill(pid, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM
    time.sleep(0.1)
    assert not flag.asked  # the child has not told its parent's thread


def workers_of(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_loader_workers_outlive_a_signal_to_everybody(number: signal.Signals, tmp_path: Path) -> None:
    """What they read afterwards is right, and they end when the loader is done with them."""
    data = make_shards(tmp_path).open(num_workers=2)
    from data_pipeline.stream.loader import build_loader

    alone = [[batch["input_ids"] for batch in step] for step in build_loader(data, micro_batch_size=2, num_steps=6)]
    before = set(workers_of(os.getpid()))
    steps = iter(build_loader(data, micro_batch_size=2, num_steps=6))
    read = [next(steps)]
    workers = set(workers_of(os.getpid())) - before
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker, number)
    read += list(steps)
    assert all(
        torch.equal(batch["input_ids"], ids)
        for step, expected in zip(read, alone, strict=True)
        for batch, ids in zip(step, expected, strict=True)
    )
    wait_for(lambda: not workers & set(workers_of(os.getpid())))


def test_a_worker_that_does_not_end_is_ended_by_the_second_sigterm(tmp_path: Path) -> None:
    from data_pipeline.stream.workers import leave_signals_to_parent

    pid = os.fork()
    if pid == 0:
        leave_signals_to_parent(0)
        (tmp_path / "ready").touch()
        while True:
            time.sleep(30)
    wait_for((tmp_path / "ready").exists)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.kill(pid, number)
    time.sleep(0.2)
    assert os.waitpid(pid, os.WNOHANG) == (0, 0)
    os.kill(pid, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_chain_of_stages_hands_signals_on_and_tells_the_code() -> None:
    stage = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(75)); print(flush=True); time.sleep(60)"
    before = signal.getsignal(signal.SIGTERM)
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    assert stages._code_of([sys.executable, "-S", "-c", stage]) == 75
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_check_of_a_layout_ends_at_once(
    run_dir: Path, flag: StopFlag, entered: StopSignals, monkeypatch: pytest.MonkeyPatch
) -> None:
    sleeper = run_dir / "sleeper"
    sleeper.write_text("#!/bin/sh\nexec sleep 60\n")
    sleeper.chmod(0o755)
    monkeypatch.setattr(layout_gate.sys, "executable", str(sleeper))
    monkeypatch.setattr(layout_gate, "save", lambda config, path: path.touch())
    config = replace(
        RunConfig(), name="x", run_dir=str(run_dir), parallel=ParallelConfig(verify_layout=VerifyLayout.before_start)
    )
    monkeypatch.setattr(layout_gate, "_digest", lambda *arguments: "d")
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    start = time.monotonic()
    with pytest.raises(NotSaved, match="while its layout was checked; nothing was trained"):
        layout_gate.require_verified(config, 2, flag)
    assert time.monotonic() - start < 10
