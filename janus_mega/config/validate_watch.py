"""Rules of what watches a run: how often, validation sets, samples, the profiler's window."""

from collections.abc import Callable, Iterator

from data_pipeline.spec import Task
from janus_mega.config.schema import LoggingConfig, RunConfig, SamplesConfig

BatchRule = Callable[[str, int], Iterator[str]]
"""(knob, rows) -> complaints if the rows do not split over the layout."""


def logging_rules(logging: LoggingConfig, last_step: int) -> Iterator[str]:
    """Intervals and the profiler's window."""
    if logging.log_every < 1:
        yield f"logging.log_every {logging.log_every} must be at least 1"
    for name in ("monitor_every", "gc_every"):
        if getattr(logging, name) < 0:
            yield f"logging.{name} {getattr(logging, name)} must be 0 (never) or more"
    if logging.peak_flops < 0:
        yield f"logging.peak_flops {logging.peak_flops:g} must be 0 (by the device's name) or more"
    window = logging.profile_steps
    if window and not (len(window) == 2 and 1 <= window[0] <= window[1] <= last_step):
        yield (
            f"logging.profile_steps {list(window)} must be the first and the last step to record, within 1 ... "
            f"{last_step}; give two steps, for example [{min(10, last_step)}, {min(12, last_step)}], or []"
        )


def monitor_rules(config: RunConfig) -> Iterator[str]:
    """Monitors need layers that still ask for their hooks."""
    if config.logging.monitor_every > 0 and config.parallel.compile:
        yield (
            f"logging.monitor_every {config.logging.monitor_every} with parallel.compile: a compiled layer sees no "
            "hooks that come and go; set logging.monitor_every to 0 or parallel.compile to false"
        )


def validation_rules(config: RunConfig, batch_rule: BatchRule) -> Iterator[str]:
    """Validation sets name sources that there are, and split over the layout like a batch."""
    validation = config.validation
    if validation.every < 0:
        yield f"validation.every {validation.every} must be 0 (never) or more"
    if validation.every > 0 and not validation.sets:
        yield "validation.every is set but validation.sets is empty; add validation.sets.NAME.num_rows=... or set it 0"
    for name, entry in validation.sets.items():
        unknown = [source for source in entry.sources if source not in config.data.sources]
        if unknown:
            yield (
                f"validation.sets.{name}.sources names {', '.join(unknown)}, data.sources has "
                f"{', '.join(config.data.sources)}; add what is missing there with weight 0 to hold it out"
            )
        yield from batch_rule(f"validation.sets.{name}.num_rows", entry.num_rows)


def samples_rules(config: RunConfig) -> Iterator[str]:
    """Samples have something to show and the tokenizer to draw with."""
    samples: SamplesConfig = config.samples
    if samples.every < 0:
        yield f"samples.every {samples.every} must be 0 (never) or more"
    if samples.max_new_tokens < 1:
        yield f"samples.max_new_tokens {samples.max_new_tokens} must be at least 1"
    if samples.every <= 0:
        return
    if not samples.captions and not samples.questions:
        yield "samples.every is set but there is nothing to show; give samples.captions or samples.questions"
    if not config.data.image_tokenizer:
        drawn = [name for name, source in config.data.sources.items() if source.task is Task.generation]
        yield (
            "samples.every needs data.image_tokenizer, with which drawings become pictures"
            f"{f' (of source {drawn[0]})' if drawn else ''}; name its directory or set samples.every to 0"
        )
    if config.model.backbone.qk_norm:
        yield (
            "samples.every with model.backbone.qk_norm: samples run on the Hugging Face classes, which lack it; "
            "set samples.every to 0"
        )
