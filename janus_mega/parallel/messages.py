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
    size = torch.tensor([len(content)])
    sizes = [torch.empty_like(size) for _ in range(groups.layout.world_size)]
    dist.all_gather(sizes, size, group=groups.host)
    lengths = torch.cat(sizes).tolist()
    own = _as_numbers(content, max(lengths))
    gathered = [torch.empty_like(own) for _ in lengths]
    dist.all_gather(gathered, own, group=groups.host)
    return [part[:length].numpy().tobytes() for part, length in zip(gathered, lengths, strict=True)]


def _as_numbers(content: bytes, size: int) -> Tensor:
    values = torch.zeros(size, dtype=torch.uint8)
    if content:
        values[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return values
