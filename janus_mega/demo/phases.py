"""Phases of the demo: each is timed, and heavy ones run in forked ranks, so that the parent never runs torch.

A phase is a module-level function of plain arguments that returns values JSON can hold; every rank's value travels
through a file. Bad input met by a rank is raised again in the parent as the same one-line error.
"""

import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from data_pipeline.errors import UserError
from janus_mega.observe.log import setup_logging
from janus_mega.parallel.forked import run_ranks

_log = logging.getLogger(__name__)

PHASE_TIMEOUT_S = 3600.0
"""A phase that is still running then has hung."""


class Phases:
    """Runs phases one after another and keeps their seconds."""

    def __init__(self, num_phases: int) -> None:
        self.seconds: dict[str, float] = {}
        self._num_phases = num_phases

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Measures a phase that runs in this process."""
        _log.info("[%d/%d] %s", len(self.seconds) + 1, self._num_phases, name)
        start_s = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - start_s

    def run(self, name: str, ranks: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
        """Runs `fn(*args)` in forked ranks; returns what each of them returned.

        Raises:
            UserError: a rank met bad input; the message is that of the first rank that said so.
        """
        with self.timed(name):
            return in_forked_ranks(ranks, fn, *args)


def in_forked_ranks(ranks: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
    """`fn(*args)` in `ranks` forked processes of one gloo job; their results in order of ranks.

    Raises:
        UserError: a rank met bad input.
    """
    with tempfile.TemporaryDirectory(prefix="janus_mega_phase_") as name:
        folder = Path(name)
        try:
            run_ranks(_call, ranks, fn, args, folder, timeout_s=PHASE_TIMEOUT_S)
        except Exception as error:
            complaints = sorted(folder.glob("*.bad_input"))
            if complaints:
                raise UserError(complaints[0].read_text(encoding="utf-8")) from error
            raise
        return [json.loads((folder / f"{rank:04d}.json").read_text(encoding="utf-8")) for rank in range(ranks)]


def rank_and_size() -> tuple[int, int]:
    """This forked rank's number and how many there are."""
    return dist.get_rank(), dist.get_world_size()


def _call(fn: Callable[..., Any], args: tuple[Any, ...], folder: Path) -> None:
    rank, _ = rank_and_size()
    setup_logging(rank)
    try:
        result = fn(*args)
    except UserError as error:
        (folder / f"{rank:04d}.bad_input").write_text(str(error), encoding="utf-8")
        raise
    (folder / f"{rank:04d}.json").write_text(json.dumps(result), encoding="utf-8")
