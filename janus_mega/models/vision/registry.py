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
        UserError: the name is not registered (sizes are checked with the configuration).
    """
    if config.name not in ENCODERS:
        known = ", ".join(sorted(ENCODERS))
        raise UserError(f"understanding.name {config.name!r} is not a known encoder; set it to one of: {known}")
    return ENCODERS[config.name](config)
