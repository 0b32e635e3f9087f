"""How often the understanding encoder runs in a step, on how many images, and where: ahead of the schedule or in it."""

from typing import Any

from torch import Tensor, nn

from janus_mega.config.schema import ParallelConfig
from janus_mega.models.janus import JanusChunk
from janus_mega.parallel.layout import make_layout
from tests.support.tiny import STAGE3, TinyWorkload

StepCalls = list[list[int]]
"""[images of each call ahead of the schedule, images of each call in a chunk's forward pass]"""


class EncoderCalls:
    """Watches a rank's first chunk; `steps` holds what each step called."""

    def __init__(self, chunk: JanusChunk) -> None:
        self.steps: list[StepCalls] = []
        self._is_in_chunk = False
        if chunk.place.is_first:
            chunk.register_forward_pre_hook(lambda *_: self._pass(True))
            chunk.register_forward_hook(lambda *_: self._pass(False))
            chunk.understanding_encoder.register_forward_pre_hook(self._note)

    def begin_step(self) -> None:
        self.steps.append([[], []])

    def _pass(self, is_in_chunk: bool) -> None:
        self._is_in_chunk = is_in_chunk

    def _note(self, encoder: nn.Module, arguments: tuple[Any, ...]) -> None:
        images: Tensor = arguments[0]
        self.steps[-1][self._is_in_chunk].append(images.shape[0])


def expected_calls(parallel: ParallelConfig, world_size: int, rank: int, num_steps: int) -> list[StepCalls]:
    """What the options of a layout promise of a rank, for the rows of `tiny`."""
    layout = make_layout(world_size, rank, parallel.tp_size, parallel.pp_size)
    if layout.pp_rank:
        return [[[], []]] * num_steps
    dealt_to = parallel.tp_size if parallel.split_encoder else 1
    steps = []
    for batches in TinyWorkload(STAGE3, parallel).batches(layout.dp_rank, layout.dp_size, 0, num_steps):
        images = [batch["pixel_values"].shape[0] for batch in batches]
        if parallel.encode_ahead:
            share = -(-sum(images) // dealt_to)
            full, rest = divmod(share, parallel.encode_ahead)
            steps.append([[parallel.encode_ahead] * full + [rest] * (rest > 0), []])
        else:  # a micro-batch without images has a dummy
            steps.append([[], [-(-max(count, 1) // dealt_to) for count in images]])
    return steps
