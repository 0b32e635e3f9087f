"""Which parameters an optimizer gets, in which groups.

Groups are decided by configuration alone, so every rank builds the same list in the same order, also a pipeline rank
that holds none of a group's parameters: DeepSpeed reduces the norm once per group, and ranks with different lists wait
for each other forever. The engine fills empty groups.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from janus_mega.config.schema import OptimizerConfig


@dataclass(slots=True)
class ParamGroup:
    """Parameters that share a learning-rate scale and a weight decay."""

    name: str
    lr_scale: float
    weight_decay: float
    parameters: list[nn.Parameter] = field(default_factory=list)


def build_param_groups(
    chunks: Sequence[nn.Module], attributes: Mapping[str, str], trainable: Collection[str], optimizer: OptimizerConfig
) -> list[ParamGroup]:
    """The trainable parameters of this rank, grouped by learning-rate scale and decay (matrices yes, vectors no).

    Args:
        chunks: this rank's modules; parameters that need no gradient are left out.
        attributes: name of each module (as `lr_scales` spells it) -> attribute of a chunk.
        trainable: names of the modules that train in this stage, on any rank.
    """
    scales = sorted({optimizer.lr_scales.get(name, 1.0) for name in trainable})
    groups = {
        (scale, decays): ParamGroup(
            name=f"lr_scale_{scale:g}_{'decay' if decays else 'no_decay'}",
            lr_scale=scale,
            weight_decay=optimizer.weight_decay if decays else 0.0,
        )
        for scale in scales
        for decays in (True, False)
    }
    for name in sorted(trainable):
        scale = optimizer.lr_scales.get(name, 1.0)
        for chunk in chunks:
            for parameter in getattr(chunk, attributes[name], nn.Module()).parameters():
                if parameter.requires_grad:
                    groups[scale, parameter.ndim > 1].parameters.append(parameter)
    return list(groups.values())
