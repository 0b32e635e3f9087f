"""Has every trainable module been called in this micro-batch, on every data-parallel rank?

Asked at the end of each forward pass, before its backward: afterwards the ranks already wait for each other in
reductions of different buckets, or have summed gradients that do not belong together. The ranks tell each other by one
small all-reduce over dp and all stop with the same message, naming modules and ranks. It costs a host synchronisation
per micro-batch, so it is switched on (`parallel.check_calls`) for checks and when a run hangs.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from janus_mega.parallel.groups import ProcessGroups


class MissingCallError(RuntimeError):
    """A trainable module was left out of a micro-batch; nothing of the step was applied."""


def check_calls(chunks: Sequence[nn.Module], modules: Mapping[str, str], groups: ProcessGroups) -> None:
    """Watches a rank's chunks from now on; training passes that leave a module out raise MissingCallError.

    Args:
        chunks: before an engine wraps them.
        modules: name of each trainable module -> attribute of the chunk that has it.
        groups: over whose dp the ranks tell each other, in every training forward pass.
    """
    for chunk in chunks:
        _ChunkWatch(chunk, {name: path for name, path in modules.items() if hasattr(chunk, path)}, groups)


class _ChunkWatch:
    """Counts calls within one forward pass of one chunk."""

    def __init__(self, chunk: nn.Module, modules: Mapping[str, str], groups: ProcessGroups) -> None:
        self._names = sorted(modules)
        self._groups = groups
        self._calls = dict.fromkeys(self._names, 0)
        self._micro_batch = 0
        for name in self._names:
            chunk.get_submodule(modules[name]).register_forward_hook(self._counter(name))
        chunk.register_forward_pre_hook(self._start)
        chunk.register_forward_hook(self._check)

    def _counter(self, name: str) -> Any:
        def count(*_: Any) -> None:
            self._calls[name] += 1

        return count

    def _start(self, *_: Any) -> None:
        self._calls = dict.fromkeys(self._names, 0)

    def _check(self, *_: Any) -> None:
        """Collective over: dp."""
        if not torch.is_grad_enabled() or not self._names:
            return
        layout, dp = self._groups.layout, self._groups.dp
        missing = torch.zeros(layout.dp_size, len(self._names), dtype=torch.int32, device=self._groups.device)
        missing[layout.dp_rank] = torch.tensor([self._calls[name] == 0 for name in self._names])
        dist.all_reduce(missing, group=dp)
        self._micro_batch += 1
        found = [
            f"{name} on rank {', '.join(str(dist.get_global_rank(dp, rank)) for rank in ranks)}"
            for name, ranks in zip(
                self._names, (column.nonzero().flatten().tolist() for column in missing.T), strict=True
            )
            if ranks
        ]
        if found:
            raise MissingCallError(
                f"trainable modules were not called in forward pass {self._micro_batch} of this chunk: "
                f"{'; '.join(found)}; data-parallel ranks would reduce different gradients: call them on a dummy item "
                "(models/pathways.py) or leave them out of stage.trainable"
            )
