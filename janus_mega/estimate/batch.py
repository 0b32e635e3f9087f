"""What a micro-batch holds, as far as cost depends on it: positions, labels per task, images.

An estimate takes the mean micro-batch of the configured mixture; a test passes the very micro-batches of a step.
"""

from dataclasses import dataclass

from janus_mega.config import derive
from janus_mega.config.schema import RunConfig

TEXT_SHARE = 0.2
"""Of the positions that the text head scores, those in documents with an image to understand."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Counts of one micro-batch of one dp rank."""

    tokens: int
    """Positions, padding included."""
    labels: tuple[int, int, int]
    """Scored positions by task: text, understanding, generation."""
    images: int
    """Images to understand."""
    drawn: int
    """Embedded ids of drawn images."""


def mean_micro_batch(config: RunConfig) -> MicroBatch:
    """The mean micro-batch at the shares that pipelines are split by (`derive`), without absent tasks."""
    tokens = config.parallel.micro_batch_size * config.data.seq_len
    tasks = derive.task_shares(config) or {"text": 1.0}
    is_understood, is_drawn = "understanding" in tasks, "generation" in tasks
    written = round(tokens * derive.WRITTEN_SHARE)
    understood = round(TEXT_SHARE * written) if is_understood else 0
    drawn = round(tokens * derive.DRAWN_SHARE) if is_drawn else 0
    patches = derive.understanding_tokens(config.model.understanding)
    images = max(1, round(tokens * derive.UNDERSTOOD_SHARE / patches)) if is_understood else 0
    return MicroBatch(tokens, (written - understood, understood, drawn), images, drawn)


def num_micro_batches(config: RunConfig, num_gpus: int) -> int:
    """Micro-batches of a step on one dp rank."""
    dp_size = derive.dp_size(config.parallel, num_gpus)
    return derive.num_micro_batches(config.stage.global_batch_size, config.parallel.micro_batch_size, dp_size)
