"""Gradients of parameters that every tensor-parallel rank holds but only partly sees.

A parameter that is replicated over tp needs its gradient summed over tp when the ranks feed it different pieces of the
work. One table says which: norms see a slice of the sequence under sequence parallelism; per-head norms of queries and
keys see a slice of the heads whenever tp_size > 1. The sum runs in a tensor hook, before the data-parallel reduction
that ZeRO starts inside backward, so it is right for every ZeRO stage; a pass after the schedule would be too late for
ZeRO-2 and 3. Adaptors and the image head's first layer are computed in full on every tp rank from full inputs, so their
gradients are already whole and equal; so are the encoder's, unless its images are dealt over tp.
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
import torch.distributed as dist
from torch import nn

from janus_mega.config.schema import ParallelConfig
from janus_mega.parallel.groups import ProcessGroups


@dataclass(frozen=True, slots=True)
class ReplicatedRule:
    """Parameters whose gradient is partial on each tp rank."""

    pattern: str
    """fnmatch pattern over parameter names."""
    only_with: str = ""
    """The switch of `ParallelConfig` without which the gradient is whole; empty: it is partial whenever tp_size > 1."""


REPLICATED_RULES = (
    ReplicatedRule("*input_layernorm.weight", only_with="sequence_parallel"),
    ReplicatedRule("*pre_mlp_layernorm.weight", only_with="sequence_parallel"),
    ReplicatedRule("*final_layernorm.weight", only_with="sequence_parallel"),
    ReplicatedRule("*q_layernorm.weight"),
    ReplicatedRule("*k_layernorm.weight"),
    ReplicatedRule("understanding_encoder.*", only_with="split_encoder"),
)


def sum_replicated_gradients(model: nn.Module, groups: ProcessGroups, parallel: ParallelConfig) -> list[str]:
    """Registers the hooks that sum partial gradients of replicated parameters; returns the names it covered.

    The hooks run in backward, once per micro-batch. Collective over: tp.
    """
    if groups.layout.tp_size == 1:
        return []
    covered = []
    for name, parameter in model.named_parameters():
        rule = next((rule for rule in REPLICATED_RULES if fnmatchcase(name, rule.pattern)), None)
        if rule is None or not parameter.requires_grad or (rule.only_with and not getattr(parallel, rule.only_with)):
            continue
        parameter.register_hook(lambda gradient: _all_reduced_sum(gradient, groups.tp))
        covered.append(name)
    return covered


def _all_reduced_sum(gradient: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    gradient = gradient.contiguous()
    dist.all_reduce(gradient, group=group)
    return gradient
