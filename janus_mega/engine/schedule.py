"""megatron-core's pipeline schedules over one of our chunks.

The schedule must see a module with `config`, `model_type` and `set_input_tensor`, and never the DeepSpeed engine
itself: its `config` is a DeepSpeed dictionary that would shadow megatron's. `ScheduledChunk` is what it sees; calling
it goes through the engine, so ZeRO's forward hooks run.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from janus_mega.engine.interface import Chunk
from janus_mega.observe.pulse import Pulse


class ScheduledChunk(nn.Module):
    """The face a chunk shows to megatron's schedules."""

    def __init__(self, chunk: Chunk, forward: Callable[[Any], Tensor], chunk_no: int = 0) -> None:
        super().__init__()
        self.vp_stage = chunk_no
        self.config = chunk.config
        self.model_type = chunk.model_type
        # Not registered as submodules: the schedule must not find parameters or DeepSpeed's attributes through us.
        object.__setattr__(self, "_chunk", chunk)
        object.__setattr__(self, "_forward", forward)

    @property
    def chunk(self) -> nn.Module:
        """The chunk itself, without the engine around it."""
        return cast(nn.Module, object.__getattribute__(self, "_chunk"))

    def set_input_tensor(self, input_tensor: list[Tensor | None]) -> None:
        """Receives the previous pipeline rank's output."""
        self._chunk.set_input_tensor(input_tensor)

    def forward(self, micro_batch: Any) -> Tensor:
        """One micro-batch through the engine."""
        return self._forward(micro_batch)


def run_schedule(
    chunks: Sequence[ScheduledChunk],
    micro_batches: Sequence[Any],
    scales: Tensor,
    seq_len: int,
    micro_batch_size: int,
    *,
    forward_only: bool = False,
    pulse: Pulse | None = None,
) -> Tensor | None:
    """Forward and backward over the micro-batches of a step (1F1B with several pipeline ranks, or interleaved).

    Args:
        chunks: this rank's pieces of the pipeline.
        micro_batches: what their forward takes.
        scales: fp32 [tasks], factors on each micro-batch's loss sums; the schedule divides by their number.
        seq_len: rows' length; with micro_batch_size, the shape of what pipeline ranks send.
        pulse: is told of every forward pass.

    Returns:
        fp32 [tasks], this rank's loss sums over the step on the last pipeline rank, None elsewhere.
        Collective over: tp, pp.
    """

    def score(sums: Tensor) -> tuple[Tensor, Tensor]:
        return torch.dot(sums, scales), sums.detach()

    def forward_step(data: Iterator[Any], model: ScheduledChunk) -> tuple[Tensor, Callable[..., Any]]:
        if pulse is not None:
            pulse.micro_batch += 1
        return model(next(data)), score

    is_interleaved = len(chunks) > 1
    sums = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(micro_batches) for _ in chunks] if is_interleaved else iter(micro_batches),
        model=list(chunks) if is_interleaved else chunks[0],
        num_microbatches=len(micro_batches),
        seq_length=seq_len,
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
    )
    return torch.stack(sums).sum(0) if sums else None
