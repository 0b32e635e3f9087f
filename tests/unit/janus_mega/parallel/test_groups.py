"""Joining and cutting a job: which device, how many files, how long collectives may take, what is drawn."""

import os
import resource
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from data_pipeline.errors import UserError
from janus_mega.parallel import groups as groups_module
from janus_mega.parallel.groups import DISK_TIMEOUT_S, build_groups, init_distributed
from janus_mega.parallel.platform import device_of_rank
from tests.support.ranks import results_of_ranks

SEED = 5
FEW_FILES = 256


@pytest.fixture
def see_gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    def see(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return see


def test_a_rank_computes_on_the_gpu_of_its_number(see_gpus: Any) -> None:
    assert device_of_rank(3) == torch.device("cpu")
    see_gpus(4)
    assert device_of_rank(3) == torch.device("cuda", 3)


def test_a_rank_with_one_gpu_of_its_own_takes_that(see_gpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    see_gpus(1)
    assert device_of_rank(3) == torch.device("cuda", 0)


@pytest.mark.parametrize(("num_gpus", "ranks_here"), [(4, None), (4, "8"), (1, "2")])
def test_more_ranks_than_gpus_are_refused(
    num_gpus: int, ranks_here: str | None, see_gpus: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if ranks_here:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks_here)
    see_gpus(num_gpus)
    with pytest.raises(UserError, match=f"no GPU of its own, {num_gpus} are visible"):
        device_of_rank(num_gpus)


def test_a_rank_that_cannot_know_its_gpu_is_told_so(see_gpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    see_gpus(4)
    monkeypatch.setenv("RANK", "9")
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(UserError, match="rank 9 of 16 has no LOCAL_RANK"):
        init_distributed()
    assert "LOCAL_RANK" not in os.environ


def test_everybody_takes_the_same_gpu_for_a_rank(see_gpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    see_gpus(1)
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    taken: list[Any] = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, timeout, **_: taken.append((backend, timeout)))
    init_distributed(90.0)
    assert taken == [torch.device("cuda", 0), ("nccl", timedelta(seconds=90))]
    assert os.environ["LOCAL_RANK"] == "0"  # what DeepSpeed reads


def join_with_few_files() -> tuple[int, int]:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (FEW_FILES, most))
    init_distributed()
    return resource.getrlimit(resource.RLIMIT_NOFILE)


@pytest.mark.dist
def test_a_rank_may_open_as_many_files_as_the_system_allows() -> None:
    ((allowed, most),) = results_of_ranks(join_with_few_files, 1)
    assert allowed == most
    assert most == resource.RLIM_INFINITY or most > FEW_FILES


def timeouts_beside_the_axes() -> list[float]:
    """Of the groups over all ranks that travel on the host."""
    new_group, told = dist.new_group, []

    def note(*arguments: Any, **options: Any) -> Any:
        if not arguments and "ranks" not in options:
            told.append(options["timeout"].total_seconds())
        return new_group(*arguments, **options)

    dist.new_group = note
    build_groups(1, 1, timeout_s=2 * DISK_TIMEOUT_S)
    return told


@pytest.mark.dist
def test_whoever_waits_for_a_disk_waits_as_long_as_the_others() -> None:
    assert results_of_ranks(timeouts_beside_the_axes, 2) == [[2 * DISK_TIMEOUT_S]] * 2


def cut() -> dict[str, Any]:
    told: dict[str, Any] = {}
    wrapped = parallel_state.initialize_model_parallel

    def note(**options: Any) -> None:
        told.update(options)
        wrapped(**options)

    parallel_state.initialize_model_parallel = note
    # As where there is CUDA: the host's generator is not megatron's to seed.
    groups_module.megatron_random.model_parallel_cuda_manual_seed = lambda seed: None
    build_groups(1, 2, seed=SEED, timeout_s=90.0)
    has_gloo_twins = parallel_state._DATA_PARALLEL_GROUP_GLOO is not None
    minutes = told["distributed_timeout_minutes"]
    return {"minutes": minutes, "gloo": has_gloo_twins, "drawn": torch.rand(4)}


@pytest.mark.dist
def test_a_job_is_cut_into_groups_that_are_used() -> None:
    expected = torch.rand(4, generator=torch.Generator().manual_seed(SEED))
    for told in results_of_ranks(cut, 2):
        assert (told["minutes"], told["gloo"]) == (1.5, False)
        assert torch.equal(told["drawn"], expected)
