"""The estimate's peak is what a step really allocates, within a tenth.

Ranks rest after every collective until gloo's threads hold no message any more: what is measured are the tensors of the
step.
"""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from janus_mega.config.schema import Backend, ModelConfig, ParallelConfig, Recompute
from janus_mega.estimate.batch import MicroBatch
from janus_mega.estimate.memory import Memory, step_memory
from janus_mega.estimate.shape import rank_shapes
from janus_mega.parallel.groups import build_groups
from janus_mega.train.run import build_engine
from tests.distributed.test_traffic import bf16, config_of, counts_of
from tests.support.peak import AllocatedPeak, SettledCollectives
from tests.support.picked import layout_seed, picked_beside, skip_unless_taken
from tests.support.ranks import import_what_ranks_need, results_of_ranks
from tests.support.tiny import STAGE3, TinyWorkload, fp32, make_batch, random_row, tiny_model, tiny_recipe

pytestmark = pytest.mark.dist
import_what_ranks_need()

BAR = 0.10
SEEN = 0.12
"""Of the peak, and so that without it the estimate would miss the bar."""
LAYOUTS = {
    "one": (1, fp32(micro_batch_size=4)),
    "one_recompute_full": (1, fp32(micro_batch_size=4, recompute=Recompute.full)),
    "one_bf16": (1, bf16(micro_batch_size=4)),
    "tp2": (2, fp32(2, micro_batch_size=4)),
    "tp2_sp": (2, fp32(2, sequence_parallel=True, micro_batch_size=4)),
    "tp2_sp_bf16": (2, bf16(2, sequence_parallel=True, micro_batch_size=4)),
    "tp2_split_encoder": (2, fp32(2, split_encoder=True, micro_batch_size=4)),
    "dp2_bf16": (2, bf16(micro_batch_size=2)),
    "dp2_selective": (2, fp32(micro_batch_size=2, recompute=Recompute.selective)),
    "pp2": (2, fp32(1, 2, micro_batch_size=2)),
    "dp2_zero2": (2, fp32(zero_stage=2, micro_batch_size=2)),
    "megatron_dp2": (2, fp32(backend=Backend.megatron, micro_batch_size=2)),
}

ALWAYS = {"one", "one_bf16", "tp2_sp", "dp2_zero2", "megatron_dp2"}
TAKEN = ALWAYS | picked_beside(ALWAYS, LAYOUTS, layout_seed())


@dataclass(frozen=True)
class Sizes:
    """What a workload's memory is mostly of."""

    hidden: int = 64
    layers: int = 4
    ffn: int = 128
    vocab: int = 128
    encoder: tuple[int, int] = (32, 2)
    """Width and layers."""
    image_side: int = 16
    kinds: str = ""
    """Documents of every row; else the rows of `tiny`."""

    def model(self) -> ModelConfig:
        model = tiny_model()
        width, num_layers = self.encoder
        return replace(
            model,
            backbone=replace(
                model.backbone,
                hidden_size=self.hidden,
                num_layers=self.layers,
                ffn_hidden_size=self.ffn,
                vocab_size=self.vocab,
            ),
            understanding=replace(
                model.understanding,
                hidden_size=width,
                num_layers=num_layers,
                image_size=self.image_side,
                patch_size=self.image_side // 4,
            ),
        )

    def batches(self, workload: TinyWorkload, dp_rank: int, dp_size: int) -> list[dict[str, Tensor]]:
        """A dp rank's micro-batches of a step."""
        (batches,) = workload.batches(dp_rank, dp_size, 0, 1)
        if self.kinds:
            generator = torch.Generator().manual_seed(dp_rank)
            size = workload.parallel.micro_batch_size
            batches = [make_batch([random_row(generator, self.kinds) for _ in range(size)]) for _ in batches]
        for batch in batches:
            shape = (batch["pixel_values"].shape[0], 3, self.image_side, self.image_side)
            batch["pixel_values"] = torch.zeros(shape, dtype=torch.uint8)
        return batches


def measured_and_told(tmp_path: Path, parallel: ParallelConfig, sizes: Sizes) -> tuple[int, int, dict[str, int]]:
    """Stage of the pipeline, bytes allocated at the peak of a step after the first, and the estimate's parts for the
    same micro-batches."""
    with AllocatedPeak() as allocated, SettledCollectives():
        groups = build_groups(parallel.tp_size, parallel.pp_size, virtual_pp_size=parallel.virtual_pp_size)
        workload = TinyWorkload(STAGE3, parallel, sizes.model())
        engine, _ = build_engine(workload, tiny_recipe(tmp_path, parallel, 2), groups)
        layout = groups.layout
        # The same micro-batches twice: the first step makes the optimizer's state.
        batches = sizes.batches(workload, layout.dp_rank, layout.dp_size)
        counts = torch.stack([workload.count_labels(batch) for batch in batches]).sum(0)
        placed = [workload.place(batch, groups) for batch in batches]
        engine.train_step(placed, counts, lr=1e-3)
        for _ in range(2):
            with allocated.span():
                engine.train_step(placed, counts, lr=1e-3)
    config = config_of(parallel, STAGE3, sizes.model())
    shape = rank_shapes(config)[layout.pp_rank]
    all_counts = [counts_of(batch) for batch in batches]
    mean = MicroBatch(
        tokens=all_counts[0].tokens,
        labels=tuple(max(c.labels[task] for c in all_counts) for task in range(3)),
        images=max(c.images for c in all_counts),
        drawn=max(c.drawn for c in all_counts),
    )
    told = step_memory(config, layout.world_size, shape, layout.pp_rank, mean, len(batches), on_cpu=True)
    return layout.pp_rank, allocated.peak_bytes, told.parts()


def by_stage(ranks: list[Any]) -> dict[int, tuple[int, Memory]]:
    """Bytes measured and the estimate, by stage of the pipeline, whose ranks all do the same work."""
    found = {}
    for stage in {rank[0] for rank in ranks}:
        alike = [rank for rank in ranks if rank[0] == stage]
        told = max((Memory(**rank[2]) for rank in alike), key=lambda memory: memory.peak)
        found[stage] = (min(rank[1] for rank in alike), told)
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_step_peaks_where_the_estimate_says(name, tmp_path, record_property):
    skip_unless_taken(name, TAKEN)
    world_size, parallel = LAYOUTS[name]
    ranks = results_of_ranks(measured_and_told, world_size, tmp_path, parallel, Sizes())
    for stage, (measured, told) in by_stage(ranks).items():
        record_property(f"told / measured, stage {stage}", told.peak / measured)
        assert told.peak == pytest.approx(measured, rel=BAR), (told.peak / measured, told.parts())


WIDE = Sizes(hidden=512, layers=2, ffn=512, kinds="t")
WIDER = Sizes(hidden=128, kinds="t")
SEES = Sizes(layers=1, encoder=(64, 6), kinds="uuu")
SCORES = Sizes(layers=1, ffn=64, vocab=2048, kinds="ttt")
LARGE_IMAGES = Sizes(layers=1, image_side=96, kinds="uuu")
TERMS = {
    "wide": (1, fp32(), WIDE, {"weights", "masters", "moments", "gradients"}),
    "wide_bf16": (1, bf16(), WIDE, {"masters", "moments", "gradients", "update"}),
    "wide_bf16_dp2": (2, bf16(), WIDE, {"moments", "gradients", "update"}),
    "wide_megatron": (2, fp32(backend=Backend.megatron), WIDE, {"weights", "moments", "gradients", "update"}),
    "wide_zero2": (2, fp32(zero_stage=2), WIDE, {"weights", "moments", "buckets"}),
    "wide_zero2_bf16": (2, bf16(zero_stage=2), WIDE, {"moments", "update"}),
    "wide_zero3": (2, fp32(zero_stage=3, micro_batch_size=4), WIDE, {"moments", "buckets", "gathered", "activations"}),
    "wide_zero3_bf16": (2, bf16(zero_stage=3), WIDE, {"moments", "buckets", "update"}),
    "zero2": (2, fp32(zero_stage=2, micro_batch_size=2), WIDER, {"buckets", "activations"}),
    "zero3": (2, fp32(zero_stage=3, micro_batch_size=2), WIDER, {"buckets", "activations"}),
    "encoder": (1, fp32(micro_batch_size=4), SEES, {"encoder"}),
    "encoder_bf16": (1, bf16(micro_batch_size=4), SEES, {"encoder"}),
    "encoder_split": (2, fp32(2, split_encoder=True, micro_batch_size=4), SEES, {"encoder"}),
    "heads": (1, fp32(micro_batch_size=8), SCORES, {"heads"}),
    "heads_bf16": (1, bf16(micro_batch_size=8), SCORES, {"heads"}),
    "heads_tp2": (2, fp32(2, micro_batch_size=8), SCORES, {"heads", "activations"}),
    "heads_tp2_bf16": (2, bf16(2, micro_batch_size=8), SCORES, {"heads", "activations"}),
    "batches": (1, fp32(), LARGE_IMAGES, {"batches"}),
}
"""Workloads whose memory is mostly of the terms named."""
TERMS_ALWAYS = {"wide", "wide_bf16", "wide_zero3", "encoder", "heads_bf16", "heads_tp2", "batches"}
TERMS_TAKEN = TERMS_ALWAYS | picked_beside(TERMS_ALWAYS, TERMS, layout_seed())


@pytest.mark.parametrize("name", TERMS)
def test_every_term_is_seen(name, tmp_path, record_property):
    """Without any one of the terms named the estimate would be off by more than the bar."""
    skip_unless_taken(name, TERMS_TAKEN)
    world_size, parallel, sizes, terms = TERMS[name]
    ((measured, told),) = by_stage(results_of_ranks(measured_and_told, world_size, tmp_path, parallel, sizes)).values()
    record_property("told / measured", told.peak / measured)
    assert told.peak == pytest.approx(measured, rel=BAR), (told.peak / measured, told.parts())
    shares = {term: 1 - replace(told, **{term: 0}).peak / told.peak for term in told.parts()}
    for term in terms:
        assert shares[term] > SEEN, (term, shares)
        assert replace(told, **{term: 0}).peak != pytest.approx(measured, rel=BAR), (term, shares)


def test_no_term_is_left_out() -> None:
    """Every term but the stated constant, which is of a GPU."""
    named = set[str]().union(*(TERMS[name][-1] for name in TERMS_ALWAYS))
    assert named == {field.name for field in fields(Memory)} - {"overhead"}
