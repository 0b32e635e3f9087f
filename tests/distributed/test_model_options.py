"""Options of the model over layouts: each trains as it does in one process, or says why it cannot."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.multiprocessing import ProcessRaisedException

from janus_mega.config.schema import Backend, LossConfig, Module, ParallelConfig
from janus_mega.models.janus import JanusChunk
from janus_mega.models.pathways import WayIn
from janus_mega.models.placement import PlacedBatch
from tests.distributed.layout_runs import LayoutRun, Variant, assert_options_acted, compare, over_bar, run_layout
from tests.support.tiny import STAGE1, STAGE3, fp32, tiny_model

pytestmark = pytest.mark.dist

OPTIONS = {
    "qk_norm": Variant(model=tiny_model(qk_norm=True), num_steps=5),
    "z_loss": Variant(loss=LossConfig(z_loss=1e-3), num_steps=5),
}
LAYOUTS = {
    "tp2_sp": (2, fp32(2, sequence_parallel=True)),
    "pp2": (2, fp32(1, 2)),
    "tp2_pp2": (4, fp32(2, 2)),
    "dp2_check_calls": (2, fp32(check_calls=True)),
    "megatron_tp2": (2, fp32(2, backend=Backend.megatron, check_calls=True)),
}


CASES = [
    ("qk_norm", "tp2_sp"),
    ("qk_norm", "pp2"),
    ("qk_norm", "tp2_pp2"),
    ("qk_norm", "dp2_check_calls"),
    ("z_loss", "tp2_sp"),
    ("z_loss", "megatron_tp2"),
]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LayoutRun]:
    return {
        name: run_layout(tmp_path_factory.mktemp(name), 1, fp32(), STAGE3, variant) for name, variant in OPTIONS.items()
    }


@pytest.mark.parametrize(("option", "layout"), CASES)
def test_option_equals_one_process(
    option: str,
    layout: str,
    one: dict[str, LayoutRun],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    world_size, parallel = LAYOUTS[layout]
    figures = compare(run_layout(tmp_path, world_size, parallel, STAGE3, OPTIONS[option]), one[option])
    record_property("figures", str(figures))
    assert over_bar(figures) <= 1, figures


def without_dummies() -> None:
    """Takes the dummy items away: a way into the stream is walked only by what is there."""
    walk_in = JanusChunk._walk_in

    def only_real_items(self: JanusChunk, way: WayIn, batch: PlacedBatch) -> Tensor | None:
        return walk_in(self, way, batch) if way.items(batch).shape[0] else None

    JanusChunk._walk_in = only_real_items


@pytest.mark.parametrize("backend", Backend)
def test_missing_module_is_named_with_its_rank(backend: Backend, tmp_path: Path) -> None:
    """In the second step, the rows of rank 1 hold no image to understand."""
    parallel = fp32(backend=backend, check_calls=True)
    expected = r"understanding_adaptor on rank 1; understanding_encoder on rank 1; data-parallel"
    with pytest.raises(ProcessRaisedException, match=expected):
        run_layout(tmp_path, 2, parallel, STAGE3, Variant(num_steps=2, patch=without_dummies))


AHEAD: dict[str, tuple[int, ParallelConfig, tuple[Module, ...]]] = {
    "one": (1, fp32(encode_ahead=3), STAGE1),
    "dp2": (2, fp32(encode_ahead=64, check_calls=True), STAGE1),
    "pp2_interleaved": (2, fp32(1, 2, virtual_pp_size=2, encode_ahead=5), STAGE1),
}


@pytest.fixture(scope="module")
def one_stage1(tmp_path_factory: pytest.TempPathFactory) -> LayoutRun:
    return run_layout(tmp_path_factory.mktemp("one"), 1, fp32(), STAGE1)


@pytest.mark.parametrize("name", AHEAD)
def test_encoding_ahead_changes_nothing(name: str, one_stage1: LayoutRun, tmp_path: Path, record_property: Any) -> None:
    """Over the five steps are micro-batches, ranks and whole steps without an image to understand."""
    world_size, parallel, trainable = AHEAD[name]
    run = run_layout(tmp_path, world_size, parallel, trainable)
    assert_options_acted(run, parallel)
    assert_options_acted(one_stage1, fp32())
    figures = compare(run, one_stage1)
    record_property("figures", str(figures))
    assert over_bar(figures) <= 1, figures


@pytest.mark.parametrize("parallel", [fp32(encode_ahead=3), fp32(compile=True)], ids=["encode_ahead", "compile"])
def test_an_option_that_does_nothing_is_seen(parallel: ParallelConfig, one_stage1: LayoutRun) -> None:
    """As where the run was made without it."""
    with pytest.raises(AssertionError):
        assert_options_acted(one_stage1, parallel)
