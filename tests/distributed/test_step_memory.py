"""The estimate's peak is what a step really allocates, within a tenth.

gloo's threads hold what they carried for a moment after the call; ranks rest after each, so that what is measured are
the tensors of the step.
"""

import pytest
import torch

from janus_mega.config.schema import Backend, ParallelConfig, Recompute
from janus_mega.estimate.batch import MicroBatch
from janus_mega.estimate.memory import step_memory
from janus_mega.estimate.shape import rank_shapes
from janus_mega.parallel.groups import build_groups
from janus_mega.train.run import build_engine
from tests.distributed.test_traffic import bf16, config_of, counts_of
from tests.support.peak import AllocatedPeak, SettledCollectives
from tests.support.picked import layout_seed, picked_beside, skip_unless_taken
from tests.support.ranks import import_what_ranks_need, results_of_ranks
from tests.support.tiny import STAGE3, TinyWorkload, fp32, tiny_recipe

pytestmark = pytest.mark.dist
import_what_ranks_need()

BAR = 0.10
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


def measured_and_told(tmp_path, parallel: ParallelConfig):
    """Bytes allocated at the peak of a step after the first, and the estimate for the same micro-batches."""
    with AllocatedPeak() as allocated:
        groups = build_groups(parallel.tp_size, parallel.pp_size, virtual_pp_size=parallel.virtual_pp_size)
        workload = TinyWorkload(STAGE3, parallel)
        engine, _ = build_engine(workload, tiny_recipe(tmp_path, parallel, 2), groups)
        layout = groups.layout
        # The same micro-batches twice: the first step makes the optimizer's state.
        (batches,) = workload.batches(layout.dp_rank, layout.dp_size, 0, 1)
        counts = torch.stack([workload.count_labels(batch) for batch in batches]).sum(0)
        placed = [workload.place(batch, groups) for batch in batches]
        engine.train_step(placed, counts, lr=1e-3)
        for _ in range(5):
            with SettledCollectives(), allocated.span():
                engine.train_step(placed, counts, lr=1e-3)
    config = config_of(parallel, STAGE3)
    shape = rank_shapes(config)[layout.pp_rank]
    all_counts = [counts_of(batch) for batch in batches]
    mean = MicroBatch(
        tokens=all_counts[0].tokens,
        labels=tuple(max(c.labels[task] for c in all_counts) for task in range(3)),
        images=max(c.images for c in all_counts),
        drawn=max(c.drawn for c in all_counts),
    )
    told = step_memory(config, layout.world_size, shape, layout.pp_rank, mean, len(batches), on_cpu=True)
    return layout.pp_rank, allocated.peak_bytes, told.peak, told.parts()


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_step_peaks_where_the_estimate_says(name, tmp_path, record_property):
    skip_unless_taken(name, TAKEN)
    world_size, parallel = LAYOUTS[name]
    ranks = results_of_ranks(measured_and_told, world_size, tmp_path, parallel)
    for pp_rank in {rank[0] for rank in ranks}:
        # Ranks of one stage do the same work; gloo's threads hold a copy of the last large message on some of them.
        measured = min(rank[1] for rank in ranks if rank[0] == pp_rank)
        told, parts = max((rank[2:] for rank in ranks if rank[0] == pp_rank), key=lambda pair: pair[0])
        record_property(f"told / measured, stage {pp_rank}", told / measured)
        assert told == pytest.approx(measured, rel=BAR), (told / measured, parts)
