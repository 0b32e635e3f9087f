"""Do the tasks pull the shared backbone in different directions? Gradient norms per task, and one cosine.

Every few steps, the gradients of text, understanding and generation with respect to the backbone, each of its own mean
loss over one micro-batch of every dp rank, after the update. They come from `torch.autograd.grad` on the chunk itself:
nothing is accumulated, so neither `.grad` nor the engines' hooks on accumulation are touched, while the hooks that sum
replicated gradients over tp do run. The passes draw no random numbers. Megatron's recomputation refuses
`torch.autograd.grad`, so the chunk is in evaluation mode meanwhile, which switches it off (nothing else depends on the
mode: there is no dropout).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.schema import TaskId
from janus_mega.models.janus import JanusChunk
from janus_mega.observe.sinks import SinkGroup
from janus_mega.parallel.groups import ProcessGroups
from janus_mega.train.loop import StepEvent
from janus_mega.train.workload import Workload


class TaskGradientsHook:
    """Writes gradient/TASK and gradient/cosine_understanding_generation every few steps; tasks without labels are left
    out, and so is a cosine with one of them."""

    def __init__(
        self, workload: Workload, groups: ProcessGroups, sinks: SinkGroup, chunk: JanusChunk, every: int
    ) -> None:
        self._workload = workload
        self._groups = groups
        self._sinks = sinks
        self._chunk = chunk
        self._every = every

    def after_step(self, event: StepEvent) -> None:
        """Measures when due. Collective over: world (when due)."""
        if event.step % self._every == 0:
            self._sinks.scalars(event.step, task_gradients(self._chunk, self._workload, event.batches[0], self._groups))

    def at_end(self, step: int) -> None:
        """Nothing is left."""


def task_gradients(chunk: JanusChunk, workload: Workload, batch: Any, groups: ProcessGroups) -> dict[str, float]:
    """Norms and cosine of the backbone's gradients per task, over one micro-batch of each dp rank.

    Args:
        chunk: the whole model of this rank (no pipeline), with a backbone that trains.
        workload: places and counts.
        batch: this dp rank's micro-batch, as loaded.
        groups: over whose dp gradients are averaged, and over whose tp squares are summed.
        Collective over: tp, dp.
    """
    counts = workload.count_labels(batch).to(groups.device)
    dist.all_reduce(counts, group=groups.dp)
    parameters = [parameter for parameter in chunk.decoder.parameters() if parameter.requires_grad]
    was_training = chunk.training
    chunk.eval()
    try:
        with torch.enable_grad():
            placed = workload.place(batch, groups)
            chunk.set_input_tensor([None])
            losses = chunk.task_losses(chunk.hidden_states(placed), placed)
            gradients = [
                torch.autograd.grad(loss, parameters, retain_graph=loss is not losses[-1], allow_unused=True)
                for loss in losses
            ]
    finally:
        chunk.train(was_training)
    return _figures(_products(parameters, gradients, groups), counts.tolist())


def _products(
    parameters: Sequence[Tensor], gradients: Sequence[Sequence[Tensor | None]], groups: ProcessGroups
) -> Tensor:
    """fp64 [tasks, tasks] on the CPU: inner products of gradients that were summed over dp. Collective over: dp, tp."""
    products = torch.zeros(len(gradients), len(gradients), dtype=torch.float64, device=groups.device)
    for number, parameter in enumerate(parameters):
        summed = torch.zeros(len(gradients), parameter.numel(), device=groups.device)
        for task, of_task in enumerate(gradients):
            gradient = of_task[number]
            if gradient is not None:
                summed[task] = gradient.flatten()
        dist.all_reduce(summed, group=groups.dp)
        is_cut = getattr(parameter, "tensor_model_parallel", False)
        # What every tp rank holds counts once.
        products += (summed @ summed.T).double() / (1 if is_cut else groups.layout.tp_size)
    dist.all_reduce(products, group=groups.tp)
    return products.cpu()


def _figures(products: Tensor, counts: Sequence[int]) -> dict[str, float]:
    figures = {
        f"gradient/{task.name}": math.sqrt(float(products[task, task])) / counts[task]
        for task in TaskId
        if counts[task] > 0
    }
    first, second = TaskId.understanding, TaskId.generation
    size = math.sqrt(float(products[first, first] * products[second, second]))
    if counts[first] > 0 and counts[second] > 0 and size > 0:
        figures[f"gradient/cosine_{first.name}_{second.name}"] = float(products[first, second]) / size
    return figures
