"""Model FLOPs of a step in closed form, tokens per second and MFU.

A matrix product with weights [m, n] costs 2 m n per token forward, the same again for the gradient of its input and for
the gradient of its weights. So a module that trains costs 3 times its forward, a frozen one that gradients pass through
2 times, a frozen one with nothing to train before it once. Recomputation is never counted: it is work, not progress.

Attention scores and their product with values cost 4 * hidden_size per token and visible position. Conventions:
    causal   a token sees half of the row on average:  hidden_size * seq_len * 2 per layer
    palm     a token sees the whole row:                hidden_size * seq_len * 4 per layer (the PaLM paper's count)
Both take the whole row as context, although documents of a packed row do not see each other; `step_flops` also counts
what they do see, and what recomputation adds for the hardware.
"""

from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum

from janus_mega.config import derive
from janus_mega.config.schema import BackboneConfig, EncoderConfig, ModelConfig, Module, Recompute


class Convention(Enum):
    """How much context attention is counted with."""

    causal = "causal"
    palm = "palm"


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCounts:
    """What one step worked on, over all ranks."""

    tokens: int
    """Positions through the backbone, padding left out."""
    understanding_images: int = 0
    """Images through the understanding encoder."""
    generation_tokens: int = 0
    """Image ids that were embedded."""
    text_labels: int = 0
    """Positions that the text head scored."""
    image_labels: int = 0
    """Positions that the image head scored."""


PATHS_INTO_BACKBONE = (
    Module.text_embedding,
    Module.understanding_encoder,
    Module.understanding_adaptor,
    Module.generation_embedding,
    Module.generation_adaptor,
)

PEAK_BF16_FLOPS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
}
"""Dense bf16 FLOP/s by a part of the device's name; the first entry that matches counts."""


def backbone_forward_flops(backbone: BackboneConfig, seq_len: float, convention: Convention) -> float:
    """Returns the forward FLOPs of all decoder layers per token."""
    seen = {Convention.causal: 0.5, Convention.palm: 1.0}[convention] * seq_len
    attention_width = backbone.num_heads * derive.head_dim(backbone)
    weights = backbone.hidden_size * (
        2 * attention_width + 2 * backbone.num_kv_heads * derive.head_dim(backbone) + 3 * backbone.ffn_hidden_size
    )  # queries and output, keys and values, gate, up and down
    return backbone.num_layers * (2.0 * weights + 4.0 * attention_width * seen)


def encoder_forward_flops(encoder: EncoderConfig) -> float:
    """Returns the forward FLOPs of the understanding encoder per image; its attention sees every patch."""
    tokens, width = derive.understanding_tokens(encoder), encoder.hidden_size
    weights = encoder.num_layers * (4 * width * width + 2 * width * derive.encoder_ffn_size(encoder))
    patches = 3 * encoder.patch_size**2 * width
    return tokens * (2.0 * (weights + patches) + 4.0 * width * tokens * encoder.num_layers)


def module_forward_flops(
    model: ModelConfig, counts: StepCounts, seq_len: float, convention: Convention = Convention.causal
) -> dict[Module, float]:
    """Returns the forward FLOPs of every module for one step; looking up a table costs none."""
    width, inner = model.backbone.hidden_size, derive.image_head_hidden_size(model)
    tokenizer = model.image_tokenizer
    understood = counts.understanding_images * derive.understanding_tokens(model.understanding)
    return {
        Module.text_embedding: 0.0,
        Module.understanding_encoder: counts.understanding_images * encoder_forward_flops(model.understanding),
        Module.understanding_adaptor: 2.0 * understood * width * (model.understanding.hidden_size + width),
        Module.generation_embedding: 0.0,
        Module.generation_adaptor: 2.0 * counts.generation_tokens * width * (tokenizer.code_dim + width),
        Module.backbone: counts.tokens * backbone_forward_flops(model.backbone, seq_len, convention),
        Module.text_head: 2.0 * counts.text_labels * width * model.backbone.vocab_size,
        Module.image_head: 2.0 * counts.image_labels * inner * (width + tokenizer.codebook_size),
    }


def training_flops(
    model: ModelConfig,
    counts: StepCounts,
    trainable: Collection[Module],
    seq_len: float,
    convention: Convention = Convention.causal,
) -> float:
    """Returns the model FLOPs of one training step, forward and backward, with `trainable` modules training."""
    forward = module_forward_flops(model, counts, seq_len, convention)
    return sum(flops * _passes(module, trainable) for module, flops in forward.items())


def step_flops(
    model: ModelConfig,
    counts: StepCounts,
    trainable: Collection[Module],
    seq_len: int,
    *,
    squared_lengths: int,
    recompute: Recompute,
) -> dict[str, float]:
    """Returns the FLOPs of some work under every convention in use, by the name of the utilisation made from each.

    Args:
        model: Architecture.
        counts: The work.
        trainable: Modules that train.
        seq_len: Rows' length.
        squared_lengths: Sum over documents of their length squared; half of it is what causal attention looks at.
        recompute: What backward computes again.
    """
    mean_context = squared_lengths / counts.tokens if counts.tokens else 0.0
    palm = training_flops(model, counts, trainable, seq_len, Convention.palm)
    return {
        "mfu_causal": training_flops(model, counts, trainable, seq_len, Convention.causal),
        "mfu_palm": palm,
        "mfu_documents": training_flops(model, counts, trainable, mean_context, Convention.causal),
        "hfu": palm + _recomputed_flops(model, counts, trainable, seq_len, recompute),
    }


def _recomputed_flops(
    model: ModelConfig, counts: StepCounts, trainable: Collection[Module], seq_len: int, recompute: Recompute
) -> float:
    """FLOPs of forward passes that backward repeats: of whole layers (full), of attention's core alone (selective)."""
    if recompute is Recompute.none or _passes(Module.backbone, trainable) == 1:
        return 0.0
    layers = backbone_forward_flops(model.backbone, seq_len, Convention.palm)
    if recompute is Recompute.selective:
        layers -= backbone_forward_flops(model.backbone, 0, Convention.palm)
    return counts.tokens * layers


def _passes(module: Module, trainable: Collection[Module]) -> int:
    """Returns how many times its forward a module costs: 3 trained, 2 crossed by gradients, 1 neither."""
    if module in trainable:
        return 3
    if module is Module.understanding_adaptor:
        before: tuple[Module, ...] = (Module.understanding_encoder,)
    elif module is Module.generation_adaptor:
        before = (Module.generation_embedding,)
    elif module is Module.backbone:
        before = PATHS_INTO_BACKBONE
    elif module in (Module.text_head, Module.image_head):
        before = (*PATHS_INTO_BACKBONE, Module.backbone)
    else:
        before = ()
    return 2 if any(other in trainable for other in before) else 1


def peak_flops(device_name: str) -> float | None:
    """Returns the dense bf16 peak of a device in FLOP/s, or None where it is not known (a CPU, for example)."""
    return next((flops for name, flops in PEAK_BF16_FLOPS.items() if name in device_name), None)


def tokens_per_s(tokens: int, seconds: float) -> float:
    """Returns tokens / seconds, 0 for an interval without length."""
    return tokens / seconds if seconds > 0 else 0.0


def mfu(flops: float, seconds: float, num_devices: int, device_peak_flops: float) -> float:
    """Returns the share of the devices' peak that model FLOPs made use of."""
    return flops / (seconds * num_devices * device_peak_flops) if seconds > 0 else 0.0
