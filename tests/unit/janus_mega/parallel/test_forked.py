"""Forked ranks: they meet, their failures surface, and they never outlive their time."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import ProcessRaisedException

from janus_mega.parallel.forked import codes_of_ranks, run_ranks
from tests.support.ranks import results_of_ranks

pytestmark = pytest.mark.dist


def test_ranks_form_one_job() -> None:
    def sum_of_ranks() -> dict[str, object]:
        total = torch.tensor([dist.get_rank() + 1.0])
        dist.all_reduce(total)
        names = {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
        return {"total": total.item(), "threads": torch.get_num_threads(), **names}

    results = results_of_ranks(sum_of_ranks, 3)
    assert [result["total"] for result in results] == [6.0] * 3
    assert [(r["RANK"], r["LOCAL_RANK"], r["WORLD_SIZE"]) for r in results] == [(str(r), str(r), "3") for r in range(3)]
    assert {result["threads"] for result in results} == {1}
    assert not dist.is_initialized()


def test_ranks_see_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert results_of_ranks(lambda: os.environ["CUDA_VISIBLE_DEVICES"], 2) == ["", ""]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"


def test_threads_are_set_per_rank(tmp_path: Path) -> None:
    run_ranks(lambda: (tmp_path / "threads").write_text(str(torch.get_num_threads())), 1, torch_threads=2)
    assert (tmp_path / "threads").read_text() == "2"


def test_a_failing_rank_surfaces_its_traceback() -> None:
    def stumble() -> None:
        if dist.get_rank() == 1:
            raise RuntimeError("rank one lost its shoe")
        dist.barrier()  # would wait for ever

    start = time.monotonic()
    with pytest.raises(ProcessRaisedException, match="rank one lost its shoe") as caught:
        run_ranks(stumble, 2, timeout_s=60.0)
    assert "in stumble" in str(caught.value)
    assert time.monotonic() - start < 30


def test_ranks_that_hang_are_ended(tmp_path: Path) -> None:
    def wait() -> None:
        (tmp_path / str(dist.get_rank())).write_text(str(os.getpid()))
        time.sleep(600)

    with pytest.raises(TimeoutError, match=r"2 ranks of wait were still running after 2 s"):
        run_ranks(wait, 2, timeout_s=2.0)
    for path in tmp_path.iterdir():
        deadline = time.monotonic() + 10
        while is_running(int(path.read_text())) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not is_running(int(path.read_text()))


def is_running(pid: int) -> bool:
    """Whether a process lives; one that ended but was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def end_rank_one(how) -> None:
    if dist.get_rank() == 1:
        how()
    dist.barrier()


def end_with(code: int) -> None:
    dist.barrier()  # a rank that ends while its peer still connects lets that one fail
    sys.exit(code)


@pytest.mark.parametrize("code", [2, 75, 76, 77, 78, 86])
def test_ranks_end_with_any_code(code: int) -> None:
    assert codes_of_ranks(end_with, 2, code) == [code, code]


def test_ranks_that_are_done_have_code_0() -> None:
    assert codes_of_ranks(dist.barrier, 3) == [0, 0, 0]


@pytest.mark.parametrize(
    ("how", "code"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), -9),
        (lambda: os._exit(86), 86),
        (lambda: sys.exit(78), 78),
    ],
)
def test_the_others_notice_a_rank_that_dies(how, code: int) -> None:
    """Gloo tells the others that the connection is gone."""
    start = time.monotonic()
    codes = codes_of_ranks(lambda: end_rank_one(how), 2)
    assert codes == [1, code] and time.monotonic() - start < 5


def test_ranks_left_hanging_are_killed_within_seconds(tmp_path: Path) -> None:
    def hang_or_die() -> None:
        (tmp_path / str(dist.get_rank())).write_text(str(os.getpid()))
        dist.barrier()
        if dist.get_rank() == 2:
            sys.exit(76)
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(600)

    start = time.monotonic()
    assert codes_of_ranks(hang_or_die, 3) == [None, None, 76]
    assert time.monotonic() - start < 9
    assert not any(is_running(int(path.read_text())) for path in tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_stop_signals_are_handed_on_to_every_rank(number: signal.Signals, tmp_path: Path) -> None:
    def end_well() -> None:
        signal.signal(number, lambda *_: sys.exit(75))
        (tmp_path / str(dist.get_rank())).touch()
        time.sleep(60)

    def send_when_ready() -> None:
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    sender = threading.Thread(target=send_when_ready)
    sender.start()
    assert codes_of_ranks(end_well, 2) == [75, 75]
    sender.join()
    assert signal.getsignal(number) is before
