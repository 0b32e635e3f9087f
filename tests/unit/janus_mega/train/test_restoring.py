"""Generators of a checkpoint: gone on with where they fit, begun anew from seed, step and place where they do not."""

import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from janus_mega.parallel.generators import generator_states
from janus_mega.parallel.groups import build_groups
from janus_mega.train.restoring import LiveState
from tests.support.ranks import results_of_ranks
from tests.support.tiny import fp32, tiny_recipe

STEP = 7
CUDA = torch.device("cuda")

pytestmark = pytest.mark.dist


def draws_after_restoring(saved_on_cuda: bool, on_cuda: bool) -> dict[str, Any]:
    """What a rank draws before a checkpoint and after it, twice at one step and once at the next, and what it says."""
    groups = build_groups(1, 1)
    states = generator_states()
    if saved_on_cuda:  # CUDA's states have another length than the CPU's, so none of these must be used
        states = {name: torch.zeros(16, dtype=torch.uint8) if name.startswith("megatron.") else state
                  for name, state in states.items()} | {"cuda": torch.zeros(16, dtype=torch.uint8)}  # fmt: skip
    if on_cuda:
        groups = replace(groups, device=CUDA)
    manifest = {"world_size": 1, "layout": {"tp_size": 1, "pp_size": 1, "virtual_pp_size": 1}}
    reader: Any = SimpleNamespace(manifest=manifest, directory=Path("step-7"))
    live = LiveState.__new__(LiveState)
    live.engine = SimpleNamespace(groups=groups)  # type: ignore[assignment]
    live._recipe = tiny_recipe(Path(), fp32(), 3)
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("janus_mega.train.restoring")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    drawn = [torch.rand(4)]
    for step in (STEP, STEP, STEP + 1):
        state: Any = SimpleNamespace(step=step, rng=states)
        live._restore_generators(reader, state)
        drawn.append(torch.rand(4))
    return {"drawn": drawn, "told": told}


def test_generators_go_on_where_the_device_is_of_the_same_kind() -> None:
    (found,) = results_of_ranks(draws_after_restoring, 1, False, False)
    before, *after = found["drawn"]
    assert all(torch.equal(draw, before) for draw in after)
    assert found["told"] == []


@pytest.mark.parametrize("saved_on_cuda", [False, True])
def test_generators_begin_anew_on_another_kind_of_device(saved_on_cuda: bool) -> None:
    (found,) = results_of_ranks(draws_after_restoring, 1, saved_on_cuda, not saved_on_cuda)
    before, first, again, later = found["drawn"]
    assert torch.equal(first, again) and not torch.equal(first, before) and not torch.equal(later, first)
    where = "on GPUs" if saved_on_cuda else "on the CPU"
    assert len(found["told"]) == 3 and all(f"was saved {where}; this rank's seed is" in line for line in found["told"])
    assert all("step 7" in line for line in found["told"][:2])
