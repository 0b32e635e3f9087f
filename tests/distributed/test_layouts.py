"""Every layout trains as one process does: loss and gradient norm over five steps, every gradient by name, weights.

A run measures the core and a few more that a seed picks (`JANUS_LAYOUT_SEED`, by default the commit); its summary says
which. `JANUS_LAYOUTS=all` measures the whole matrix; `python -m tools.measure_layouts` writes it down.
"""

from pathlib import Path

import pytest

from janus_mega.config.schema import Module
from tests.distributed.layout_runs import BARS, LayoutRun, assert_options_acted, compare, over_bar, run_layout
from tests.support.layouts import CORE, LAYOUTS, NUM_PICKED, STAGES, picked_layouts
from tests.support.picked import layout_seed, skip_unless_taken
from tests.support.tiny import fp32

pytestmark = pytest.mark.dist

TAKEN = picked_layouts(layout_seed())
"""Every layout for both stages takes minutes."""


@pytest.fixture(scope="module", params=STAGES)
def stage(request, tmp_path_factory) -> tuple[str, LayoutRun]:
    return request.param, run_layout(tmp_path_factory.mktemp("one"), 1, fp32(), STAGES[request.param])


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_process(name: str, stage: tuple[str, LayoutRun], tmp_path: Path, record_property) -> None:
    stage_name, one = stage
    skip_unless_taken((stage_name, name), TAKEN)
    world_size, parallel = LAYOUTS[name]
    run = run_layout(tmp_path, world_size, parallel, STAGES[stage_name])
    assert_options_acted(run, parallel)
    figures = compare(run, one)
    for key, value in figures.items():
        record_property(key, value)
    assert set(figures) == set(BARS)
    assert over_bar(figures) <= 1, figures


def test_seeds_pick_layouts_beside_the_core(monkeypatch: pytest.MonkeyPatch) -> None:
    every = {(stage, name) for stage in STAGES for name in LAYOUTS}
    seen = [picked_layouts(seed) for seed in range(60)]
    assert all(set(CORE) < picked <= every and len(picked) == len(CORE) + NUM_PICKED for picked in seen)
    assert set.union(*seen) == every  # nothing is left out for ever
    assert picked_layouts(7) == seen[7]
    monkeypatch.setenv("JANUS_LAYOUT_SEED", "7")
    assert layout_seed() == 7


def test_frozen_modules_do_not_move(stage: tuple[str, LayoutRun]) -> None:
    stage_name, one = stage
    trained = {name.split("/", 1)[1] for name in one.gradients}
    prefixes = {"decoder" if module == Module.backbone else module.value for module in STAGES[stage_name]}
    assert {name.split(".", 1)[0] for name in trained} == prefixes
    assert trained | set(one.weights) == set(one.weights)
