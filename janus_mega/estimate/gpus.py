"""GPUs by name: memory, peak and links, from their data sheets.

Link speeds are what one GPU can send, at `LINK_SHARE` of the sheet; ranks 0..7 share a node.
"""

from dataclasses import dataclass

from data_pipeline.errors import UserError

GPUS_PER_NODE = 8
LINK_SHARE = 0.8
"""Of the sheet's link speed that large collectives reach: an assumption, not measured here."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One kind of GPU."""

    memory_bytes: float
    peak_bf16: float
    """Dense bf16 FLOP/s; fp32 runs are counted with half of it (tf32)."""
    node_bytes_per_s: float
    """To GPUs of the same node, one direction."""
    fabric_bytes_per_s: float
    """To other nodes, one direction."""


GPUS = {
    "a100-40": Gpu(40e9, 312e12, 300e9, 25e9),
    "a100-80": Gpu(80e9, 312e12, 300e9, 25e9),
    "h100-80": Gpu(80e9, 989e12, 450e9, 50e9),
    "h200-141": Gpu(141e9, 989e12, 450e9, 50e9),
    "b200-180": Gpu(180e9, 2250e12, 900e9, 50e9),
}


def gpu_of(name: str) -> Gpu:
    """The GPU of a name.

    Raises:
        UserError: no such name.
    """
    if name not in GPUS:
        raise UserError(f"--gpu {name!r} is none of {', '.join(GPUS)}")
    return GPUS[name]
