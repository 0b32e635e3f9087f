"""The estimate beside the closed forms that Megatron-LM prints for a text model: equal wherever it has one.

megatron-core ships none of them; they stand in Megatron-LM's training loop and in its report of theoretical memory, and
are written down here from there as formulas. What they do not know: an understanding encoder, drawn images, frozen
modules, heads that score labelled positions alone, ZeRO-2 and 3, fp32 runs, and what communication costs (for that,
tests/distributed/test_traffic.py counts what megatron's own layers, schedules and optimizer send). Their activations,
s b h (18 + 4 f / h), are those of a GELU MLP with two dropout masks; a layer with SwiGLU keeps two thirds more.
"""

from dataclasses import replace

import pytest

from janus_mega.config import derive
from janus_mega.config.load import load_config
from janus_mega.config.schema import Backend, Module, Recompute, RunConfig
from janus_mega.estimate.batch import MicroBatch
from janus_mega.estimate.memory import micro_batches_in_flight, step_memory
from janus_mega.estimate.shape import rank_shapes
from janus_mega.observe.throughput import Convention, StepCounts, training_flops

LAYOUTS = [(1, 4, 1), (2, 4, 1), (4, 4, 1), (4, 3, 2), (8, 6, 1)]
"""tp, pp, chunks per pipeline rank."""
NUM_GPUS = 192
TEXT = tuple(Module)


def config_of(name: str, tp_size: int, pp_size: int, virtual: int) -> RunConfig:
    config = load_config(RunConfig, f"run/{name}_stage2.yaml", []).config
    parallel = replace(
        config.parallel,
        tp_size=tp_size,
        pp_size=pp_size,
        virtual_pp_size=virtual,
        pipeline_layers=[config.model.backbone.num_layers // (pp_size * virtual)] * (pp_size * virtual),
        sequence_parallel=tp_size > 1,
        tp_sums_in_fp32=False,  # as megatron sums
        backend=Backend.megatron,
        recompute=Recompute.selective,
    )
    return replace(config, parallel=parallel, stage=replace(config.stage, trainable=list(TEXT)))


def layer_elements(config: RunConfig) -> float:
    """Weights of a decoder layer: attention 2 h^2 r (1 + groups / heads), SwiGLU 3 h f, two norms."""
    backbone = config.model.backbone
    width, share = backbone.hidden_size, backbone.num_kv_heads / backbone.num_heads
    projection = derive.head_dim(backbone) * backbone.num_heads / width
    return 2 * width**2 * projection * (1 + share) + 3 * width * backbone.ffn_hidden_size + 2 * width


@pytest.mark.parametrize("name", ["janus_1b", "janus_pro_1b", "janus_pro_7b"])
def test_model_flops_of_text(name: str) -> None:
    """12 T L h^2 ((1 + groups / heads + s / h) r + 3 f / 2 h + V / 2 L h), attention seeing whole rows."""
    config = config_of(name, 1, 1, 1)
    backbone, seq_len, tokens = config.model.backbone, config.data.seq_len, 10 * config.data.seq_len
    width, layers = backbone.hidden_size, backbone.num_layers
    projection = derive.head_dim(backbone) * backbone.num_heads / width
    attention = (1 + backbone.num_kv_heads / backbone.num_heads + seq_len / width) * projection
    rest = 1.5 * backbone.ffn_hidden_size / width + backbone.vocab_size / (2 * layers * width)
    theirs = 12 * tokens * layers * width**2 * (attention + rest)
    counts = StepCounts(tokens=tokens, text_labels=tokens)
    assert training_flops(config.model, counts, TEXT, seq_len, Convention.palm) == pytest.approx(theirs, rel=1e-12)


@pytest.mark.parametrize(("tp_size", "pp_size", "virtual"), LAYOUTS)
def test_weights_and_optimizer_of_a_pipeline_rank_between_the_ends(tp_size: int, pp_size: int, virtual: int) -> None:
    """(6 + 12 / dp) bytes a parameter; they cut norms over tp too, which is less than a thousandth."""
    config = config_of("janus_pro_1b", tp_size, pp_size, virtual)
    batch = MicroBatch(config.data.seq_len, (config.data.seq_len, 0, 0), 0, 0)
    memory = step_memory(config, NUM_GPUS, rank_shapes(config)[1], 1, batch, 8, on_cpu=False)
    elements = layer_elements(config) * config.model.backbone.num_layers / (pp_size * tp_size)
    dp_size = NUM_GPUS // (tp_size * pp_size)
    ours = memory.weights + memory.masters + memory.moments + memory.gradients
    assert ours == pytest.approx(elements * (6 + 12 / dp_size), rel=1e-3)


@pytest.mark.parametrize(("tp_size", "pp_size", "virtual"), LAYOUTS)
@pytest.mark.parametrize("num_batches", [2, 4, 24])
def test_micro_batches_in_flight(tp_size: int, pp_size: int, virtual: int, num_batches: int) -> None:
    """On the first rank: pp, or pp (1 + (pp - 1) / (pp v)) interleaved (they do not cap it by what there is)."""
    config = config_of("janus_pro_1b", tp_size, pp_size, virtual)
    theirs = min(num_batches, pp_size) if virtual == 1 else pp_size * (1 + (pp_size - 1) / (pp_size * virtual))
    assert micro_batches_in_flight(config, 0, num_batches) == pytest.approx(min(num_batches, theirs))


@pytest.mark.parametrize("tp_size", [2, 4, 8])
def test_activations_of_a_layer(tp_size: int) -> None:
    """Theirs without the masks, 16 h, and with SwiGLU's 10 f; ours adds what rotates queries and keys, never cut."""
    config = config_of("janus_pro_7b", tp_size, 3, 1)
    tokens, backbone = config.data.seq_len, config.model.backbone
    batch = MicroBatch(tokens, (tokens, 0, 0), 0, 0)
    shape = rank_shapes(config)[2]  # one micro-batch in flight, no encoder
    per_layer = [
        step_memory(config, NUM_GPUS, replace(shape, chunks=chunks), 2, batch, 8, on_cpu=False).activations
        for chunks in (shape.chunks, ())
    ]
    ours = (per_layer[0] - per_layer[1]) / shape.num_layers
    theirs = tokens * (16 * backbone.hidden_size + 10 * backbone.ffn_hidden_size) / tp_size
    assert ours == pytest.approx(theirs, rel=0.2)
    told = tokens * (18 * backbone.hidden_size + 4 * backbone.ffn_hidden_size) / tp_size
    assert 1.6 <= ours / told <= 1.75
