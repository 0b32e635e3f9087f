"""What the loop is given to train: a Janus or an image tokenizer, the loop does not know which.

A workload builds this rank's chunk, yields this dp rank's micro-batches, and says what in them counts. Everything a
run shares whatever it trains (optimizer, layout, saving) is in `Recipe`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from janus_mega.config.schema import (
    CheckpointConfig,
    HealthConfig,
    LoggingConfig,
    OptimizerConfig,
    OptimizerState,
    ParallelConfig,
    SamplesConfig,
)
from janus_mega.models.sharding import ShardedParameter
from janus_mega.parallel.groups import ProcessGroups
from janus_mega.train.order import DataOrder


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How a workload is trained."""

    name: str
    run_dir: Path
    seed: int = 0
    """Of random generators that a start cannot take over from a checkpoint."""
    num_steps: int
    """Steps the learning-rate schedule is made for."""
    last_step: int
    """Steps after which the run ends."""
    global_batch_size: int
    """Rows (or pictures) per step over all dp ranks."""
    init_from: str
    """Checkpoint whose weights start the run, or empty."""
    optimizer_state: OptimizerState = OptimizerState.fresh
    """What becomes of the optimizer state in it."""
    parallel: ParallelConfig
    optimizer: OptimizerConfig
    logging: LoggingConfig
    checkpoint: CheckpointConfig
    validate_every: int = 0
    """Steps between validations, 0 never."""
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    health: HealthConfig = field(default_factory=HealthConfig)


@dataclass(frozen=True, slots=True)
class BuiltModel:
    """A workload's chunks on the meta device."""

    chunks: Sequence[nn.Module]
    """One, or several under the interleaved schedule."""
    modules: Mapping[str, str]
    """Name of each trainable-or-frozen module -> attribute of a chunk."""
    trainable: Sequence[str]
    """Names of the modules that train, on any rank."""
    prepare: Callable[[Sequence[Any]], Sequence[Any]] = list
    """What is done to the placed micro-batches of a step before the first forward pass."""


class Workload(Protocol):
    """One thing the loop can train."""

    task_names: tuple[str, ...]
    """Losses that are kept apart."""
    task_weights: Mapping[str, float]
    """Weight of each in the sum."""
    seq_len: int
    """Rows' length (1 where rows are not sequences)."""
    config_text: str
    """The resolved configuration as YAML."""

    @property
    def order(self) -> DataOrder:
        """Which batch comes when."""

    def build(self, groups: ProcessGroups) -> BuiltModel:
        """This rank's chunks, frozen as configured."""

    def initialize(self, shards: Iterable[ShardedParameter]) -> None:
        """Fills materialised parameters with fresh values."""

    def batches(self, dp_rank: int, dp_size: int, first_step: int, last_step: int) -> Iterator[list[Any]]:
        """This dp rank's micro-batches, step after step; the global batch of a step never depends on dp_size."""

    def place(self, batch: Any, groups: ProcessGroups) -> Any:
        """A micro-batch on the rank's device, as the chunk's forward takes it."""

    def count_labels(self, batch: Any) -> Tensor:
        """int64 [tasks]: what each task's loss is a sum over."""

    def denominators(self, global_counts: Tensor) -> Tensor:
        """fp64 [tasks]: what each task's sum is divided by."""

    def measure(self, batch: Any) -> dict[str, int]:
        """Amounts in a micro-batch that metrics report (tokens, images, ...); always the same keys."""

    def flops(self, amounts: Mapping[str, int], label_counts: Mapping[str, int]) -> dict[str, float]:
        """FLOPs of some steps under each convention, by the name of the utilisation; empty where nobody counted.

        Args:
            amounts: sums of `measure`.
            label_counts: labels by task.
        """

    def validation_sets(self, dp_rank: int, dp_size: int) -> Mapping[str, Callable[[], list[Any]]]:
        """Reads this dp rank's micro-batches of each validation set, by name; the same whenever it is called."""

    def extra_files(self) -> dict[str, bytes | Path]:
        """Files that a checkpoint must carry besides tensors."""
