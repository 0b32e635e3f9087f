"""Rules of the options that change how a step is computed or looked at: what each of them cannot be combined with."""

from collections.abc import Iterator

from janus_mega.config.schema import Module, RunConfig, TokenizerRunConfig


def compute_rules(config: RunConfig) -> Iterator[str]:
    """Yields the broken rules of compilation, of encoding ahead and of gradients per task."""
    yield from _compile_rules(config)
    yield from _encode_ahead_rules(config)
    yield from _task_gradient_rules(config)


def _compile_rules(config: RunConfig) -> Iterator[str]:
    parallel = config.parallel
    if parallel.compile and parallel.zero_stage > 1:
        yield (
            f"parallel.compile with parallel.zero_stage {parallel.zero_stage}: ZeRO-2 was measured to sum wrong "
            "gradients of compiled layers, ZeRO-3 gathers weights inside of them; set parallel.compile to false or "
            "parallel.zero_stage to 1"
        )


def _encode_ahead_rules(config: RunConfig) -> Iterator[str]:
    parallel = config.parallel
    if parallel.encode_ahead < 0:
        yield f"parallel.encode_ahead {parallel.encode_ahead} must be 0 (each micro-batch encodes its own) or more"
    if parallel.encode_ahead <= 0:
        return
    if Module.understanding_encoder in config.stage.trainable:
        yield (
            f"parallel.encode_ahead {parallel.encode_ahead} keeps no graph, but stage.trainable names "
            "understanding_encoder; set parallel.encode_ahead to 0 or freeze the encoder"
        )
    if parallel.zero_stage == 3:
        yield (
            f"parallel.encode_ahead {parallel.encode_ahead} with parallel.zero_stage 3: no rank holds the encoder's "
            "weights outside of a step's forward pass; set parallel.encode_ahead to 0 or parallel.zero_stage to 1 or 2"
        )


def _task_gradient_rules(config: RunConfig) -> Iterator[str]:
    every, parallel = config.logging.task_gradients_every, config.parallel
    if every < 0:
        yield f"logging.task_gradients_every {every} must be 0 (never) or more"
    if every <= 0:
        return
    knob = f"logging.task_gradients_every {every}"
    if parallel.pp_size > 1:
        yield (
            f"{knob} with parallel.pp_size {parallel.pp_size}: the three losses share one forward pass, which a "
            "pipeline's schedule cannot go back through task by task; set it to 0 or parallel.pp_size to 1"
        )
    if parallel.zero_stage == 3:
        yield (
            f"{knob} with parallel.zero_stage 3: weights are only gathered for the engine's own passes; set it to 0 or "
            "parallel.zero_stage to 1 or 2"
        )
    if Module.backbone not in config.stage.trainable:
        yield f"{knob}: the backbone is frozen and has no gradient; set it to 0 or add backbone to stage.trainable"


def tokenizer_compute_rules(config: TokenizerRunConfig) -> Iterator[str]:
    """An image tokenizer has neither decoder layers nor pathways nor tasks."""
    parallel = config.parallel
    knobs = {
        "parallel.compile": parallel.compile,
        "parallel.encode_ahead": parallel.encode_ahead,
        "parallel.check_calls": parallel.check_calls,
        "logging.task_gradients_every": config.logging.task_gradients_every,
    }
    for knob, value in knobs.items():
        if value:
            yield f"{knob} {value} is for a Janus, not for an image tokenizer; leave it out"
