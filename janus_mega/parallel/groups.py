"""The process groups of a job: built once, handed on as an argument.

megatron-core keeps its groups in module state, so this file is also the only writer of that state. Collective calls
elsewhere name the axis they run over through a field of `ProcessGroups`.
"""

import os
import resource
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import random as megatron_random

from data_pipeline.errors import UserError
from janus_mega.parallel.layout import Layout, make_layout
from janus_mega.parallel.platform import device_of_rank, use_cpu_platform

COLLECTIVE_TIMEOUT_S = 1800.0
"""How long a collective may take before torch ends the rank, where no watchdog waits longer."""
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


def init_distributed(timeout_s: float = COLLECTIVE_TIMEOUT_S, init_method: str = "env://") -> None:
    """Joins the job that torchrun or srun started (one rank alone if neither did). Collective over: world.

    Raises:
        UserError: it cannot be told which GPU is this rank's.
    """
    _raise_open_files()
    if dist.is_initialized():
        return
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    has_cuda = torch.cuda.is_available()
    if has_cuda and world_size > 1 and "LOCAL_RANK" not in os.environ:
        raise UserError(
            f"rank {rank} of {world_size} has no LOCAL_RANK, so its GPU is not known; start ranks with torchrun or "
            "srun, or set LOCAL_RANK to the number of each rank on its machine"
        )
    os.environ.setdefault("LOCAL_RANK", str(rank))  # DeepSpeed asks for it even where a rank is alone
    if has_cuda:
        device = device_of_rank(int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        os.environ["LOCAL_RANK"] = str(device.index)  # DeepSpeed takes it for the number of the device
    store = dist.HashStore() if world_size == 1 and "MASTER_ADDR" not in os.environ else None
    dist.init_process_group(
        "nccl" if has_cuda else "gloo",
        init_method=None if store else init_method,
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )


def _raise_open_files() -> None:
    """As many open files as this process may have: every rank keeps sockets to its peers, once per group."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # where the system forbids it, what was allowed before stays
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def build_groups(
    tp_size: int,
    pp_size: int,
    seed: int = 0,
    virtual_pp_size: int = 1,
    timeout_s: float = COLLECTIVE_TIMEOUT_S,
) -> ProcessGroups:
    """Cuts the joined job into tp x pp x dp and seeds torch's and megatron's generators. Collective over: world.

    Args:
        tp_size: tensor-parallel ranks.
        pp_size: pipeline ranks.
        seed: of the generators.
        virtual_pp_size: chunks per pipeline rank; megatron picks its schedule by it.
        timeout_s: of collectives over tp, pp and dp.

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
        distributed_timeout_minutes=timeout_s / 60,
        create_gloo_process_groups=False,  # megatron's checkpoints use them, ours do not
    )
    torch.manual_seed(seed)  # also the host's generator, which megatron leaves alone where there is CUDA
    megatron_random.model_parallel_cuda_manual_seed(seed)
    timeout = timedelta(seconds=max(DISK_TIMEOUT_S, timeout_s))
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
    """Leaves the job, if there is one; a process that goes on may join another. Collective over: world."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
