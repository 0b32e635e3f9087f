"""Bytes that ranks tell each other: lengths first, then the bytes as numbers, over the host's group.

torch's own collectives for objects pickle; what comes from another process is never unpickled here.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from janus_mega.parallel.groups import ProcessGroups


def share_bytes(content: bytes, groups: ProcessGroups) -> bytes:
    """Rank 0's bytes on every rank; those of others are not looked at. Collective over: world."""
    if groups.layout.world_size == 1:
        return content
    size = torch.tensor(len(content))
    dist.broadcast(size, 0, group=groups.host)
    values = _as_numbers(content if groups.layout.rank == 0 else b"", int(size))
    if values.numel():
        dist.broadcast(values, 0, group=groups.host)
    return values.numpy().tobytes()


def gather_bytes(content: bytes, groups: ProcessGroups) -> list[bytes]:
    """What every rank gives, by rank, on every rank. Collective over: world."""
    if groups.layout.world_size == 1:
        return [content]
    lengths = _lengths(content, groups)
    own = _as_numbers(content, max(lengths))
    gathered = [torch.empty_like(own) for _ in lengths]
    dist.all_gather(gathered, own, group=groups.host)
    return _as_bytes(gathered, lengths)


def gather_bytes_on_rank_0(content: bytes, groups: ProcessGroups) -> list[bytes]:
    """What every rank gives, by rank, on rank 0; nothing on the others. Collective over: world."""
    if groups.layout.world_size == 1:
        return [content]
    lengths = _lengths(content, groups)
    own = _as_numbers(content, max(lengths))
    gathered = [torch.empty_like(own) for _ in lengths] if groups.layout.rank == 0 else None
    if own.numel():
        dist.gather(own, gathered, dst=0, group=groups.host)
    return _as_bytes(gathered, lengths) if gathered is not None else []


def _lengths(content: bytes, groups: ProcessGroups) -> list[int]:
    """Of every rank's bytes: parts of a collective have one size, so all must know the longest."""
    size = torch.tensor([len(content)])
    sizes = [torch.empty_like(size) for _ in range(groups.layout.world_size)]
    dist.all_gather(sizes, size, group=groups.host)
    return [int(length) for length in torch.cat(sizes).tolist()]


def _as_bytes(parts: list[Tensor], lengths: list[int]) -> list[bytes]:
    return [part[:length].numpy().tobytes() for part, length in zip(parts, lengths, strict=True)]


def _as_numbers(content: bytes, size: int) -> Tensor:
    values = torch.zeros(size, dtype=torch.uint8)
    if content:
        values[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return values
