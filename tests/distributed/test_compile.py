"""Compiled decoder layers train as uncompiled ones do, and batches of other documents compile nothing anew."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from janus_mega.config.schema import Backend, ParallelConfig, Recompute
from janus_mega.parallel.groups import build_groups
from janus_mega.train.run import build_engine
from tests.distributed.layout_runs import LayoutRun, assert_options_acted, compare, over_bar, run_layout
from tests.support.ranks import import_what_ranks_need, results_of_ranks
from tests.support.tiny import STAGE3, TinyWorkload, fp32, tiny_recipe

HAS_COMPILER = any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "c++", "clang++"))
pytestmark = [
    pytest.mark.dist,
    pytest.mark.filterwarnings("ignore::UserWarning"),  # tracing looks at .grad of every tensor it meets
    pytest.mark.skipif(not HAS_COMPILER, reason="torch.compile needs a C++ compiler on the CPU, none is on the path"),
]

import_what_ranks_need()


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> LayoutRun:
    return run_layout(tmp_path_factory.mktemp("one"), 1, fp32(), STAGE3)


LAYOUTS = {
    "one": (1, fp32(compile=True)),
    # 10 to 17 s each, nearly all of it compilation
    "dp2": pytest.param(2, fp32(compile=True), marks=pytest.mark.seldom),
    "tp2_sp": pytest.param(2, fp32(2, compile=True, sequence_parallel=True), marks=pytest.mark.seldom),
    "megatron_dp2": pytest.param(2, fp32(compile=True, backend=Backend.megatron), marks=pytest.mark.seldom),
    "recompute_full": pytest.param(1, fp32(compile=True, recompute=Recompute.full), marks=pytest.mark.seldom),
}


@pytest.mark.parametrize(("world_size", "parallel"), LAYOUTS.values(), ids=LAYOUTS)
def test_compiled_equals_plain(
    world_size: int, parallel: ParallelConfig, one: LayoutRun, tmp_path: Path, record_property: Any
) -> None:
    run = run_layout(tmp_path, world_size, parallel, STAGE3)
    assert_options_acted(run, parallel)
    figures = compare(run, one)
    record_property("figures", str(figures))
    assert over_bar(figures) <= 1, figures


@pytest.mark.slow
def test_trap_zero2_sums_wrong_gradients_of_compiled_layers(one: LayoutRun, tmp_path: Path) -> None:
    """Why validation refuses it: the gradients of the compiled MLP are several times too large, the loss looks well."""
    figures = compare(run_layout(tmp_path, 2, fp32(compile=True, zero_stage=2), STAGE3), one)
    assert figures["gradients"] > 0.1  # 6.5


def graphs_by_step(run_dir: Path) -> list[int]:
    """Graphs compiled until the end of each step; every step has other documents, of other lengths."""
    parallel = fp32(compile=True)
    groups = build_groups(1, 1)
    workload = TinyWorkload(STAGE3, parallel)
    engine, _ = build_engine(workload, tiny_recipe(run_dir, parallel, 4), groups)
    graphs = []
    for batches in workload.batches(0, 1, 0, 4):
        counts = torch.stack([workload.count_labels(batch) for batch in batches]).sum(0)
        engine.train_step([workload.place(batch, groups) for batch in batches], counts, lr=1e-3)
        graphs.append(counters["stats"]["unique_graphs"])
    return graphs


def test_no_batch_compiles_anew(tmp_path: Path) -> None:
    (graphs,) = results_of_ranks(graphs_by_step, 1, tmp_path)
    assert graphs[0] > 0
    assert len(set(graphs)) == 1, graphs
