"""Forked ranks: they meet, their failures surface, and they never outlive their time."""

import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import ProcessRaisedException

from janus_mega.parallel.forked import run_ranks
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
