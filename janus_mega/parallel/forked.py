"""Several ranks on this machine without a launcher: forked after one import, meeting through a file.

Used where a few gloo ranks live for seconds (layout checks, stages of a small run, tests): importing torch, megatron
and DeepSpeed costs seconds a process, a fork costs milliseconds. The forking process must not have run multi-threaded
torch operations (its OpenMP pool would be dead in the children); ranks set their own number of threads. Real jobs are
started by torchrun or srun.
"""

import os
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 300.0, torch_threads: int = 1
) -> None:
    """Runs `fn(*args)` in `world_size` forked processes that are joined in one gloo job; returns when all are done.

    `fn` finds its rank with `torch.distributed`; results travel through files it writes.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a rank raised; carries the first failing rank's traceback.
        TimeoutError: the ranks were still running after timeout_s (they are ended).
    """
    with tempfile.TemporaryDirectory(prefix="janus_mega_ranks_") as folder:
        context = mp.start_processes(
            _rank_main,
            args=(world_size, str(Path(folder) / "store"), timeout_s, torch_threads, fn, args),
            nprocs=world_size,
            join=False,
            start_method="fork",
        )
        deadline = time.monotonic() + timeout_s
        while not context.join(timeout=max(0.0, min(1.0, deadline - time.monotonic()))):
            if time.monotonic() >= deadline:
                for process in context.processes:
                    process.kill()
                raise TimeoutError(f"{world_size} ranks of {fn.__name__} were still running after {timeout_s:.0f} s")


def _rank_main(
    rank: int, world_size: int, store: str, timeout_s: float, torch_threads: int, fn: Callable[..., Any], args: Any
) -> None:
    torch.set_num_threads(torch_threads)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )
    fn(*args)
    dist.barrier()
    dist.destroy_process_group()
