"""What a line of metrics makes of amounts and seconds, which never leave the host."""

from collections.abc import Mapping

import torch
import torch.distributed as dist

from janus_mega.observe.memory import cuda_peak_bytes, host_peak_bytes
from janus_mega.observe.throughput import mfu, peak_flops, tokens_per_s
from janus_mega.parallel.groups import ProcessGroups

_GIB = 2**30


def reduce_amounts(amounts: Mapping[str, int], groups: ProcessGroups) -> tuple[dict[str, int], dict[str, float]]:
    """Amounts summed over dp, and peaks of memory over the world in GiB (by name); nothing leaves the host.

    Collective over: world.
    """
    names, layout = sorted(amounts), groups.layout
    peaks = {"memory/host_peak_gib": host_peak_bytes(), "memory/device_peak_gib": cuda_peak_bytes()}
    counts_here = layout.tp_rank == layout.pp_rank == 0  # others have the same rows
    sums = torch.tensor([amounts[name] * counts_here for name in names])
    largest = torch.tensor(list(peaks.values()))
    if layout.world_size > 1:
        dist.all_reduce(sums, group=groups.host)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=groups.host)
    in_gib = {name: peak / _GIB for name, peak in zip(peaks, largest.tolist(), strict=True) if peak}
    return dict(zip(names, sums.tolist(), strict=True)), in_gib


def token_rates(amounts: Mapping[str, int], seconds: float, devices: int) -> dict[str, float]:
    """Tokens per second of all devices and of one, and the share of positions that are padding, where counted."""
    values: dict[str, float] = {}
    if "tokens" in amounts:
        values["tokens_per_s"] = tokens_per_s(amounts["tokens"], seconds)
        values["tokens_per_s_per_device"] = values["tokens_per_s"] / devices
    if "padding" in amounts:
        values["padding_share"] = amounts["padding"] / ((amounts["tokens"] + amounts["padding"]) or 1)
    return values


def utilisation(flops: Mapping[str, float], seconds: float, devices: int, peak: float | None) -> dict[str, float]:
    """TFLOP/s of a device under each convention, and their share of its peak (FLOP/s) where that is known."""
    values = {f"tflops_per_device/{name}": mfu(count, seconds, devices, 1e12) for name, count in flops.items()}
    if peak:
        values |= {name: mfu(count, seconds, devices, peak) for name, count in flops.items()}
    return values


def device_peak(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s by the device's name, None where it is not known."""
    return peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
