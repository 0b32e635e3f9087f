"""What megatron-core needs to run without CUDA.

megatron-core names `torch.cuda` where it means "the device of this rank": as the device of pipeline buffers, as the
generator behind recomputation, and in three literals of the schedules. `use_cpu_platform` answers those calls with the
CPU. It is called when groups are built and no CUDA device exists, never on import, and it changes nothing on a machine
with CUDA. Whoever meets a new `torch.cuda` call in megatron adds it here, with the reason.
"""

import os
import types
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from data_pipeline.errors import UserError

_CPU = torch.device("cpu")


class _TorchWithCpuLiterals(types.ModuleType):
    """`torch` as megatron's schedules see it: `device="cuda"` literals mean the CPU."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def zeros(self, *size: Any, device: Any = None, **options: Any) -> torch.Tensor:
        """`torch.zeros` on the CPU whatever device is named."""
        return torch.zeros(*size, device=_CPU, **options)


def device_of_rank(local_rank: int) -> torch.device:
    """The device a rank computes on: its CUDA device if there is one, else the CPU.

    Args:
        local_rank: number among the ranks of this machine. A rank that was given one device of its own sees it as the
            first, whatever its number.

    Raises:
        UserError: there are fewer devices here than ranks.
    """
    if not torch.cuda.is_available():
        return _CPU
    num_devices = torch.cuda.device_count()
    if local_rank < num_devices:
        return torch.device("cuda", local_rank)
    # torchrun says how many ranks it has started here, and all of them see the same devices.
    if num_devices > 1 or int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
        raise UserError(
            f"rank {local_rank} of this machine has no GPU of its own, {num_devices} are visible; start a rank per GPU"
        )
    return torch.device("cuda", 0)


def use_cpu_platform() -> None:
    """Lets megatron-core run on the CPU of this process; idempotent.

    Raises:
        RuntimeError: called although CUDA is available.
    """
    if torch.cuda.is_available():
        raise RuntimeError("use_cpu_platform was called on a machine with CUDA; it would hide the device")
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.tensor_parallel import random as megatron_random

    if isinstance(schedules.torch, _TorchWithCpuLiterals):
        return
    schedules.torch = _TorchWithCpuLiterals("torch")
    # Pipeline buffers, collectives' outputs and the vocabulary range ask for "the current device".
    torch.cuda.current_device = lambda: _CPU  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda *args, **kwargs: None  # type: ignore[assignment]
    torch.cuda.is_current_stream_capturing = lambda: False  # type: ignore[assignment]
    # Recomputation and the tensor-parallel generator save and restore "the" CUDA generator.
    torch.cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()  # type: ignore[assignment]
    torch.cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)  # type: ignore[assignment]
    torch.cuda.manual_seed = lambda seed: torch.manual_seed(seed)  # type: ignore[assignment]
    megatron_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    megatron_random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()


class CudaNamesMeanCpu(TorchFunctionMode):
    """While it is entered, `device="cuda"` is the CPU and CPU tensors call themselves `torch.cuda.*`.

    megatron's distributed optimizer spells both in many places. The mode costs a Python call per torch call, so it is
    entered for building and stepping the optimizer only, never for forward and backward.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Rewrites the device on the way in and the type's name on the way out."""
        kwargs = dict(kwargs or {})
        if "cuda" in str(kwargs.get("device")):
            kwargs["device"] = _CPU
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and isinstance(result, str):
            return result.replace("torch.", "torch.cuda.")
        return result
