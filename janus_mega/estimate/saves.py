"""What saves take: bytes of a checkpoint on disk, and host memory of the copy that is written beside training.

A checkpoint holds every weight once in fp32, and two moments (and the average, if one is kept) of those that train.
Each rank copies what it writes: its share over dp of what trains. Frozen weights are written by the first dp rank
alone, under ZeRO-3 by each its part; parameters that all tp ranks hold whole are written by the first. Told are the
rank and the node that copy most, each tp rank taken for a first one: an upper bound.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from janus_mega.config import derive
from janus_mega.config.schema import RunConfig
from janus_mega.estimate.gpus import GPUS_PER_NODE
from janus_mega.estimate.shape import RankShape
from janus_mega.estimate.traffic import FP32
from janus_mega.models.count import module_parameters

_GIB = 2**30


@dataclass(frozen=True, slots=True)
class Saves:
    """Bytes."""

    checkpoint: int
    """Tensors of one checkpoint, over all ranks."""
    disk: int
    """The newest ones that stay, and the one being written; without those that are kept for good."""
    staging: int
    """Host memory of the copy, on the rank that copies most; 0 where saves are waited for."""
    node_staging: int
    """The same on a node, at most."""


def save_sizes(config: RunConfig, num_gpus: int, shapes: Sequence[RankShape]) -> Saves:
    """What the saves of a run take; `shapes` are its pipeline ranks."""
    checkpoint = config.checkpoint
    kept = FP32 * (3 + (config.optimizer.ema_decay > 0))
    whole = module_parameters(config.model)
    trained = sum(whole[module] for module in config.stage.trainable)
    size = kept * trained + FP32 * (sum(whole.values()) - trained)
    disk = (checkpoint.keep_last + 1) * size
    if not checkpoint.asynchronous or not checkpoint.save_every:
        return Saves(size, disk, 0, 0)
    limit = int(checkpoint.staging_gib * _GIB) or size
    copies = [min(limit, copied) for copied in _copied(config, num_gpus, shapes, kept)]
    nodes = (sum(copies[first : first + GPUS_PER_NODE]) for first in range(0, num_gpus, GPUS_PER_NODE))
    return Saves(size, disk, max(copies), max(nodes))


def _copied(config: RunConfig, num_gpus: int, shapes: Sequence[RankShape], kept: int) -> list[int]:
    """Bytes of every rank, as of a first tp rank; `kept` per element that trains."""
    parallel, dp_size = config.parallel, derive.dp_size(config.parallel, num_gpus)
    found = []
    for rank in range(num_gpus):  # tp ranks are neighbours, then dp, then pp (parallel.layout)
        shape, is_first = shapes[rank // (parallel.tp_size * dp_size)], rank // parallel.tp_size % dp_size == 0
        frozen = FP32 * (shape.weights - shape.trained)
        own = frozen // dp_size if parallel.zero_stage == 3 else frozen * is_first
        found.append(kept * shape.trained // dp_size + own)
    return found
