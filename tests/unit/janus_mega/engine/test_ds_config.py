"""DeepSpeed's configuration, key by key: each stands for a trap."""

import pytest

from janus_mega.config.schema import ParallelConfig, Precision
from janus_mega.engine.ds_config import deepspeed_config

FP32 = deepspeed_config(ParallelConfig(precision=Precision.fp32, micro_batch_size=4), 0.7)
BF16 = deepspeed_config(ParallelConfig(precision=Precision.bf16), 1.0)


@pytest.mark.parametrize("config", [FP32, BF16], ids=["fp32", "bf16"])
def test_the_schedule_alone_counts_micro_batches(config: dict) -> None:
    assert config["gradient_accumulation_steps"] == 1
    assert config["managed_gradient_accumulation"] is False


def test_sizes_and_clipping_are_ours() -> None:
    assert FP32["train_micro_batch_size_per_gpu"] == 4
    assert FP32["gradient_clipping"] == 0.7
    assert "train_batch_size" not in FP32


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_zero_stage(zero_stage: int) -> None:
    assert deepspeed_config(ParallelConfig(zero_stage=zero_stage), 1.0)["zero_optimization"]["stage"] == zero_stage


def test_bf16_accumulates_at_once_and_reduces_in_fp32() -> None:
    assert BF16["bf16"] == {"enabled": True, "immediate_grad_update": True, "check_grad_overflow": False}
    assert BF16["data_types"] == {"grad_accum_dtype": "fp32"}
    assert BF16["communication_data_type"] == "fp32"


def test_fp32_asks_for_no_mixed_precision() -> None:
    assert not {"bf16", "fp16", "data_types", "communication_data_type"} & set(FP32)


def test_optimizer_and_schedule_are_not_deepspeeds() -> None:
    assert not {"optimizer", "scheduler"} & set(FP32)
    assert FP32["zero_force_ds_cpu_optimizer"] is False


@pytest.mark.parametrize(("num_trained", "expected"), [(0, 1), (1000, 1000), (10**10, 500_000_000)])
def test_the_bucket_is_no_longer_than_what_trains(num_trained: int, expected: int) -> None:
    zero = deepspeed_config(ParallelConfig(), 1.0, num_trained)["zero_optimization"]
    assert zero["reduce_bucket_size"] == expected
