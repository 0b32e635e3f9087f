"""The estimate of a run on some GPUs: memory, traffic and time of a step, and of the stage.

A step takes the longest of its pipeline ranks' times, each of them model FLOPs at the stated MFU, times what is
computed again, divided by the busy share of the pipeline, plus collectives that nothing hides. The stated MFU is thus
that of a rank while it computes; it is an input. Nothing here was fitted to a GPU.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from janus_mega.config import derive
from janus_mega.config.schema import Backend, Module, ParallelConfig, Precision, Recompute, RunConfig
from janus_mega.config.validate import run_problems
from janus_mega.estimate.batch import MicroBatch, mean_micro_batch, num_micro_batches
from janus_mega.estimate.gpus import GPUS_PER_NODE, LINK_SHARE, Gpu
from janus_mega.estimate.memory import Memory, step_memory
from janus_mega.estimate.saves import Saves, save_sizes
from janus_mega.estimate.shape import RankShape, rank_shapes
from janus_mega.estimate.traffic import Traffic, step_traffic
from janus_mega.observe.throughput import (
    StepCounts,
    encoder_forward_flops,
    module_forward_flops,
    training_flops,
)

USABLE_SHARE = 0.94
"""Of a GPU's memory that an estimate may fill: the closed forms are held to a tenth, and allocators waste some."""


@dataclass(frozen=True, slots=True)
class RankEstimate:
    """One pipeline rank (its tp and dp ranks are alike)."""

    shape: RankShape
    memory: Memory
    traffic: Traffic


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a configuration costs on `num_gpus`."""

    config: RunConfig
    num_gpus: int
    ranks: list[RankEstimate]
    num_micro_batches: int
    bubble: float
    """Share of a step in which a pipeline rank waits."""
    step_flops: float
    """Model FLOPs over all ranks."""
    step_s: float
    communication_s: float
    """Of step_s."""
    saves: Saves

    @property
    def tokens_per_s(self) -> float:
        """Positions per second over all GPUs."""
        return derive.tokens_per_step(self.config) / self.step_s

    @property
    def gpu_hours(self) -> float:
        """Of the whole stage."""
        return self.step_s * derive.last_step(self.config.stage) * self.num_gpus / 3600

    @property
    def peak_bytes(self) -> int:
        """Of the fullest rank."""
        return max(rank.memory.peak for rank in self.ranks)

    def fits(self, gpu: Gpu) -> bool:
        """Whether every rank stays within the usable memory."""
        return self.peak_bytes <= USABLE_SHARE * gpu.memory_bytes


def estimate(config: RunConfig, num_gpus: int, gpu: Gpu, mfu: float) -> Estimate:
    """Estimates a valid configuration."""
    batch = mean_micro_batch(config)
    count = num_micro_batches(config, num_gpus)
    shapes, ranks = rank_shapes(config), []
    for number, shape in enumerate(shapes):
        memory = step_memory(config, num_gpus, shape, number, batch, count, on_cpu=False)
        ranks.append(RankEstimate(shape, memory, step_traffic(config, num_gpus, shape, [batch] * count)))
    bubble = bubble_fraction(config.parallel, count)
    model_flops, worked_flops = _flops(config, num_gpus, batch, count)
    peak = gpu.peak_bf16 / (1 if config.parallel.precision is Precision.bf16 else 2)
    computed_s = worked_flops / (num_gpus * peak * mfu) / (1 - bubble)
    communication_s = max(_communication_s(config, num_gpus, rank.traffic, gpu) for rank in ranks)
    step_s = computed_s + communication_s
    saves = save_sizes(config, num_gpus, shapes)
    return Estimate(config, num_gpus, ranks, count, bubble, model_flops, step_s, communication_s, saves)


def bubble_fraction(parallel: ParallelConfig, num_micro_batches: int) -> float:
    """Idle share of a pipeline rank: (p - 1) / (v m + p - 1) with p ranks, v chunks each, m micro-batches."""
    idle = parallel.pp_size - 1
    return idle / (parallel.virtual_pp_size * num_micro_batches + idle)


def _flops(config: RunConfig, num_gpus: int, batch: MicroBatch, count: int) -> tuple[float, float]:
    """Model FLOPs of a step over all ranks, and with what is computed again or by every tp rank."""
    times = count * derive.dp_size(config.parallel, num_gpus)
    counts = StepCounts(
        tokens=times * batch.tokens,
        understanding_images=times * batch.images,
        generation_tokens=times * batch.drawn,
        text_labels=times * (batch.labels[0] + batch.labels[1]),
        image_labels=times * batch.labels[2],
    )
    seq_len = config.data.seq_len
    model_flops = training_flops(config.model, counts, config.stage.trainable, seq_len)
    forward = module_forward_flops(config.model, counts, seq_len)
    backbone = next(flops for module, flops in forward.items() if module.value == "backbone")
    scores = 2.0 * counts.tokens * config.model.backbone.num_layers * config.model.backbone.hidden_size * seq_len
    again = {Recompute.none: 0.0, Recompute.selective: scores, Recompute.full: backbone}[config.parallel.recompute]
    return model_flops, model_flops + again + (config.parallel.tp_size - 1) * _repeated_flops(config, counts)


def _repeated_flops(config: RunConfig, counts: StepCounts) -> float:
    """What every tp rank works out for itself: both pathways, less the encoder where its images are dealt."""
    pathways = replace(counts, tokens=0, text_labels=0, image_labels=0)
    flops = training_flops(config.model, pathways, config.stage.trainable, config.data.seq_len)
    if config.parallel.split_encoder:
        passes = 3 if Module.understanding_encoder in config.stage.trainable else 1
        flops -= passes * counts.understanding_images * encoder_forward_flops(config.model.understanding)
    return flops


def _communication_s(config: RunConfig, num_gpus: int, traffic: Traffic, gpu: Gpu) -> float:
    """Seconds of a rank's collectives, ring algorithms, nothing hidden behind computation."""
    parallel = config.parallel
    sizes = {"tp": parallel.tp_size, "pp": 2, "dp": derive.dp_size(parallel, num_gpus), "world": num_gpus}
    # Neighbours first: tp, then dp, then pp (parallel.layout).
    reach = {"tp": parallel.tp_size, "dp": parallel.tp_size * sizes["dp"], "pp": num_gpus, "world": num_gpus}
    seconds = 0.0
    for (group, kind), size in traffic.bytes.items():
        if group not in sizes:
            continue
        is_near = reach[group] <= GPUS_PER_NODE
        speed = LINK_SHARE * (gpu.node_bytes_per_s if is_near else gpu.fabric_bytes_per_s)
        ranks = sizes[group]
        factors = {
            "all_reduce": 2 * (ranks - 1) / ranks,
            "all_gather": ranks - 1,
            "reduce_scatter": (ranks - 1) / ranks,
        }
        seconds += size * factors.get(kind, 0.5) / speed  # sends and receives go both ways at once
    return seconds


def layouts(config: RunConfig, num_gpus: int) -> Iterator[RunConfig]:
    """The configuration in every valid layout of `num_gpus`: tp within a node, pp, interleaving, ZeRO, recompute."""
    for tp_size in (1, 2, 4, 8):
        for pp_size in (1, 2, 4, 8, 16):
            for virtual in (1, 2) if pp_size > 1 else (1,):
                for zero_stage in (1, 2, 3) if pp_size == 1 else (1,):
                    for recompute in Recompute:
                        parallel = replace(
                            config.parallel,
                            tp_size=tp_size,
                            pp_size=pp_size,
                            virtual_pp_size=virtual,
                            pipeline_layers=[],
                            sequence_parallel=tp_size > 1,
                            split_encoder=config.parallel.split_encoder and tp_size > 1,
                            backend=config.parallel.backend if zero_stage == 1 else Backend.deepspeed,
                            zero_stage=zero_stage,
                            recompute=recompute,
                        )
                        changed = replace(config, parallel=parallel)
                        if not any(run_problems(changed, num_gpus)):
                            yield changed


def ranked(config: RunConfig, num_gpus: int, gpu: Gpu, mfu: float) -> list[Estimate]:
    """The layouts that fit, fastest first; at equal speed the one that leaves more memory."""
    found = (estimate(layout, num_gpus, gpu, mfu) for layout in layouts(config, num_gpus))
    return sorted((e for e in found if e.fits(gpu)), key=lambda e: (round(e.step_s, 6), e.peak_bytes))
