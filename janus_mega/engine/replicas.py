"""What ranks hold in copy, compared by digests, to find the rank whose memory or transfers changed a value in silence.

Between an update and the next, nothing may change weights. ZeRO overwrites all copies of what trains after every
update, so copies are compared right before an update, when they have served a whole step; a look after it would see
fresh copies only. They are compared with what the owners of the fp32 weights expect: each adds up the digest of its
own range, rounded as the copies are, so the odd one is known even among two. By kind of parameter:

* trained, whole on every dp rank (ZeRO-1 and 2, megatron, small ones under ZeRO-3): each copy against the owners' sum;
* trained, in parts (ZeRO-3): each part against the fp32 weights on the same rank;
* fp32 under megatron, whose weights are their own masters: each copy against digests taken after the update before;
* frozen: each copy against its digest at the last check, or against the others at the first;
* held by every tp rank: also over tp, where owners on different ranks may have drifted apart.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from janus_mega.engine.digests import digest
from janus_mega.engine.interface import StatefulEngine
from janus_mega.models.sharding import ShardedParameter

STRAY_COPY = "its copy is not what the owners of the fp32 weights expect"
STRAY_PART = "its part is not its fp32 weights, rounded"
STRAY_MASTER = "its fp32 weights are not what all copies hold"
CHANGED = "it is frozen and has changed"
MINORITY = "its copy is not that of most ranks"
UNDECIDED = "copies differ, and nothing tells which is right"


@dataclass(frozen=True, slots=True)
class Odd:
    """A parameter that this rank holds otherwise than it should."""

    parameter: str
    why: str


class Replicas:
    """The digests of one engine; every rank must make and call it alike."""

    def __init__(self, engine: StatefulEngine, shards: Sequence[ShardedParameter]) -> None:
        self.engine = engine
        self._shards = shards
        self._groups = engine.groups
        self._published: dict[int, Tensor] = {}
        """Of weights that are their own masters: digests of the ranges this rank owns, after the last update."""
        self._frozen: dict[tuple[int, bool], Tensor] = {}
        """Digests of frozen parameters, whole or a part, at the last check that found no difference."""
        self._over_tp = [number for number, shard in enumerate(shards) if self._is_alike_over_tp(shard)]
        self._held = self._expected = torch.empty(0, dtype=torch.int64)

    @torch.no_grad()
    def note_published(self) -> None:
        """To be called whenever weights have changed; reads what cannot be told apart later, if there is such."""
        for number, shard in enumerate(self._shards):
            fragment = self.engine.fragment(shard.parameter) if shard.parameter.requires_grad else None
            if fragment is not None and _shares_memory(fragment[0], shard.parameter):
                self._published[number] = digest(*fragment)

    @torch.no_grad()
    def differ(self) -> bool:
        """Whether any rank holds something otherwise than it should; equal on all ranks. Collective over: world."""
        groups, numbers = self._groups, range(len(self._shards))
        self._held = self._vector([self._held_digest(number) for number in numbers])
        self._expected = self._vector([self._told_digest(number) for number in numbers])
        dist.all_reduce(self._expected, group=groups.dp)
        for number in numbers:
            if (known := self._known_digest(number)) is not None:
                self._expected[number] = known
        is_odd = (self._held != self._expected).any()
        if groups.layout.tp_size > 1:
            first = self._held[self._over_tp] * int(groups.layout.tp_rank == 0)
            dist.all_reduce(first, group=groups.tp)
            is_odd |= (self._held[self._over_tp] != first).any()
        flag = is_odd.long()
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        is_odd_anywhere = bool(flag.item())
        if not is_odd_anywhere:
            frozen = [number for number in numbers if not self._shards[number].parameter.requires_grad]
            self._frozen |= {(number, self._is_part(number)): self._held[number] for number in frozen}
        return is_odd_anywhere

    @torch.no_grad()
    def find_odd(self) -> list[Odd]:
        """What this rank holds otherwise than it should, after `differ` said so. Collective over: dp, tp."""
        layout, numbers = self._groups.layout, range(len(self._shards))
        strays = self._vector([self._master_strays(number) for number in numbers])
        told = torch.stack([self._held, (self._held != self._expected).long(), strays])
        over_dp = _gathered(told, self._groups.dp)  # [dp, 3, parameters]
        why = [self._judge(number, over_dp[:, :, number], layout.dp_rank) for number in numbers]
        if layout.tp_size > 1:
            is_named = self._vector([torch.tensor(int(bool(reason)), device=told.device) for reason in why])
            over_tp = _gathered(torch.stack([self._held, is_named])[:, self._over_tp], self._groups.tp)
            for place, number in enumerate(self._over_tp):
                held, named = over_tp[:, :, place].unbind(1)
                if not named.any():
                    why[number] = _by_majority(held.tolist(), layout.tp_rank)
        return [Odd(shard.name, reason) for shard, reason in zip(self._shards, why, strict=True) if reason]

    def held(self, number: int) -> tuple[Tensor, int]:
        """What this rank holds of a parameter at this moment: (flat view, its start in the flattened parameter)."""
        parameter: Any = self._shards[number].parameter
        if not self._is_part(number):
            return parameter.detach().view(-1), 0
        fragment = self.engine.fragment(parameter)
        if fragment is None:
            return parameter.detach().view(-1)[:0], 0
        return parameter.ds_tensor.detach().view(-1)[: fragment[0].numel()], fragment[1]

    def _is_part(self, number: int) -> bool:
        """Whether ranks hold parts of it at this moment (ZeRO-3; small parameters are whole once they were used)."""
        parameter: Any = self._shards[number].parameter
        return hasattr(parameter, "ds_id") and not (parameter.ds_persist and parameter.numel() == parameter.ds_numel)

    def _is_alike_over_tp(self, shard: ShardedParameter) -> bool:
        """Whether tp ranks hold it bit for bit alike: gradients that each works out for itself may differ on a GPU."""
        is_exact = self._groups.device.type == "cpu" or torch.are_deterministic_algorithms_enabled()
        return not shard.is_cut and (is_exact or not shard.parameter.requires_grad)

    def _held_digest(self, number: int) -> Tensor:
        return digest(*self.held(number))

    def _told_digest(self, number: int) -> Tensor:
        """What this rank adds to the digest that is expected of whole copies."""
        if number in self._published:
            return self._published[number]
        parameter = self._shards[number].parameter
        fragment = self.engine.fragment(parameter)
        if fragment is not None:
            return digest(fragment[0].to(parameter.dtype), fragment[1])
        is_first_of_frozen = not parameter.requires_grad and self._groups.layout.dp_rank == 0
        return self._held_digest(number) if is_first_of_frozen else self._zero()

    def _known_digest(self, number: int) -> Tensor | None:
        """What this rank expects of its own copy without asking others."""
        if not self._shards[number].parameter.requires_grad:
            return self._frozen.get((number, self._is_part(number)), self._part_digest(number))
        return self._part_digest(number)

    def _part_digest(self, number: int) -> Tensor | None:
        return self._told_digest(number) if self._is_part(number) else None

    def _master_strays(self, number: int) -> Tensor:
        """1 where this rank's copy of the range it owns is not its own fp32 weights, rounded."""
        parameter = self._shards[number].parameter
        fragment = self.engine.fragment(parameter)
        if fragment is None or self._is_part(number):
            return self._zero()
        flat, start = fragment
        own = digest(parameter.detach().reshape(-1)[start : start + flat.numel()], start)
        return (own != self._told_digest(number)).long()

    def _judge(self, number: int, over_dp: Tensor, rank: int) -> str:
        """Why this rank is odd about a parameter, from [dp, 3]: held digest, whether unexpected, whether master strays;
        empty if it is not."""
        held, is_off, strays = over_dp.unbind(1)
        if not self._shards[number].parameter.requires_grad:
            if (number, self._is_part(number)) in self._frozen:
                return CHANGED if is_off[rank] else ""
            if self.engine.fragment(self._shards[number].parameter) is None:
                return _by_majority(held.tolist(), rank)
        if self._is_part(number):
            return STRAY_PART if is_off[rank] else ""
        if len(held) > 1 and is_off.all() and strays.any() and (held == held[0]).all():
            return STRAY_MASTER if strays[rank] else ""
        return STRAY_COPY if is_off[rank] else ""

    def _zero(self) -> Tensor:
        return torch.zeros((), dtype=torch.int64, device=self._groups.device)

    def _vector(self, digests: Sequence[Tensor]) -> Tensor:
        return torch.stack([self._zero(), *digests])[1:]  # also of nothing


def _by_majority(held: Sequence[int], rank: int) -> str:
    """Why a rank is odd among copies of which none is known to be right, or empty."""
    most_common, count = Counter(held).most_common(1)[0]
    if count == len(held):
        return ""
    if 2 * count > len(held):
        return "" if held[rank] == most_common else MINORITY
    return UNDECIDED


def _gathered(mine: Tensor, group: dist.ProcessGroup) -> Tensor:
    """One entry per rank of a group, on the CPU."""
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, mine.contiguous(), group=group)
    return torch.stack(found).cpu()


def _shares_memory(flat: Tensor, parameter: Tensor) -> bool:
    return flat.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
