"""Understanding encoders by the name a config gives.

An encoder is an `nn.Module` with `forward(pixel_values [m, 3, H, W] in [-1, 1]) -> [m, num_tokens, hidden_size]` and
the integer attributes `num_tokens` and `hidden_size`. A new one is a builder and a line in `ENCODERS`.
"""

from collections.abc import Callable

from torch import nn

from data_pipeline.errors import UserError
from janus_mega.config.schema import EncoderConfig
from janus_mega.models.vision.siglip import build_siglip

ENCODERS: dict[str, Callable[[EncoderConfig], nn.Module]] = {"siglip": build_siglip}
"""Builder of each encoder by its registry name."""


def build_encoder(config: EncoderConfig) -> nn.Module:
    """Build the understanding encoder that `config.name` names, on the current default device.

    Raises:
        UserError: the name is not registered, or the sizes do not fit each other.
    """
    if config.name not in ENCODERS:
        known = ", ".join(sorted(ENCODERS))
        raise UserError(f"understanding.name {config.name!r} is not a known encoder; set it to one of: {known}")
    if config.image_size % config.patch_size:
        raise UserError(
            f"understanding.image_size {config.image_size} is not a multiple of patch_size {config.patch_size}; "
            f"set image_size to {config.image_size // config.patch_size * config.patch_size}"
        )
    if config.hidden_size % config.num_heads:
        raise UserError(
            f"understanding.hidden_size {config.hidden_size} is not divisible by num_heads {config.num_heads}; "
            "change one of them"
        )
    return ENCODERS[config.name](config)
