"""What training asks of an engine, and what it gets back."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from janus_mega.parallel.groups import ProcessGroups

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state per element."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """One optimizer step, equal on every rank."""

    loss: float
    """The number that was differentiated, over the global batch."""
    task_losses: dict[str, float]
    """Mean cross entropy (or other loss) of each task's labels; tasks without labels are left out."""
    label_counts: dict[str, int]
    """Labels of each task in the global batch."""
    grad_norm: float
    """Global gradient norm before clipping."""
    lr: float
    """Learning rate of the update, before group scales."""
    seconds: dict[str, float]
    """Wall time by phase: forward_backward (up to the summed losses), reduce (until the host knows the global norm),
    update (clipping, AdamW, weights to where they are used)."""
    skipped: str = ""
    """Why the update was not made; empty if it was. Losses and norm may then be no numbers."""


class Chunk(Protocol):
    """A pipeline rank's model: an nn.Module whose forward gives hidden states, or loss sums per task on the last."""

    config: Any
    model_type: Any

    def set_input_tensor(self, input_tensor: list[Tensor | None]) -> None:
        """Receives the previous pipeline rank's output."""


ScaleLosses = Callable[[Tensor], Tensor]
"""int64 [tasks] label counts of the global batch -> fp32 [tasks] factors on each micro-batch's loss sums."""


JudgeStep = Callable[[Mapping[str, float]], str]
"""loss, loss/TASK and grad_norm of a step, equal on all ranks, asked once before every update -> why not to make it, or
empty. A norm that is no number must be refused."""


def stop_unless_finite(values: Mapping[str, float]) -> str:
    """The judge of engines that were given none.

    Raises:
        FloatingPointError: a loss or the gradient norm is no finite number; the step was not applied.
    """
    bad = [f"{name} {value}" for name, value in values.items() if not math.isfinite(value)]
    if bad:
        raise FloatingPointError(f"{', '.join(bad)}: the step was not applied")
    return ""


class Engine(Protocol):
    """Trains one chunk: forward and backward over micro-batches, reduction, update."""

    def train_step(self, micro_batches: Sequence[Any], label_counts: Tensor, lr: float) -> StepResult:
        """One optimizer step. Collective over: world."""

    def score(self, micro_batches: Sequence[Any], label_counts: Tensor) -> tuple[Tensor, Tensor]:
        """Loss sums and label counts per task over all dp ranks, nothing changed. Collective over: world."""


class StatefulEngine(Engine, Protocol):
    """An engine whose optimizer state can be told and filled, see `state`."""

    groups: ProcessGroups
    before_update: Callable[[bool], None] | None
    """Called in every step once it is judged, with whether its update is refused; weights are still those that the step
    was computed with. May be collective, if it is so on every rank; what it raises ends the step without an update."""

    @property
    def chunks(self) -> Sequence[nn.Module]:
        """This rank's pieces of the pipeline."""

    def fragment(self, parameter: nn.Parameter, moment: str | None = None) -> tuple[Tensor, int] | None:
        """What this rank optimizes of a parameter: (flat view, its start in the flattened parameter).

        Args:
            parameter: one of the chunk's.
            moment: one of MOMENTS; None for the fp32 weights.
        """

    def create_moments(self, step: int) -> None:
        """Makes the optimizer look as after `step` updates, with moments of zero."""

    def publish_weights(self) -> None:
        """Makes the parameters follow the fp32 weights after these were filled. Collective over: dp."""
