"""How large activations are, layer by layer: what grows for thousands of steps before a loss goes up.

Forward hooks are registered for the one step that is looked at, so all others run as if nobody looked. A layer may run
twice where activations are recomputed: sums and counts then both double, and maxima stay. The largest logit of
attention, which fused kernels never write down, is bounded: a head's longest query times its longest key.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from janus_mega.engine.interface import StatefulEngine
from janus_mega.observe.sinks import SinkGroup
from janus_mega.parallel.groups import ProcessGroups
from janus_mega.train.loop import StepEvent

SQUARES, COUNT, LARGEST, LOGIT = range(4)


class MonitorHook:
    """Writes `monitor/layer_<n>/{rms,largest,attention_logit_bound}` every few steps."""

    def __init__(self, engine: StatefulEngine, groups: ProcessGroups, sinks: SinkGroup, every: int) -> None:
        self._layers = [
            (chunk.place.layers.start + number, layer)
            for chunk in engine.chunks
            if hasattr(chunk, "decoder")
            for number, layer in enumerate(chunk.decoder.layers)
        ]
        self._groups = groups
        self._sinks = sinks
        self._every = every
        count = torch.tensor(max((number for number, _ in self._layers), default=-1) + 1, device=groups.device)
        dist.all_reduce(count, op=dist.ReduceOp.MAX)
        self._found = torch.zeros(int(count), 4, dtype=torch.float64, device=groups.device)
        self._handles: list[Any] = []

    def after_step(self, event: StepEvent) -> None:
        """Looks at the next step, or tells what was seen in this one. Collective over: world (when due)."""
        if self._handles:
            self._tell(event.step)
        if self._every == 1 or event.step % self._every == self._every - 1:
            self._look()

    def at_end(self, step: int) -> None:
        """Looks away."""
        self._look_away()

    def _look(self) -> None:
        self._found.zero_()
        for number, layer in self._layers:
            self._handles.append(layer.register_forward_hook(self._note_output(number)))
            attention = layer.self_attention.core_attention
            self._handles.append(attention.register_forward_pre_hook(self._note_logits(number)))
        if not self._layers:
            self._handles.append(_Nothing())

    def _look_away(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _note_output(self, number: int) -> Any:
        @torch.no_grad()
        def note(layer: nn.Module, inputs: Any, output: Any) -> None:
            if not layer.training:
                return  # somebody else looks at the model between two steps
            stream: Tensor = (output[0] if isinstance(output, tuple) else output).detach()  # [s/tp, b, h]
            row = self._found[number]
            row[SQUARES] += stream.double().square().sum()
            row[COUNT] += stream.numel()
            row[LARGEST] = torch.maximum(row[LARGEST], stream.abs().max())

        return note

    def _note_logits(self, number: int) -> Any:
        @torch.no_grad()
        def note(attention: nn.Module, inputs: Any) -> None:
            if not attention.training:
                return
            query, key = inputs[0].detach().float(), inputs[1].detach().float()  # [s, b, heads, d]
            scale = getattr(attention, "scale", None) or 1.0 / math.sqrt(query.shape[-1])
            row = self._found[number]
            longest_query, longest_key = (x.norm(dim=-1).amax((0, 1)) for x in (query, key))  # per head
            longest_key = longest_key.repeat_interleave(len(longest_query) // len(longest_key))
            row[LOGIT] = torch.maximum(row[LOGIT], (longest_query * longest_key).max().double() * scale)

        return note

    def _tell(self, step: int) -> None:
        self._look_away()
        sums, largest = self._found[:, :LARGEST].contiguous(), self._found[:, LARGEST:].contiguous()
        dist.all_reduce(sums)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        values = {}
        for number, (squares, count, most, logit) in enumerate(torch.cat([sums, largest], dim=1).tolist()):
            values[f"monitor/layer_{number}/rms"] = math.sqrt(squares / count) if count else 0.0
            values[f"monitor/layer_{number}/largest"] = most
            values[f"monitor/layer_{number}/attention_logit_bound"] = logit
        self._sinks.scalars(step, values)


class _Nothing:
    """The handle of a rank that has no layer to look at."""

    def remove(self) -> None:
        """Nothing was registered."""
