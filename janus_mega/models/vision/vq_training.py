"""The image tokenizer as something the engine trains: pictures in, sums of two losses out.

The losses are LlamaGen's without its perceptual and adversarial terms, which need networks trained elsewhere:

    reconstruction:  mean over pixels of (picture - reconstruction)^2
    codebook:        mean over features of (code - sg[feature])^2 + commitment_weight * (sg[code] - feature)^2

sg stops the gradient; features and codes have unit length. Both are summed over pictures, and a picture is what is
counted, so the batch's loss is the mean over pictures whatever the split.

Shapes: `b` pictures.
"""

from collections.abc import Mapping

import torch
from megatron.core.enums import ModelType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from janus_mega.config.schema import ImageTokenizerConfig, ParallelConfig, Precision
from janus_mega.models.vision.siglip import normalize_pixels
from janus_mega.models.vision.vq import VqModel, VqOutput

TASKS = ("reconstruction", "codebook")
"""Losses that are kept apart, in the order of the sums."""
MODULE = "image_tokenizer"
"""The one module of the chunk; its parameters carry this prefix in checkpoints."""


class VqChunk(nn.Module):
    """The whole network on every rank; `model_type`, `config` and `set_input_tensor` are what schedules ask for."""

    model_type = ModelType.encoder_or_decoder

    def __init__(self, tokenizer: ImageTokenizerConfig, dtype: torch.dtype) -> None:
        super().__init__()
        # Schedules read a transformer's config; there is no transformer, so its sizes are the least it accepts.
        self.config = TransformerConfig(
            num_layers=1, hidden_size=1, num_attention_heads=1, params_dtype=dtype, pipeline_dtype=dtype
        )
        self.commitment_weight = tokenizer.commitment_weight
        self.image_tokenizer = VqModel(tokenizer).to(dtype)

    def set_input_tensor(self, input_tensor: list[Tensor | None]) -> None:
        """Nothing: there is one pipeline rank."""

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """fp32 [2]: sums over the batch's `pixel_values` (uint8 [b, 3, H, W]) of the losses in `TASKS`."""
        pixels = normalize_pixels(batch["pixel_values"])
        return loss_sums(pixels, self.image_tokenizer(pixels), self.commitment_weight)


def loss_sums(pixels: Tensor, out: VqOutput, commitment_weight: float) -> Tensor:
    """fp32 [2]: the losses of the module's docstring, summed over pictures [b, 3, H, W] in [-1, 1]."""
    reconstruction = (out.reconstruction.float() - pixels.float()).square().flatten(1).mean(1)  # [b]
    codebook = (out.codes - out.directions.detach()).square()
    commitment = (out.codes.detach() - out.directions).square()
    quantisation = (codebook + commitment_weight * commitment).flatten(1).mean(1)  # [b]
    return torch.stack((reconstruction.sum(), quantisation.sum())).float()


def build_vq_chunk(tokenizer: ImageTokenizerConfig, parallel: ParallelConfig) -> VqChunk:
    """The chunk on the meta device, all parameters in the precision of `parallel`."""
    dtype = torch.bfloat16 if parallel.precision == Precision.bf16 else torch.float32
    with torch.device("meta"):
        return VqChunk(tokenizer, dtype)


def fresh_weights(tokenizer: ImageTokenizerConfig, seed: int) -> dict[str, Tensor]:
    """Initial fp32 values of a `VqModel` by name: torch's defaults, a function of the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return VqModel(tokenizer).state_dict()
