"""Starts a run on the ranks it is meant for: this process alone, forked ones, or those a launcher has started."""

import logging
import os
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
    """Calls `fn(config)` here, or in `ranks` forked processes; `torch_threads` 0 leaves torch's default to one rank.

    Raises:
        UserError: Some rank met bad input; the message is that of the first rank that said so.
    """
    import torch

    from janus_mega.observe.log import setup_logging
    from janus_mega.parallel.forked import run_ranks

    if ranks == 1:
        if torch_threads:
            torch.set_num_threads(torch_threads)
        setup_logging(int(os.environ.get("RANK", "0")))
        fn(config)
        return
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="janus_mega_") as folder:
        try:
            run_ranks(_rank, ranks, fn, config, Path(folder), timeout_s=ONE_YEAR_S, torch_threads=max(torch_threads, 1))
        except torch.multiprocessing.ProcessRaisedException:
            messages = sorted(Path(folder).iterdir())
            if messages:
                raise UserError(messages[0].read_text(encoding="utf-8")) from None
            raise


def _rank(fn: Callable[[Any], Any], config: Any, folder: Path) -> None:
    from janus_mega.observe.log import setup_logging

    rank = int(os.environ["RANK"])
    setup_logging(rank)
    try:
        fn(config)
    except UserError as error:
        logging.getLogger(__name__).debug("rank %d met bad input", rank)
        (folder / f"{rank:06d}").write_text(str(error), encoding="utf-8")
        raise
