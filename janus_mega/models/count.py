"""Parameters of a Janus and of its image tokenizer in closed form, part by part; nothing is built.

The parts are the modules a stage trains or freezes (`config.schema.Module`), so the sum over `stage.trainable` is what
an optimizer holds. Tests compare every formula with the modules themselves and with the published sizes.
"""

from collections.abc import Iterable

from janus_mega.config import derive
from janus_mega.config.schema import BackboneConfig, EncoderConfig, ImageTokenizerConfig, ModelConfig, Module

IMAGE_CHANNELS = 3


def module_parameters(model: ModelConfig) -> dict[Module, int]:
    """Returns the parameters of every module of a Janus; the image tokenizer, never part of training, is not one."""
    backbone = model.backbone
    width, code_dim = backbone.hidden_size, model.image_tokenizer.code_dim
    codebook, inner = model.image_tokenizer.codebook_size, derive.image_head_hidden_size(model)
    return {
        Module.text_embedding: backbone.vocab_size * width,
        Module.understanding_encoder: encoder_parameters(model.understanding),
        Module.understanding_adaptor: _linear(model.understanding.hidden_size, width) + _linear(width, width),
        Module.generation_embedding: codebook * code_dim,
        Module.generation_adaptor: _linear(code_dim, width) + _linear(width, width),
        Module.backbone: backbone_parameters(backbone),
        Module.text_head: backbone.vocab_size * width,
        Module.image_head: _linear(width, inner) + _linear(inner, codebook),
    }


def total_parameters(model: ModelConfig) -> int:
    """Returns the parameters of a Janus without its image tokenizer."""
    return sum(module_parameters(model).values())


def trainable_parameters(model: ModelConfig, trainable: Iterable[Module]) -> int:
    """Returns the parameters that a stage trains."""
    counts = module_parameters(model)
    return sum(counts[module] for module in set(trainable))


def backbone_parameters(backbone: BackboneConfig) -> int:
    """Returns the decoder layers and the final norm: no biases, gated MLP."""
    width, head_dim = backbone.hidden_size, derive.head_dim(backbone)
    qkv = width * (backbone.num_heads + 2 * backbone.num_kv_heads) * head_dim
    out = backbone.num_heads * head_dim * width
    mlp = 3 * width * backbone.ffn_hidden_size
    norms = 2 * width + (2 * head_dim if backbone.qk_norm else 0)
    return backbone.num_layers * (qkv + out + mlp + norms) + width


def encoder_parameters(encoder: EncoderConfig) -> int:
    """Returns a SigLIP tower without its attention pool: patches, positions, blocks, final norm."""
    width, ffn = encoder.hidden_size, derive.encoder_ffn_size(encoder)
    patches = _convolution(IMAGE_CHANNELS, width, encoder.patch_size)
    positions = derive.understanding_tokens(encoder) * width
    block = 4 * _linear(width, width) + _linear(width, ffn) + _linear(ffn, width) + 4 * width
    return patches + positions + encoder.num_layers * block + 2 * width


def image_tokenizer_parameters(tokenizer: ImageTokenizerConfig) -> dict[str, int]:
    """Returns encoder, decoder and quantiser (codebook and the two 1x1 convolutions around it) of a VQ tokenizer."""
    return {
        "encoder": _vq_encoder(tokenizer),
        "decoder": _vq_decoder(tokenizer),
        "quantizer": tokenizer.codebook_size * tokenizer.code_dim
        + _convolution(tokenizer.latent_channels, tokenizer.code_dim, 1)
        + _convolution(tokenizer.code_dim, tokenizer.latent_channels, 1),
    }


def _vq_encoder(tokenizer: ImageTokenizerConfig) -> int:
    widths = [tokenizer.base_channels * factor for factor in tokenizer.channel_multiplier]
    total = _convolution(IMAGE_CHANNELS, tokenizer.base_channels, 3)
    current = tokenizer.base_channels
    for level, width in enumerate(widths):
        is_lowest = level == len(widths) - 1
        for _ in range(tokenizer.num_res_blocks):
            total += _residual(current, width) + (_attention(width) if is_lowest else 0)
            current = width
        total += 0 if is_lowest else _convolution(current, current, 3)
    return total + _middle(current) + 2 * current + _convolution(current, tokenizer.latent_channels, 3)


def _vq_decoder(tokenizer: ImageTokenizerConfig) -> int:
    widths = [tokenizer.base_channels * factor for factor in tokenizer.channel_multiplier]
    current = widths[-1]
    total = _convolution(tokenizer.latent_channels, current, 3) + _middle(current)
    for level in reversed(range(len(widths))):
        is_lowest = level == len(widths) - 1
        for _ in range(tokenizer.num_res_blocks + 1):
            total += _residual(current, widths[level]) + (_attention(widths[level]) if is_lowest else 0)
            current = widths[level]
        total += 0 if level == 0 else _convolution(current, current, 3)
    return total + 2 * current + _convolution(current, IMAGE_CHANNELS, 3)


def _middle(width: int) -> int:
    return 2 * _residual(width, width) + _attention(width)


def _residual(inputs: int, outputs: int) -> int:
    shortcut = _convolution(inputs, outputs, 1) if inputs != outputs else 0
    return 2 * inputs + _convolution(inputs, outputs, 3) + 2 * outputs + _convolution(outputs, outputs, 3) + shortcut


def _attention(width: int) -> int:
    return 2 * width + 4 * _convolution(width, width, 1)


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def _convolution(inputs: int, outputs: int, side: int) -> int:
    return inputs * outputs * side * side + outputs
