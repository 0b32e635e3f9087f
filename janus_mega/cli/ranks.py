"""Starts a run on the ranks it is meant for: this process alone, new ones, or those a launcher has started."""

import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError

ONE_YEAR_S = 365 * 24 * 3600.0


def started_world_size(ranks: int) -> int:
    """Returns how many ranks will run: those of a launcher (WORLD_SIZE), else `ranks`.

    Raises:
        UserError: Both are given, or there would be none.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks < 1:
        raise UserError(f"--ranks {ranks} must be at least 1")
    if ranks > 1 and launched > 1:
        raise UserError(f"--ranks {ranks} under a launcher that started {launched} ranks already; leave --ranks out")
    return max(ranks, launched)


def on_ranks(fn: Callable[[Any], Any], config: Any, ranks: int, torch_threads: int) -> None:
    """Calls `fn(config)` here, or in `ranks` new processes; `torch_threads` 0 leaves torch's default to one rank.

    Raises:
        UserError: Some rank met bad input; the message is that of the first rank that said so. Or there are GPUs, but
            fewer than ranks.
        RunEnded: The ranks ended otherwise than done; carries the most telling of their exit codes.
    """
    import torch

    from janus_mega.observe.log import setup_logging
    from janus_mega.parallel.forked import codes_of_gpu_ranks, codes_of_ranks
    from janus_mega.train.exits import BAD_INPUT, DONE, RunEnded, Stopped, most_telling

    if ranks == 1:
        if torch_threads:
            torch.set_num_threads(torch_threads)
        setup_logging(int(os.environ.get("RANK", "0")))
        try:
            fn(config)
        except Stopped:  # all ranks agreed on it
            _leave()
            raise
        _leave()
        return
    # Counted by the driver's management library: asking CUDA itself would start it here, and forks could not use it.
    num_gpus = torch.cuda.device_count()
    if 0 < num_gpus < ranks:
        raise UserError(
            f"--ranks {ranks} needs a GPU for each rank, {num_gpus} are visible; start as many, or hide them with "
            'CUDA_VISIBLE_DEVICES="" to train on the CPU'
        )
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="janus_mega_") as folder:
        what, threads = (_rank, ranks, fn, config, Path(folder)), max(torch_threads, 1)
        codes = (
            codes_of_gpu_ranks(*what, torch_threads=threads)
            if num_gpus
            else codes_of_ranks(*what, timeout_s=ONE_YEAR_S, torch_threads=threads)
        )
        code = most_telling(code for code in codes if code is not None)
        told = [path.read_text(encoding="utf-8") for path in sorted(Path(folder).glob(f"*.{code}"))]
    if code == BAD_INPUT and told:
        raise UserError(told[0])
    if code != DONE:
        ended = RunEnded(told[0] if told else ", ".join(_told_code(rank, code) for rank, code in enumerate(codes)))
        ended.exit_code = code
        raise ended


def _leave() -> None:
    """Leaves a launcher's job in order: threads of groups that nobody has left could abort the way out of a process."""
    from janus_mega.parallel.groups import destroy_groups

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        destroy_groups()


def _told_code(rank: int, code: int | None) -> str:
    if code is None:
        return f"rank {rank} was ended because others failed"
    return f"rank {rank} " + (f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with {code}")


def _rank(fn: Callable[[Any], Any], config: Any, folder: Path) -> None:
    from janus_mega.observe.log import setup_logging
    from janus_mega.train.exits import exit_code_of

    rank = int(os.environ["RANK"])
    setup_logging(rank)
    try:
        fn(config)
    except Exception as error:
        code = exit_code_of(error)
        if code is None:
            raise
        (folder / f"{rank:06d}.{code}").write_text(str(error), encoding="utf-8")
        sys.exit(code)
