"""Stand-ins for parameter groups that are empty on a rank.

In stage I the decoder is frozen, so a pipeline rank in the middle has nothing to train; with learning rates per module
a rank may lack one group. DeepSpeed refuses an empty optimizer and waits forever if ranks bring different groups, so an
empty group gets one scalar that takes part in the graph with weight zero: it never moves and adds nothing to the norm.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from janus_mega.optim.param_groups import ParamGroup


class AnchoredChunks(nn.Module):
    """A rank's chunks plus the anchors of its empty groups; the module the engine wraps."""

    def __init__(
        self, chunks: Sequence[nn.Module], groups: Sequence[ParamGroup], device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.chunks = nn.ModuleList(chunks)
        self.anchors = nn.ParameterList()
        for group in groups:
            if not group.parameters:
                anchor = nn.Parameter(torch.zeros(1, device=device, dtype=dtype))
                self.anchors.append(anchor)
                group.parameters.append(anchor)

    def forward(self, micro_batch: Any, chunk_no: int = 0) -> Tensor:
        """The output of one chunk, with the anchors in its graph."""
        output = self.chunks[chunk_no](micro_batch)
        for anchor in self.anchors:
            output = output + 0.0 * anchor.to(output.dtype)
        return output
