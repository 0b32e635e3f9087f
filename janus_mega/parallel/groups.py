"""The process groups of a job: built once, handed on as an argument.

megatron-core keeps its groups in module state, so this file is also the only writer of that state. Collective calls
elsewhere name the axis they run over through a field of `ProcessGroups`.
"""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import random as megatron_random

from janus_mega.parallel.layout import Layout, make_layout
from janus_mega.parallel.platform import device_of_rank, use_cpu_platform

DISK_TIMEOUT_S = 3600.0
"""How long ranks wait for the slowest of them to write or to verify files before they give up."""


@dataclass(frozen=True, slots=True)
class ProcessGroups:
    """One group per axis of this rank, and the device it computes on."""

    layout: Layout
    device: torch.device
    tp: dist.ProcessGroup
    pp: dist.ProcessGroup
    dp: dist.ProcessGroup
    model: dist.ProcessGroup
    """tp x pp: all ranks that together hold one copy of the model."""
    saving: dist.ProcessGroup
    """All ranks over gloo, for the thread that writes checkpoints and nobody else."""
    host: dist.ProcessGroup
    """All ranks over gloo, for numbers that live on the host: nobody waits for a device."""


def init_distributed(timeout_s: float = 600.0, init_method: str = "env://") -> None:
    """Joins the job that torchrun or srun started (one rank alone if neither did). Collective over: world."""
    if dist.is_initialized():
        return
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    os.environ.setdefault("LOCAL_RANK", str(rank))  # DeepSpeed asks for it even where a rank is alone
    has_cuda = torch.cuda.is_available()
    if has_cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    store = dist.HashStore() if world_size == 1 and "MASTER_ADDR" not in os.environ else None
    dist.init_process_group(
        "nccl" if has_cuda else "gloo",
        init_method=None if store else init_method,
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )


def build_groups(tp_size: int, pp_size: int, seed: int = 0, virtual_pp_size: int = 1) -> ProcessGroups:
    """Cuts the joined job into tp x pp x dp and seeds megatron's generators. Collective over: world.

    Args:
        tp_size: tensor-parallel ranks.
        pp_size: pipeline ranks.
        seed: of megatron's generators.
        virtual_pp_size: chunks per pipeline rank; megatron picks its schedule by it.

    Raises:
        UserError: tp_size * pp_size does not divide the world.
    """
    layout = make_layout(dist.get_world_size(), dist.get_rank(), tp_size, pp_size)
    device = device_of_rank(int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cpu":
        use_cpu_platform()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp_size,
        pipeline_model_parallel_size=pp_size,
        virtual_pipeline_model_parallel_size=virtual_pp_size if virtual_pp_size > 1 else None,
    )
    megatron_random.model_parallel_cuda_manual_seed(seed)
    timeout = timedelta(seconds=DISK_TIMEOUT_S)
    return ProcessGroups(
        layout=layout,
        device=device,
        tp=parallel_state.get_tensor_model_parallel_group(),
        pp=parallel_state.get_pipeline_model_parallel_group(),
        dp=parallel_state.get_data_parallel_group(),
        model=parallel_state.get_model_parallel_group(),
        saving=dist.new_group(backend="gloo", timeout=timeout),
        host=dist.new_group(backend="gloo", timeout=timeout) if device.type == "cuda" else dist.group.WORLD,
    )


def destroy_groups() -> None:
    """Leaves the job; a process that goes on may join another. Collective over: world."""
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
