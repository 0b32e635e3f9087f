"""Rules between values, one small function each; everything broken is reported at once.

A rule yields messages that name the values, the rule and the knob. Types and unknown keys were refused by `load`
already. Rules of shapes are in `validate_model` and those of sources in `validate_mixture`; this file holds what a run
adds: layout, batch, stage. `world_size` is an argument: the same file is checked for one rank on a laptop and for a
thousand on a cluster.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial

from data_pipeline.errors import UserError
from data_pipeline.spec import Task
from janus_mega.config import derive
from janus_mega.config.schema import (
    Backend,
    Module,
    OptimizerConfig,
    OptimizerState,
    ParallelConfig,
    RunConfig,
    StageConfig,
    TokenizerRunConfig,
)
from janus_mega.config.validate_compute import compute_rules, tokenizer_compute_rules
from janus_mega.config.validate_health import checkpoint_rules, health_rules
from janus_mega.config.validate_mixture import curve_of, mixture_rules
from janus_mega.config.validate_model import image_tokenizer_rules, model_rules
from janus_mega.config.validate_watch import logging_rules, monitor_rules, samples_rules, validation_rules

DOCUMENT_OVERHEAD_TOKENS = 4
"""bos, eos and the two marks around an image: a row must hold an image and these."""

MODULE_NAMES = frozenset(module.value for module in Module)
TASK_NAMES = frozenset(task.value for task in Task)


def validate_run(config: RunConfig, world_size: int = 1) -> None:
    """Raises one UserError that lists every broken rule of a training run on `world_size` ranks."""
    refuse(config.name, run_problems(config, world_size))


def validate_tokenizer_run(config: TokenizerRunConfig, world_size: int = 1) -> None:
    """Raises one UserError that lists every broken rule of an image-tokenizer run."""
    refuse(config.name, tokenizer_run_problems(config, world_size))


def validate_any(config: RunConfig | TokenizerRunConfig, world_size: int = 1) -> None:
    """Validates either kind of run."""
    if isinstance(config, RunConfig):
        validate_run(config, world_size)
    else:
        validate_tokenizer_run(config, world_size)


def refuse(name: str, problems: Iterable[str]) -> None:
    """Raises UserError for a non-empty list: a single line, or a headline and one line for each."""
    found = list(problems)
    if len(found) == 1:
        raise UserError(f"config {name}: {found[0]}")
    if found:
        raise UserError("\n  ".join([f"config {name}: {len(found)} rules are broken:", *found]))


def run_problems(config: RunConfig, world_size: int) -> Iterator[str]:
    """Yields the message of every rule that a training run breaks."""
    for rule in RUN_RULES:
        yield from rule(config, world_size)


def tokenizer_run_problems(config: TokenizerRunConfig, world_size: int) -> Iterator[str]:
    """Yields the message of every rule that an image-tokenizer run breaks."""
    parallel = config.parallel
    yield from image_tokenizer_rules(config.image_tokenizer, "image_tokenizer")
    yield from optimizer_rules(config.optimizer, config.num_steps)
    if parallel.tp_size != 1 or parallel.pp_size != 1 or parallel.sequence_parallel:
        yield (
            f"parallel.tp_size {parallel.tp_size}, parallel.pp_size {parallel.pp_size}: an image tokenizer is "
            "replicated; set both to 1 and sequence_parallel to false"
        )
    if parallel.zero_stage > 2:
        yield (
            f"parallel.zero_stage {parallel.zero_stage}: an image tokenizer looks its codes up outside of a module's "
            "call, where ZeRO-3 holds no weights; set it to 1 or 2"
        )
    yield from parallel_rules(parallel, world_size)
    yield from tokenizer_compute_rules(config)
    if config.num_steps < 1:
        yield f"num_steps {config.num_steps} must be at least 1"
    yield from batch_rules("global_batch_size", config.global_batch_size, parallel, world_size)
    yield from logging_rules(config.logging, config.num_steps)
    yield from checkpoint_rules(config.checkpoint)
    yield from health_rules(config.health)


def _model(config: RunConfig, world_size: int) -> Iterator[str]:
    return model_rules(config.model, config.parallel)


def _parallel(config: RunConfig, world_size: int) -> Iterator[str]:
    return parallel_rules(config.parallel, world_size)


def _optimizer(config: RunConfig, world_size: int) -> Iterator[str]:
    return optimizer_rules(config.optimizer, config.stage.num_steps)


def _batch(config: RunConfig, world_size: int) -> Iterator[str]:
    return batch_rules("stage.global_batch_size", config.stage.global_batch_size, config.parallel, world_size)


def _stage(config: RunConfig, world_size: int) -> Iterator[str]:
    return stage_rules(config.stage)


def _compute(config: RunConfig, world_size: int) -> Iterator[str]:
    return compute_rules(config)


def _mixture(config: RunConfig, world_size: int) -> Iterator[str]:
    return mixture_rules(config.data)


def parallel_rules(parallel: ParallelConfig, world_size: int) -> Iterator[str]:
    """The layout alone: degrees, their product, ZeRO with pipelines."""
    for name in ("tp_size", "pp_size", "virtual_pp_size", "micro_batch_size"):
        if getattr(parallel, name) < 1:
            yield f"parallel.{name} {getattr(parallel, name)} must be at least 1"
    block = max(parallel.tp_size, 1) * max(parallel.pp_size, 1)
    if world_size % block:
        yield (
            f"world size {world_size} is not divisible by parallel.tp_size {parallel.tp_size} * parallel.pp_size "
            f"{parallel.pp_size}; start a multiple of {block} ranks or change the degrees"
        )
    if parallel.zero_stage not in (1, 2, 3):
        yield f"parallel.zero_stage {parallel.zero_stage} is not 1, 2 or 3"
    elif parallel.zero_stage > 1 and parallel.backend is Backend.megatron:
        yield (
            f"parallel.zero_stage {parallel.zero_stage} with parallel.backend megatron: its optimizer cuts state over "
            "dp, nothing else; set parallel.zero_stage to 1 or parallel.backend to deepspeed"
        )
    elif parallel.zero_stage > 1 and parallel.pp_size > 1:
        yield (
            f"parallel.zero_stage {parallel.zero_stage} with parallel.pp_size {parallel.pp_size}: ZeRO-2 and 3 reduce "
            "gradients in every micro-batch and need pp_size 1; set parallel.zero_stage to 1 or parallel.pp_size to 1"
        )
    if parallel.virtual_pp_size > 1 and parallel.pp_size == 1:
        yield (
            f"parallel.virtual_pp_size {parallel.virtual_pp_size} with parallel.pp_size 1: there is no pipeline to "
            "interleave; set parallel.virtual_pp_size to 1 or raise parallel.pp_size"
        )
    if parallel.sequence_parallel and parallel.tp_size == 1:
        yield "parallel.sequence_parallel needs parallel.tp_size > 1; set it to false or raise tp_size"
    if parallel.split_encoder and parallel.tp_size == 1:
        yield "parallel.split_encoder deals images over tp ranks and needs parallel.tp_size > 1; set it to false"
    if parallel.torch_threads < 0:
        yield f"parallel.torch_threads {parallel.torch_threads} must be 0 (torch's default) or more"


def batch_rules(knob: str, global_batch_size: int, parallel: ParallelConfig, world_size: int) -> Iterator[str]:
    """The global batch must split into whole micro-batches on every dp rank."""
    ranks = world_size // max(parallel.tp_size * parallel.pp_size, 1)
    block = max(parallel.micro_batch_size, 1) * max(ranks, 1)
    if global_batch_size < 1 or global_batch_size % block:
        yield (
            f"{knob} {global_batch_size} is not a multiple of parallel.micro_batch_size {parallel.micro_batch_size} * "
            f"dp_size {ranks}; choose a multiple of {block} or another micro_batch_size"
        )
    elif parallel.virtual_pp_size > 1 and global_batch_size // block % max(parallel.pp_size, 1):
        yield (
            f"{knob} {global_batch_size} gives {global_batch_size // block} micro-batches; the interleaved schedule "
            f"takes them in groups of parallel.pp_size {parallel.pp_size}; choose a multiple of "
            f"{block * parallel.pp_size} or set parallel.virtual_pp_size to 1"
        )


def optimizer_rules(optimizer: OptimizerConfig, num_steps: int) -> Iterator[str]:
    """Ranges of AdamW's numbers and of its schedule."""
    if not 0 < optimizer.lr < math.inf:
        yield f"optimizer.lr {optimizer.lr} must be positive and finite"
    if not 0 <= optimizer.warmup_steps <= max(num_steps, 0):
        yield f"optimizer.warmup_steps {optimizer.warmup_steps} must lie in 0 ... the number of steps {num_steps}"
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(optimizer, name) < 1:
            yield f"optimizer.{name} {getattr(optimizer, name)} must lie in [0, 1)"
    if not 0 <= optimizer.min_lr_ratio <= 1:
        yield f"optimizer.min_lr_ratio {optimizer.min_lr_ratio} must lie in [0, 1]"
    for name in ("weight_decay", "clip_grad_norm"):
        if not 0 <= getattr(optimizer, name) < math.inf:
            yield f"optimizer.{name} {getattr(optimizer, name)} must be 0 or more"
    if not 0 < optimizer.eps < 1:
        yield f"optimizer.eps {optimizer.eps} must lie in (0, 1)"
    if not 0 <= optimizer.ema_decay < 1:
        yield f"optimizer.ema_decay {optimizer.ema_decay} must be 0 (no average) or below 1"
    for name, scale in optimizer.lr_scales.items():
        if name not in MODULE_NAMES:
            yield f"optimizer.lr_scales: '{name}' is no module; known are {', '.join(sorted(MODULE_NAMES))}"
        elif not 0 < scale < math.inf:
            yield f"optimizer.lr_scales.{name} {scale} must be positive; to freeze it leave it out of stage.trainable"


def stage_rules(stage: StageConfig) -> Iterator[str]:
    """What trains and for how long."""
    if not stage.trainable:
        yield "stage.trainable is empty: nothing would train; name modules such as [backbone, text_head]"
    repeated = sorted({module.value for module in stage.trainable if stage.trainable.count(module) > 1})
    if repeated:
        yield f"stage.trainable names {', '.join(repeated)} more than once; name each module once"
    if stage.optimizer_state is OptimizerState.carry and not stage.init_from:
        yield "stage.optimizer_state carry needs a checkpoint to carry it from; set stage.init_from, or leave it fresh"
    if stage.num_steps < 1:
        yield f"stage.num_steps {stage.num_steps} must be at least 1"
    if not 0 <= stage.stop_at_step <= max(stage.num_steps, 0):
        yield f"stage.stop_at_step {stage.stop_at_step} must lie in 0 (no stop) ... stage.num_steps {stage.num_steps}"


def _rows(config: RunConfig, world_size: int) -> Iterator[str]:
    """A row holds at least one whole image, is not longer than the positions, and divides over tp."""
    seq_len, geometry, parallel = config.data.seq_len, config.data.geometry, config.parallel
    needed = max(geometry.understanding_tokens, geometry.generation_tokens) + DOCUMENT_OVERHEAD_TOKENS
    if seq_len < needed:
        yield f"data.seq_len {seq_len} cannot hold one image and its marks ({needed} tokens); raise it"
    if seq_len > config.model.backbone.max_position_embeddings:
        yield (
            f"data.seq_len {seq_len} is above model.backbone.max_position_embeddings "
            f"{config.model.backbone.max_position_embeddings}; lower one or raise the other"
        )
    if parallel.sequence_parallel and parallel.tp_size > 0 and seq_len % parallel.tp_size:
        yield (
            f"data.seq_len {seq_len} is not divisible by parallel.tp_size {parallel.tp_size}, which sequence_parallel "
            "needs; change seq_len or switch parallel.sequence_parallel off"
        )


def _geometry(config: RunConfig, world_size: int) -> Iterator[str]:
    """The data was prepared for the pictures and codes that the model has."""
    model = config.model
    if model.understanding.patch_size < 1 or model.understanding.image_size % model.understanding.patch_size:
        return  # the model's own rule reports it
    expected = derive.image_geometry(model)
    for name in expected.__dataclass_fields__:
        ours, theirs = getattr(config.data.geometry, name), getattr(expected, name)
        if ours != theirs:
            yield (
                f"data.geometry.{name} is {ours}, the model makes it {theirs}; use shards prepared for this model, "
                "or change model.understanding / model.image_tokenizer"
            )


def _loss(config: RunConfig, world_size: int) -> Iterator[str]:
    """Weights of tasks have known names and leave something to learn."""
    weights = config.loss.task_weights
    for name, weight in weights.items():
        if name not in TASK_NAMES:
            yield f"loss.task_weights: '{name}' is no task; known are {', '.join(sorted(TASK_NAMES))}"
        elif not 0 <= weight < math.inf:
            yield f"loss.task_weights.{name} {weight} must be a finite number of 0 or more"
    mixed = {source.task.value for source in config.data.sources.values() if curve_of(source).is_used}
    if mixed and all(weights.get(name, 0.0) == 0 for name in mixed):
        yield f"loss.task_weights gives 0 to every task in the mixture ({', '.join(sorted(mixed))}); raise one"
    if config.loss.chunk_tokens < 1:
        yield f"loss.chunk_tokens {config.loss.chunk_tokens} must be at least 1"
    if not 0 <= config.loss.z_loss < math.inf:
        yield f"loss.z_loss {config.loss.z_loss} must be a finite number of 0 (off) or more"


def _intervals(config: RunConfig, world_size: int) -> Iterator[str]:
    """How often things happen."""
    yield from logging_rules(config.logging, derive.last_step(config.stage))
    yield from checkpoint_rules(config.checkpoint)


def _watch(config: RunConfig, world_size: int) -> Iterator[str]:
    """Validation sets and samples."""
    yield from validation_rules(config, partial(batch_rules, parallel=config.parallel, world_size=world_size))
    yield from samples_rules(config)
    yield from monitor_rules(config)


def _health(config: RunConfig, world_size: int) -> Iterator[str]:
    return health_rules(config.health)


RUN_RULES: tuple[Callable[[RunConfig, int], Iterator[str]], ...] = (
    _model,
    _parallel,
    _batch,
    _rows,
    _geometry,
    _mixture,
    _loss,
    _optimizer,
    _stage,
    _compute,
    _intervals,
    _watch,
    _health,
)
"""Every rule of a training run, in the order in which they are reported."""
