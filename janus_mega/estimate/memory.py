"""Memory of a rank by part, in closed form.

Held all the time, in bytes per parameter (w: 2 in bf16, 4 in fp32; D: dp_size; t: those that train):

                      weights   masters    moments   gradients
    ZeRO-1            w         4 t / D    8 t / D   4 t (fp32; a bf16 run accumulates in fp32 too)
    ZeRO-2            w         4 t / D    8 t / D   4 t / D
    ZeRO-3            w / D     4 t / D    8 t / D   4 t / D
    megatron          w         bf16: 4 t / D        8 t / D   4 t

Kept per token and decoder layer for backward, in elements (h width, f inner width, n query and k kv heads of width d;
tp cuts n, k, f, and with sequence parallel h between blocks): per norm its input, its output (and on the CPU, which has
no fused kernel, input and normalised input in fp32); 4 d of rotary factors; queries, keys, values, output and fp32 sums
of attention; what enters the output projection; 2 f of gate and up, f of the activated gate, f of up with megatron's
offset (zero) added, f of their product. A frozen layer that gradients cross keeps no matrix's input. Recomputation
trades these for a layer's input (full) or the attention's inputs (selective), plus one layer's worth while it is
computed again.

The peak is the larger of two moments: backward of the last micro-batch's head with everything in flight, and the
update (or a reduction that waits for the end of backward). 1F1B keeps pp_size - rank micro-batches in flight, an
interleaved pipeline (pp_size - rank - 1) * 2 + (v - 1) * pp_size + 1 chunks. What a process needs besides tensors is a
constant, stated apart.
"""

from dataclasses import dataclass, fields

from janus_mega.config import derive
from janus_mega.config.schema import Backend, Module, Precision, Recompute, RunConfig
from janus_mega.estimate.batch import MicroBatch
from janus_mega.estimate.shape import RankShape, element_bytes, enters_trained
from janus_mega.estimate.traffic import DEEPSPEED_BUCKET, FP32, NUM_TASKS, ZERO3_PREFETCH, zero3_kept

CUDA_OVERHEAD_BYTES = 2_500_000_000
"""CUDA context, NCCL's buffers, cuBLAS workspace and fragmentation: stated, not derived, and not measured here."""
ZERO3_LIVE = 1_000_000_000
"""Elements that DeepSpeed's ZeRO-3 has gathered at most, small tensors apart."""
BATCH_BYTES_PER_TOKEN = 48
"""Ids, positions, indices and labels of a placed micro-batch, all int64."""
CPU_BATCH_BYTES_PER_TOKEN = 27
"""The batch as loaded, which on the CPU lies in the same memory."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one rank; `peak` is what must fit."""

    weights: int
    masters: int
    moments: int
    gradients: int
    buckets: int
    """Gradient bucket of DeepSpeed's ZeRO-2 and 3, with what reduces it where that is before backward is over; with
    ZeRO-3 also small weights, which stay gathered through a step."""
    gathered: int
    """ZeRO-3's weights in use: whole, and once more what the last gather brought, as it came."""
    batches: int
    """Placed micro-batches of the step."""
    activations: int
    """Decoder layers, over all micro-batches in flight."""
    encoder: int
    """The understanding encoder and both adaptors, over all micro-batches in flight."""
    heads: int
    """Final norm, scored positions and logits of a micro-batch, its backward included."""
    update: int
    """What the optimizer's step, or a reduction that waits for the end of backward, needs beyond; activations and
    gathered weights are gone by then."""
    overhead: int
    """The framework, a stated constant."""

    @property
    def held(self) -> int:
        """Between steps."""
        return self.weights + self.masters + self.moments + self.batches + self.overhead

    @property
    def peak(self) -> int:
        """The most at any moment of a step."""
        moving = self.gathered + self.activations + self.encoder + self.heads
        return self.held + self.gradients + self.buckets + max(moving, self.update)

    def parts(self) -> dict[str, int]:
        """By name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def step_memory(
    config: RunConfig, num_gpus: int, shape: RankShape, pp_rank: int, batch: MicroBatch, num_batches: int, on_cpu: bool
) -> Memory:
    """Memory of a rank of `shape` that works through `num_batches` micro-batches like `batch` per step.

    Args:
        on_cpu: kernels and libraries of the CPU (gloo, unfused norms, no CUDA context), as measured by tests.
    """
    dp_size = derive.dp_size(config.parallel, num_gpus)
    weights, masters, moments, gradients = _states(config, shape, dp_size)
    in_flight = micro_batches_in_flight(config, pp_rank, num_batches)
    layers, transient = _layers(config, shape, batch, on_cpu)
    reduction, is_reduced_late = _reduction(config, shape, dp_size, on_cpu), shape.trained <= DEEPSPEED_BUCKET
    per_token = BATCH_BYTES_PER_TOKEN + (CPU_BATCH_BYTES_PER_TOKEN if on_cpu else 0)
    pixels = 3 * config.model.understanding.image_size**2 * batch.images * (2 if on_cpu else 1)
    return Memory(
        weights=weights,
        masters=masters,
        moments=moments,
        gradients=gradients,
        buckets=_buckets(config, shape) + (0 if is_reduced_late else reduction),
        gathered=_gathered(config, shape),
        batches=num_batches * (per_token * batch.tokens + pixels),
        activations=round(in_flight * layers + transient),
        encoder=round(in_flight * _pathways(config, shape, batch)),
        heads=_heads(config, batch, on_cpu) if shape.is_last else 0,
        update=max(_update(config, shape, dp_size, on_cpu), reduction if is_reduced_late else 0),
        overhead=0 if on_cpu else CUDA_OVERHEAD_BYTES,
    )


def micro_batches_in_flight(config: RunConfig, pp_rank: int, num_batches: int) -> float:
    """Micro-batches, through all layers of a pipeline rank, whose activations are held at once."""
    parallel = config.parallel
    behind, rounds = parallel.pp_size - pp_rank - 1, parallel.virtual_pp_size
    if rounds == 1:
        return min(num_batches, behind + 1)
    return min(num_batches * rounds, behind * 2 + (rounds - 1) * parallel.pp_size + 1) / rounds


def _states(config: RunConfig, shape: RankShape, dp_size: int) -> tuple[int, int, int, int]:
    """Weights, masters, moments (and the average of the weights, if one is kept), gradients."""
    parallel, width = config.parallel, element_bytes(config)
    kept = 2 + (config.optimizer.ema_decay > 0)
    moments = kept * FP32 * shape.trained // dp_size
    if parallel.backend is Backend.megatron:
        masters = FP32 * shape.trained // dp_size if parallel.precision is Precision.bf16 else 0
        return width * shape.weights, masters, moments, FP32 * shape.trained
    masters = FP32 * shape.trained // dp_size
    weights = width * shape.weights // (dp_size if parallel.zero_stage == 3 else 1)
    return weights, masters, moments, FP32 * shape.trained // (dp_size if parallel.zero_stage > 1 else 1)


def _buckets(config: RunConfig, shape: RankShape) -> int:
    parallel, width = config.parallel, element_bytes(config)
    if parallel.backend is Backend.megatron:
        return 0
    bucket = min(DEEPSPEED_BUCKET, shape.trained)
    if parallel.zero_stage == 3:
        return FP32 * bucket + width * sum(zero3_kept(shape))
    return 0 if parallel.zero_stage == 1 else width * bucket  # ZeRO-1 reduces when backward is over: see _update


def _gathered(config: RunConfig, shape: RankShape) -> int:
    """Weights that a step has whole for a while, and the last gather, which is cut into them by copying."""
    if config.parallel.backend is Backend.megatron or config.parallel.zero_stage < 3:
        return 0
    large = shape.weights - sum(zero3_kept(shape))  # all of a small model: nothing is let go that is needed again soon
    return element_bytes(config) * (min(large, ZERO3_LIVE) + min(large, ZERO3_PREFETCH))


def _reduction(config: RunConfig, shape: RankShape, dp_size: int, on_cpu: bool) -> int:
    """What reducing a bucket needs beside it: ZeRO-3 sorts it by rank into a copy, bf16 at ZeRO-2 is summed in fp32."""
    parallel = config.parallel
    if parallel.backend is Backend.megatron or parallel.zero_stage == 1 or dp_size == 1:
        return 0
    bucket, is_zero3 = min(DEEPSPEED_BUCKET, shape.trained), parallel.zero_stage == 3
    copy = FP32 * bucket if is_zero3 or parallel.precision is Precision.bf16 else 0
    gloo = (FP32 if is_zero3 else element_bytes(config)) * bucket if on_cpu else 0
    return copy + gloo


def _layers(config: RunConfig, shape: RankShape, batch: MicroBatch, on_cpu: bool) -> tuple[float, float]:
    """Bytes that a micro-batch keeps in this rank's decoder layers, and the passing need of one layer."""
    parallel, backbone, width = config.parallel, config.model.backbone, element_bytes(config)
    tp_size = parallel.tp_size
    stream = backbone.hidden_size / (tp_size if parallel.sequence_parallel else 1)
    head_dim, ffn = derive.head_dim(backbone), backbone.ffn_hidden_size / tp_size
    queries, keys = backbone.num_heads * head_dim / tp_size, backbone.num_kv_heads * head_dim / tp_size
    trains = Module.backbone in config.stage.trainable
    if not trains and not enters_trained(config.stage.trainable):
        return 0.0, width * batch.tokens * 4 * ffn
    norms = 2 * stream * (1 + trains + (FP32 // width * 2 - 1 if on_cpu else 0))
    attention = 2 * queries + 2 * keys + FP32 / width * backbone.num_heads / tp_size
    inputs = queries + 5 * ffn if trains else 4 * ffn
    whole = norms + 4 * head_dim + attention + inputs
    backward = 3 * ffn  # gradients of gate, up and the activated gate while all of the above is still held
    if parallel.sequence_parallel:
        backward += (
            2 * backbone.hidden_size
        )  # a matrix's whole input, gathered again, and its gradient before it is cut
    if tp_size > 1 and parallel.tp_sums_in_fp32 and parallel.precision is Precision.bf16:
        backward += (FP32 // width) * backbone.hidden_size * (2 if on_cpu else 1)  # gloo copies what it sums
    kept = whole
    if parallel.recompute is Recompute.full:
        kept, backward = stream, backward + whole
    elif parallel.recompute is Recompute.selective:
        kept, backward = whole - attention + 2 * queries + 3 * keys, backward + attention
    tokens = width * batch.tokens
    return shape.num_layers * kept * tokens, backward * tokens


def _pathways(config: RunConfig, shape: RankShape, batch: MicroBatch) -> float:
    """Bytes that a micro-batch keeps in the encoder and the adaptors."""
    if not shape.is_first:
        return 0.0
    model, trainable = config.model, config.stage.trainable
    hidden, encoder = model.backbone.hidden_size, model.understanding
    images, tokens = max(batch.images, 1), derive.understanding_tokens(encoder)
    encoded = -(-images // config.parallel.tp_size) if config.parallel.split_encoder else images
    kept, per_patch, per_id = 0.0, 0.0, 0.0
    if Module.understanding_encoder in trainable:
        layer = 8 * encoder.hidden_size + 2 * derive.encoder_ffn_size(encoder)
        kept = encoded * tokens * (encoder.num_layers * layer + encoder.hidden_size)
    if {Module.understanding_adaptor, Module.understanding_encoder} & set(trainable):
        per_patch += encoder.hidden_size + 3 * hidden
    if {Module.generation_adaptor, Module.generation_embedding} & set(trainable):
        per_id += model.image_tokenizer.code_dim + 3 * hidden
    return element_bytes(config) * (kept + images * tokens * per_patch + batch.drawn * per_id)


def _heads(config: RunConfig, batch: MicroBatch, on_cpu: bool) -> int:
    """Bytes from the final norm to the gradient of the logits."""
    model, parallel, width = config.model, config.parallel, element_bytes(config)
    hidden, inner = model.backbone.hidden_size, derive.image_head_hidden_size(model)
    stream = batch.tokens * hidden * width
    total = stream * (2 if on_cpu else 1) / (parallel.tp_size if parallel.sequence_parallel else 1)
    total += stream if parallel.sequence_parallel else 0
    largest = 0.0
    for task, labels in enumerate(batch.labels):
        is_image = task == NUM_TASKS - 1
        ids = (model.image_tokenizer.codebook_size if is_image else model.backbone.vocab_size) / parallel.tp_size
        total += max(labels, 1) * (hidden + (2 * inner if is_image else 0)) * width
        scored = min(max(labels, 1), config.loss.chunk_tokens)
        rounded = width if parallel.precision is Precision.bf16 else 0  # logits as they come, and their gradient
        if parallel.tp_size == 1 and not rounded and not config.loss.z_loss:
            logits, passing = scored * ids * width, 2 * scored * ids * width
        elif parallel.tp_size == 1 or config.loss.z_loss:
            # fp32 logits beside the softmax, which is kept; in backward the gradient in their place.
            logits, passing = scored * ids * FP32, scored * ids * (FP32 + rounded)
        else:
            # fp32 logits, in place exponentiated, divided, and made into their gradient.
            logits, passing = scored * ids * FP32, scored * ids * rounded
        is_chunked = labels > config.loss.chunk_tokens
        total += 0 if is_chunked else logits
        largest = max(largest, passing + (logits if is_chunked else 0))
    return round(total + largest)


def _update(config: RunConfig, shape: RankShape, dp_size: int, on_cpu: bool) -> int:
    """What the update needs beyond states, gradients and buckets."""
    parallel = config.parallel
    mine = FP32 * shape.trained // dp_size
    if parallel.backend is Backend.megatron:
        return FP32 * shape.trained if on_cpu and dp_size > 1 else 0  # gloo copies what it reduces and scatters
    temporaries = 0 if on_cpu else 2 * mine  # AdamW's denominator and quotient; on the CPU it works in small pieces
    if parallel.precision is Precision.bf16 and parallel.zero_stage == 1:
        return max(temporaries, FP32 * min(DEEPSPEED_BUCKET, shape.trained))  # gradients flat, also of one rank
    # Flat copies of this rank's gradients, and at ZeRO-1 the gradients that were averaged.
    copies = mine * (2 if parallel.zero_stage == 1 and dp_size > 1 else 1)
    if parallel.zero_stage > 1:
        return copies + temporaries
    bucket = FP32 * min(DEEPSPEED_BUCKET, shape.trained)
    return max(bucket, copies + temporaries - FP32 * shape.trained)
