"""The layouts whose training must be that of one process, and those of them that every run of the tests measures."""

import random

from janus_mega.config.schema import Backend, ParallelConfig, Recompute
from tests.support.tiny import STAGE1, STAGE3, fp32

FULL, SELECTIVE, MEGATRON = Recompute.full, Recompute.selective, Backend.megatron

LAYOUTS: dict[str, tuple[int, ParallelConfig]] = {
    "tp2": (2, fp32(2)),
    "tp2_sp": (2, fp32(2, sequence_parallel=True)),
    "tp2_split_encoder_rows2": (2, fp32(2, split_encoder=True, micro_batch_size=2)),
    "tp2_recompute_selective": (2, fp32(2, recompute=SELECTIVE)),
    "pp2": (2, fp32(1, 2)),
    "pp2_uneven": (2, fp32(1, 2, pipeline_layers=[1, 3])),
    "pp2_recompute_full": (2, fp32(1, 2, recompute=FULL)),
    "pp2_interleaved": (2, fp32(1, 2, virtual_pp_size=2)),
    "dp2_zero1": (2, fp32()),
    "dp2_zero2": (2, fp32(zero_stage=2)),
    "dp2_zero3": (2, fp32(zero_stage=3)),
    "dp2_rows2": (2, fp32(micro_batch_size=2)),
    "tp2_dp2_sp_zero1": (4, fp32(2, sequence_parallel=True)),
    "tp2_dp2_sp_zero2": (4, fp32(2, sequence_parallel=True, zero_stage=2)),
    "tp2_dp2_sp_zero3_recompute_full": (4, fp32(2, sequence_parallel=True, zero_stage=3, recompute=FULL)),
    "tp2_dp2_zero3_split_encoder": (4, fp32(2, zero_stage=3, split_encoder=True, micro_batch_size=2)),
    "dp2_pp2": (4, fp32(1, 2)),
    "dp2_pp2_interleaved_recompute_full": (4, fp32(1, 2, virtual_pp_size=2, recompute=FULL)),
    "tp2_pp2_sp": (4, fp32(2, 2, sequence_parallel=True)),
    "tp2_pp2_sp_interleaved": (4, fp32(2, 2, sequence_parallel=True, virtual_pp_size=2)),
    "megatron_one": (1, fp32(backend=MEGATRON)),
    "megatron_tp2_sp": (2, fp32(2, sequence_parallel=True, backend=MEGATRON)),
    "megatron_tp2_sp_split_encoder": (2, fp32(2, sequence_parallel=True, split_encoder=True, backend=MEGATRON)),
    "megatron_pp2": (2, fp32(1, 2, backend=MEGATRON)),
    "megatron_pp2_interleaved": (2, fp32(1, 2, virtual_pp_size=2, backend=MEGATRON)),
    "megatron_dp2": (2, fp32(backend=MEGATRON)),
    "megatron_tp2_dp2_sp_recompute_selective": (
        4,
        fp32(2, sequence_parallel=True, recompute=SELECTIVE, backend=MEGATRON),
    ),
    "megatron_dp2_pp2_recompute_full": (4, fp32(1, 2, recompute=FULL, backend=MEGATRON)),
    "megatron_tp2_pp2_sp": (4, fp32(2, 2, sequence_parallel=True, backend=MEGATRON)),
    "megatron_tp2_pp2_sp_interleaved": (
        4,
        fp32(2, 2, sequence_parallel=True, virtual_pp_size=2, backend=MEGATRON),
    ),
}
"""Name -> (ranks, layout)."""

STAGES = {"stage1": STAGE1, "stage3": STAGE3}

CORE = (
    ("stage1", "pp2"),
    ("stage1", "tp2_dp2_sp_zero2"),
    ("stage3", "dp2_zero1"),
    ("stage3", "tp2_dp2_sp_zero3_recompute_full"),
    ("stage3", "tp2_pp2_sp_interleaved"),
    ("stage3", "megatron_tp2_pp2_sp"),
)
"""(stage, layout) that every run of the tests measures: each degree, ZeRO stage, schedule and backend at least once."""
NUM_PICKED = 4


def picked_layouts(seed: int) -> set[tuple[str, str]]:
    """The core and a few more by a seed."""
    others = [(stage, name) for stage in STAGES for name in LAYOUTS if (stage, name) not in CORE]
    return {*CORE, *random.Random(seed).sample(others, NUM_PICKED)}
