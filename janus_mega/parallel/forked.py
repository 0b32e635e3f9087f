"""Several ranks on this machine without a launcher: forked after one import, or started anew where each has a GPU.

Importing torch, megatron and DeepSpeed costs seconds a process, a fork costs milliseconds; so ranks that live for
seconds (layout checks, small runs, tests) are forked, compute on the CPU and meet through a file. The forking process
must not have run multi-threaded torch operations (its OpenMP pool would be dead in the children); ranks set their own
number of threads. A process that has touched CUDA cannot be forked, and importing DeepSpeed touches it: ranks with GPUs
are started from nothing and join as under a launcher. Jobs of several machines are started by torchrun or srun.
"""

import gc
import logging
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""Those that ask a run to save and to end."""
SETTLE_S = 5.0
"""Seconds that the other ranks have to end by themselves once one has failed."""


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


def codes_of_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 300.0, torch_threads: int = 1
) -> list[int | None]:
    """Like `run_ranks` for ranks that may die in any way: their exit codes by rank, as `_codes_of` gives them.

    Args:
        fn: what each rank runs; ends with the code of a SystemExit, or 1 after any other exception, which is printed.
        world_size: ranks.
        args: of `fn`.
        timeout_s: of collectives.
        torch_threads: of each rank.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="janus_mega_ranks_") as folder:
        shared = (world_size, str(Path(folder) / "store"), timeout_s, torch_threads, fn, args)
        return _codes_of([context.Process(target=_forked_rank, args=(rank, *shared)) for rank in range(world_size)])


def codes_of_gpu_ranks(fn: Callable[..., Any], world_size: int, *args: Any, torch_threads: int = 1) -> list[int | None]:
    """Like `codes_of_ranks`, each rank in a process of its own that has seen no CUDA yet; `fn` joins the ranks itself.

    Args:
        fn: importable by its name, as are its arguments.
        world_size: ranks, one for each GPU of this machine.
        args: of `fn`.
        torch_threads: of each rank.
    """
    context = multiprocessing.get_context("spawn")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = (world_size, port, torch_threads, fn, args)
    return _codes_of([context.Process(target=_started_rank, args=(rank, *shared)) for rank in range(world_size)])


def _codes_of(processes: Sequence[BaseProcess]) -> list[int | None]:
    """Runs ranks; their exit codes by rank, -N for a death by signal N.

    Once a rank has ended with another code than 0, the others have SETTLE_S to end too; those that have not are killed
    and count as None. Stop signals are handed on to all ranks, and a rank whose parent dies receives SIGTERM.
    """
    try:
        with _handing_on_signals(processes):
            _join(processes)
    finally:
        codes = [process.exitcode for process in processes]
        killed = _end(processes)
    return [None if rank in killed else code for rank, code in enumerate(codes)]


def _join(processes: Sequence[BaseProcess]) -> None:
    """Returns when all have ended, or SETTLE_S after the first that failed."""
    deadline = float("inf")
    while alive := [process for process in processes if process.exitcode is None]:
        if deadline == float("inf") and any(process.exitcode for process in processes):
            deadline = time.monotonic() + SETTLE_S
        left = deadline - time.monotonic()
        if left <= 0:
            return
        wait([process.sentinel for process in alive], timeout=min(left, 1.0))


def _end(processes: Sequence[BaseProcess]) -> set[int]:
    """Kills the ranks that still live, also stopped ones; returns their numbers."""
    started = [process for process in processes if process.pid is not None]
    killed = {rank for rank, process in enumerate(started) if process.exitcode is None}
    for rank in killed:
        started[rank].kill()
    for process in started:
        process.join()
    return killed


@contextmanager
def _handing_on_signals(processes: Sequence[BaseProcess]) -> Iterator[None]:
    """Starts the processes; until the end a stop signal goes to each of them that lives, instead of ending this one.

    Signals are held back while processes start: none may meet a rank that nobody knows yet, or this handler in a rank.
    """

    def hand_on(number: int, frame: FrameType | None) -> None:
        for process in processes:
            if process.pid is not None and process.exitcode is None:
                os.kill(process.pid, number)

    is_main = threading.current_thread() is threading.main_thread()
    held = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    before = {}
    try:
        for process in processes:
            process.start()
        if is_main:
            before = {number: signal.signal(number, hand_on) for number in STOP_SIGNALS}
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
        for number, handler in before.items():
            signal.signal(number, handler)


def _forked_rank(*args: Any) -> None:
    _take_signals()
    _rank_main(*args)


def _take_signals() -> None:
    """Stop signals, held back while ranks start, and one more should the parent die."""
    torch.multiprocessing._prctl_pr_set_pdeathsig(signal.SIGTERM)  # type: ignore[attr-defined]
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def _started_rank(rank: int, world_size: int, port: int, torch_threads: int, fn: Callable[..., Any], args: Any) -> None:
    _take_signals()
    torch.set_num_threads(torch_threads)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size))
    code = 1
    try:
        fn(*args)
        code = 0
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # as forked ones end: threads of groups that nobody has left could abort the way out


def _rank_main(
    rank: int, world_size: int, store: str, timeout_s: float, torch_threads: int, fn: Callable[..., Any], args: Any
) -> None:
    gc.freeze()  # what was imported stays: DeepSpeed collects a dozen times as it starts, 0.3 s each over all of it
    torch.set_num_threads(torch_threads)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
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
