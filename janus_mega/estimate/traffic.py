"""Collectives of one training step in closed form: calls and bytes per group, for one rank of every pipeline rank.

Bytes are those of the tensor a rank puts in: its own part for an all-gather, the whole input for a reduce-scatter. With
A the bytes of a micro-batch's stream [s, b, h], per micro-batch and layer:

    tensor parallel       2 all-reduces of A forward, 2 backward; where bf16 is summed in fp32, each is a reduce-scatter
                          of 2A and an all-gather of A/tp
    + sequence parallel   2 all-gathers of A/tp and 2 reduce-scatters of A (2A) forward; backward 2 reduce-scatters and
                          2 all-gathers, and 2 all-gathers more where inputs of trained matrices were not kept whole
    full recomputation    the forward ones once more
    embedding             1 all-reduce of A
    encoder, where split  1 all-gather of a share of the features, 1 all-reduce of its gradients per parameter
    heads                 per task 3 all-reduces of 4 bytes a label, and the gradient of what is scored
    pipeline              A (A/tp with sequence parallel) each way per border

Per step: gradients in fp32 over dp once (ZeRO-1, megatron) or once per micro-batch (ZeRO-2 and 3), weights back, and a
few numbers. Counted operators of real steps equal these formulas (tests/distributed/test_traffic.py).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from janus_mega.config import derive
from janus_mega.config.schema import Backend, Module, Precision, Recompute, RunConfig
from janus_mega.estimate.batch import MicroBatch
from janus_mega.estimate.shape import RankShape, element_bytes, encoder_tensors, enters_trained

FP32 = 4
NUM_TASKS = 3
DEEPSPEED_BUCKET = 500_000_000
"""Elements of a DeepSpeed bucket; a longer gradient or weight is sent in several calls."""
ZERO3_PERSISTENT = 100_000
"""DeepSpeed's ZeRO-3 keeps parameters up to this many elements gathered over a step."""
ZERO3_KEPT, ZERO3_PREFETCH = 500_000_000, 50_000_000
"""Elements before the loss that stay gathered until backward (half the reuse distance); elements of one gather."""


@dataclass(slots=True)
class Traffic:
    """Calls and bytes by (group, collective)."""

    calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    bytes: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, group: str, kind: str, size: float, calls: int = 1) -> None:
        """Adds `calls` collectives of `size` bytes each."""
        if calls:
            self.calls[group, kind] += calls
            self.bytes[group, kind] += round(size * calls)


def step_traffic(config: RunConfig, num_gpus: int, shape: RankShape, batches: Sequence[MicroBatch]) -> Traffic:
    """What one rank of a pipeline rank puts into collectives in one step."""
    traffic = Traffic()
    parallel = config.parallel
    if parallel.tp_size > 1:
        for batch in batches:
            _add_layers(traffic, config, shape, batch)
            if shape.is_first and parallel.split_encoder:
                _add_encoder(traffic, config, batch)
            if shape.is_last:
                _add_heads(traffic, config, shape, batch)
    if parallel.pp_size > 1:
        _add_pipeline(traffic, config, shape, batches)
    dp_size = derive.dp_size(parallel, num_gpus)
    if num_gpus > 1:
        traffic.add("world", "all_reduce", 8 * (NUM_TASKS + 1))  # losses, and whether somebody was told to stop
    if dp_size > 1:
        traffic.add("dp", "all_reduce", 8 * NUM_TASKS)
    add = _add_megatron if parallel.backend is Backend.megatron else _add_deepspeed
    add(traffic, config, shape, dp_size, len(batches))
    return traffic


def _add_sums(traffic: Traffic, config: RunConfig, elements: float, calls: int) -> None:
    """Sums over tp of activations or their gradients that every rank gets whole."""
    size = elements * element_bytes(config)
    if not _sums_in_fp32(config):
        traffic.add("tp", "all_reduce", size, calls)
        return
    traffic.add("tp", "reduce_scatter", FP32 * elements, calls)
    traffic.add("tp", "all_gather", size / config.parallel.tp_size, calls)


def _sums_in_fp32(config: RunConfig) -> bool:
    return config.parallel.tp_sums_in_fp32 and config.parallel.precision is Precision.bf16


def _add_layers(traffic: Traffic, config: RunConfig, shape: RankShape, batch: MicroBatch) -> None:
    parallel, width = config.parallel, config.model.backbone.hidden_size
    stream = batch.tokens * width * element_bytes(config)
    trains, enters = Module.backbone in config.stage.trainable, enters_trained(config.stage.trainable)
    # A pipeline rank behind the first always sends a gradient back; the first needs one only if something trains.
    backward = sum(len(c.layers) for c in shape.chunks if not c.is_first or trains or enters)
    again = backward if parallel.recompute is Recompute.full else 0
    forward = shape.num_layers + again
    traffic.add("tp", "all_reduce", stream, shape.is_first)
    if not parallel.sequence_parallel:
        _add_sums(traffic, config, batch.tokens * width, 2 * (forward + backward))
    else:
        gathers = 2 * forward + (4 if trains else 2) * backward + (shape.is_first and enters) + shape.is_last
        traffic.add("tp", "all_gather", stream / parallel.tp_size, gathers)
        summed = FP32 * batch.tokens * width if _sums_in_fp32(config) else stream
        traffic.add("tp", "reduce_scatter", summed, 2 * (forward + backward))
        norms = 2 * shape.num_layers + shape.is_last if trains else 0
        traffic.add("tp", "all_reduce", width * element_bytes(config), norms)
    if config.model.backbone.qk_norm and trains:
        traffic.add("tp", "all_reduce", derive.head_dim(config.model.backbone) * element_bytes(config), 2 * backward)


def _add_encoder(traffic: Traffic, config: RunConfig, batch: MicroBatch) -> None:
    """Features of the rank's share of the images, and the sum of the encoder's gradients tensor by tensor."""
    encoder, trainable = config.model.understanding, config.stage.trainable
    trains = Module.understanding_encoder in trainable
    if not batch.images and not trains and Module.understanding_adaptor not in trainable:
        return
    share = -(-max(batch.images, 1) // config.parallel.tp_size)
    width = element_bytes(config)
    traffic.add("tp", "all_gather", share * derive.understanding_tokens(encoder) * encoder.hidden_size * width)
    if trains:
        sizes = encoder_tensors(encoder)
        traffic.add("tp", "all_reduce", width * sum(sizes) / len(sizes), len(sizes))


def _add_heads(traffic: Traffic, config: RunConfig, shape: RankShape, batch: MicroBatch) -> None:
    trainable = config.stage.trainable
    before = {*trainable} & {Module.backbone} or enters_trained(trainable) or not shape.is_first
    inner = derive.image_head_hidden_size(config.model)
    for task, labels in enumerate(batch.labels):
        scored = max(labels, 1)  # a task without labels scores one position and multiplies by zero
        chunks = -(-scored // config.loss.chunk_tokens)
        repeats = 2 if chunks > 1 else 1
        traffic.add("tp", "all_reduce", FP32 * scored / chunks, 3 * chunks * repeats)
        is_image = task == NUM_TASKS - 1
        if before or (is_image and Module.image_head in trainable):
            width = inner if is_image else config.model.backbone.hidden_size
            _add_sums(traffic, config, scored / chunks * width, chunks)


def _add_pipeline(traffic: Traffic, config: RunConfig, shape: RankShape, batches: Sequence[MicroBatch]) -> None:
    parallel = config.parallel
    cut = parallel.tp_size if parallel.sequence_parallel else 1
    messages = sum((not chunk.is_last) + (not chunk.is_first) for chunk in shape.chunks)
    for batch in batches:
        size = batch.tokens * config.model.backbone.hidden_size * element_bytes(config) / cut
        traffic.add("pp", "send", size, messages)
        traffic.add("pp", "recv", size, messages)


def num_param_groups(config: RunConfig) -> int:
    """Optimizer groups: one for matrices and one for vectors per learning-rate scale."""
    scales = config.optimizer.lr_scales
    return 2 * len({scales.get(module.value, 1.0) for module in config.stage.trainable})


def _add_deepspeed(traffic: Traffic, config: RunConfig, shape: RankShape, dp_size: int, num_batches: int) -> None:
    parallel, groups = config.parallel, num_param_groups(config)
    # DeepSpeed's bf16 optimizer (ZeRO-1) keeps whole gradients and takes one norm over all groups.
    is_whole = parallel.precision is Precision.bf16 and parallel.zero_stage == 1
    if parallel.tp_size * parallel.pp_size > 1:
        traffic.add("model", "all_reduce", FP32, 1 if is_whole else groups)  # the norm
    if dp_size == 1:
        return
    trained = shape.trained or groups  # an empty group holds one element
    buckets = -(-trained // DEEPSPEED_BUCKET)
    gradient = FP32 * trained / buckets
    if parallel.zero_stage < 3:
        traffic.add("dp", "all_reduce", FP32, 0 if is_whole else groups)  # the norm
        traffic.add("dp", "all_reduce", gradient, buckets * (num_batches if parallel.zero_stage == 2 else 1))
        weights = element_bytes(config) * trained / dp_size
        calls = max(groups, buckets)
        traffic.add("dp", "all_gather", weights / calls, calls)
        return
    traffic.add("dp", "all_reduce", 2 * FP32, groups)
    traffic.add("dp", "reduce_scatter", gradient, buckets * num_batches)
    _add_gathers(traffic, config, shape, dp_size, num_batches)


def zero3_kept(shape: RankShape) -> list[int]:
    """Elements of each of the tensors that ZeRO-3 gathers once a step and keeps; the larger ones come and go."""
    return [size for size in shape.tensors if size <= ZERO3_PERSISTENT]


def _add_gathers(traffic: Traffic, config: RunConfig, shape: RankShape, dp_size: int, num_batches: int) -> None:
    """ZeRO-3: small parameters come back once a step; large ones per micro-batch, together, and those that backward
    reaches only after ZERO3_KEPT more elements once again."""
    small = zero3_kept(shape)
    large = shape.weights - sum(small)
    again = max(0, large - ZERO3_KEPT)
    width = element_bytes(config) / dp_size
    if small:
        traffic.add("dp", "all_gather", width * sum(small) / len(small), len(small))
    if large:
        calls = -(-(large + again) // ZERO3_PREFETCH)
        traffic.add("dp", "all_gather", width * (large + again) / calls, calls * num_batches)


def _add_megatron(traffic: Traffic, config: RunConfig, shape: RankShape, dp_size: int, num_batches: int) -> None:
    if dp_size * config.parallel.tp_size * config.parallel.pp_size > 1:
        traffic.add("world", "all_reduce", FP32)  # the norm
    if dp_size == 1 or not shape.trained:
        return
    traffic.add("dp", "reduce_scatter", FP32 * shape.trained)
    traffic.add("dp", "all_gather", element_bytes(config) * shape.trained / dp_size)
