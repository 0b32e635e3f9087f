"""The SigLIP understanding encoder, from the parts of transformers' `JanusVisionModel`.

Its parameter names are exactly that class's, so a checkpoint's `understanding_encoder.*` is its state dict. The parts
are re-hung here instead of the model being called whole, for two reasons: the model normalises once more for a pooled
output nobody uses, and it keeps `position_ids` in a non-persistent buffer, which is garbage after a build on the meta
device. So this module has no buffers, and every submodule with parameters runs exactly once per forward, as the
gathering hooks of ZeRO-3 expect.

Shapes: `m` images, `p` patches (tokens) of an image, `e` width of the encoder.
"""

import torch
from torch import Tensor, nn

from janus_mega.config.schema import EncoderConfig


def normalize_pixels(pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Map uint8 pixels 0..255 to [-1, 1] as Janus does (mean and deviation 0.5); any shape, computed in fp32."""
    return ((pixels.to(torch.float32) / 255.0 - 0.5) / 0.5).to(dtype)


class SiglipEncoder(nn.Module):
    """Pixels to the features of all patches after the last layer and the final norm: no class token, no pooling."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        # Imported here because it costs seconds, and a rank without an encoder should not pay them.
        from transformers.models.janus.configuration_janus import JanusVisionConfig
        from transformers.models.janus.modeling_janus import JanusVisionModel

        self.hidden_size = config.hidden_size
        self.num_tokens = (config.image_size // config.patch_size) ** 2
        vision_config = JanusVisionConfig(
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            image_size=config.image_size,
            patch_size=config.patch_size,
            mlp_ratio=config.mlp_ratio,
            layer_norm_eps=config.norm_eps,
            num_image_tokens=self.num_tokens,
            hidden_act="gelu",
            attn_implementation="sdpa",
        )
        model = JanusVisionModel(vision_config)
        self.embeddings = nn.Module()
        self.embeddings.patch_embedding = model.embeddings.patch_embedding
        self.embeddings.position_embedding = model.embeddings.position_embedding
        self.encoder = model.encoder
        self.post_layernorm = model.post_layernorm

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encode normalised pixels [m, 3, H, W] to features [m, p, e] in the dtype of the weights."""
        patch_embedding = self.embeddings.patch_embedding
        patches = patch_embedding(pixel_values.to(patch_embedding.weight.dtype))  # [m, e, H / patch, W / patch]
        positions = torch.arange(self.num_tokens, device=patches.device)
        # Looked up through the module, not read from its weight: ZeRO-3 gathers a parameter when its module is called.
        hidden = patches.flatten(2).transpose(1, 2) + self.embeddings.position_embedding(positions)  # [m, p, e]
        hidden = self.encoder(inputs_embeds=hidden).last_hidden_state
        return self.post_layernorm(hidden)


def build_siglip(config: EncoderConfig) -> nn.Module:
    """Build a SigLIP encoder on the current default device (the meta device included) with transformers' own init."""
    return SiglipEncoder(config)
