"""Runs a function in forked ranks and brings what each returned back to the test.

Models that need process groups are built in forked ranks, also single ones: the test process then never joins a job,
holds no megatron state and may fork as often as it likes. Assertions belong in the test, on the returned values.
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from janus_mega.parallel.forked import run_ranks


def results_of_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """`fn(*args)` of every rank, by rank: tensors, numbers, strings, and lists, tuples and dicts of them.

    Arguments reach the ranks by the fork, so closures will do.
    """
    with tempfile.TemporaryDirectory(prefix="rank_results_") as folder:
        run_ranks(_keep_result, world_size, Path(folder), fn, args, timeout_s=timeout_s)
        return [torch.load(Path(folder) / str(rank), weights_only=True) for rank in range(world_size)]


def import_what_ranks_need() -> None:
    """Imports the heavy libraries before the first fork, so that no rank has to."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed  # noqa: F401
    import transformers.models.janus.modeling_janus  # noqa: F401

    import janus_mega.train.run  # noqa: F401


def _keep_result(folder: Path, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.save(fn(*args), folder / str(dist.get_rank()))
