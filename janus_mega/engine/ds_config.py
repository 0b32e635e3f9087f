"""From our configuration to DeepSpeed's; pure, and the only place that spells its keys."""

from typing import Any

from janus_mega.config.schema import ParallelConfig, Precision

MAX_BUCKET = 500_000_000
"""Elements of the gradient bucket at most; DeepSpeed's own choice."""


def deepspeed_config(parallel: ParallelConfig, clip_grad_norm: float, num_trained: int = MAX_BUCKET) -> dict[str, Any]:
    """DeepSpeed's configuration for one of our chunks under megatron's schedules.

    The schedule runs the micro-batches, so DeepSpeed must neither count them nor scale losses: accumulation steps 1
    and unmanaged accumulation. bf16 gradients accumulate in fp32 as soon as they appear (the default epilogue is never
    reached from a schedule's backward) and are reduced in fp32.

    DeepSpeed allocates its gradient bucket in full (2 GB in fp32), however little there is to put into it, so it is
    never longer than `num_trained`, the elements that train on this rank; the reductions stay the same.
    """
    zero = {
        "stage": parallel.zero_stage,
        "overlap_comm": False,
        "reduce_bucket_size": max(1, min(num_trained, MAX_BUCKET)),
    }
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": parallel.micro_batch_size,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": clip_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    if parallel.precision == Precision.fp32 and parallel.zero_stage == 1:
        # One all-reduce per bucket, as it is, of gradients divided before: what splitting it by owner first comes to.
        zero["reduce_scatter"] = False
        config["prescale_gradients"] = True
    if parallel.precision == Precision.bf16:
        # Gradients are not looked through for overflows: the norm tells of them, and the guard refuses it.
        config["bf16"] = {"enabled": True, "immediate_grad_update": True, "check_grad_overflow": False}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        config["communication_data_type"] = "fp32"
    return config
