"""Counts what a rank's collectives carry, below everything that could call them.

A dispatch mode sees the c10d operators themselves, so a library that bound `all_reduce` at import time, a C++ caller
and autograd's backward are all counted. Groups of one rank move nothing and are left out. Bytes are those of the
tensor that a rank puts in (for an all-gather its own part, for a reduce-scatter the whole input).
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from janus_mega.parallel.groups import ProcessGroups

_OPERATORS = {
    "allreduce_": ("all_reduce", 0),
    "_allgather_base_": ("all_gather", 1),
    "allgather_": ("all_gather", 1),
    "allgather_into_tensor_coalesced_": ("all_gather", 1),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
    "broadcast_": ("broadcast", 0),
    "reduce_": ("reduce", 0),
    "send": ("send", 0),
    "recv_": ("recv", 0),
    "barrier": ("barrier", 0),
}
"""Operator -> kind, and which argument a rank puts in."""


class CountedTraffic(TorchDispatchMode):
    """While entered: calls and bytes by (group, kind)."""

    def __init__(self, groups: ProcessGroups) -> None:
        super().__init__()
        self.calls: Counter[tuple[str, str]] = Counter()
        self.bytes: Counter[tuple[str, str]] = Counter()
        axes = {"model": groups.model, "dp": groups.dp, "pp": groups.pp, "tp": groups.tp}
        self._by_name = {group.group_name: axis for axis, group in axes.items()}
        self._by_ranks = {tuple(dist.get_process_group_ranks(group)): axis for axis, group in axes.items()}
        self._world = dist.group.WORLD.group_name

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._count(func._schema.name.split("::")[1], args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        boxed = next(a for a in args if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type()))
        group = dist.ProcessGroup.unbox(boxed)
        if group.size() == 1:
            return
        kind, position = _OPERATORS[name]
        key = (self._axis(group, kind), kind)
        self.calls[key] += 1
        self.bytes[key] += sum(tensor.nbytes for tensor in _tensors(args[position]))

    def _axis(self, group: dist.ProcessGroup, kind: str) -> str:
        """megatron makes groups of its own over the same ranks; with two stages it sends one way over the world."""
        if kind in ("send", "recv"):
            return "pp"
        if group.group_name in self._by_name:
            return self._by_name[group.group_name]
        if group.group_name == self._world or kind == "all_reduce":
            return "world"
        return self._by_ranks[tuple(dist.get_process_group_ranks(group))]


def _tensors(argument: Any) -> Iterable[torch.Tensor]:
    if isinstance(argument, torch.Tensor):
        yield argument
    elif isinstance(argument, list | tuple):
        for item in argument:
            yield from _tensors(item)
