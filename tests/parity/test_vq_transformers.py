"""Our image tokenizer against transformers' `JanusVQVAE` with the same weights, renamed.

transformers compares raw features with raw codes when it encodes, so its ids mean what ours mean only if the rows of
the codebook have unit length; then the ids are equal. Pixels are compared in fp64, where only a different formula can
differ: measured worst difference 3e-14 on values of order 1 (in fp32 it is 1.4e-5, from the order of sums).
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.janus.configuration_janus import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAE

from janus_mega.config.schema import ImageTokenizerConfig
from janus_mega.models.vision.vq import VqModel

CONFIG = ImageTokenizerConfig(
    image_size=32,
    base_channels=32,
    channel_multiplier=[1, 2, 4],
    num_res_blocks=2,
    latent_channels=64,
    codebook_size=200,
)
MIDDLE = {"mid.0": "mid.block_1", "mid.1": "mid.attn_1", "mid.2": "mid.block_2"}


def transformers_name(name: str) -> str:
    """The name that transformers gives to a tensor of the published layout."""
    for ours, theirs in MIDDLE.items():
        name = name.replace(ours, theirs)
    name = name.replace("encoder.conv_blocks", "encoder.down").replace("decoder.conv_blocks", "decoder.up")
    return name.replace(".res.", ".block.")


def models() -> tuple[VqModel, JanusVQVAE]:
    """One set of random weights, a codebook of unlike lengths, in both implementations."""
    torch.manual_seed(3)
    ours = VqModel(CONFIG).eval()
    nn.init.normal_(ours.quantize.embedding.weight)
    theirs = JanusVQVAE(
        JanusVQVAEConfig(
            embed_dim=8,
            num_embeddings=200,
            latent_channels=64,
            base_channels=32,
            channel_multiplier=[1, 2, 4],
            num_res_blocks=2,
            num_patches=8,
        )
    ).eval()
    copy_weights(ours, theirs)
    return ours, theirs


def copy_weights(ours: VqModel, theirs: JanusVQVAE) -> None:
    """Give transformers' model our weights; every tensor on either side must be met exactly once."""
    theirs.load_state_dict({transformers_name(name): value for name, value in ours.state_dict().items()}, strict=True)


def their_ids(theirs: JanusVQVAE, pixels: Tensor) -> Tensor:
    """Ids [b, g * g] by transformers."""
    return theirs.encode(pixels).image_tokens.view(pixels.shape[0], -1)


@torch.no_grad()
def test_decoding_is_equal() -> None:
    ours, theirs = models()
    ids = torch.randint(200, (4, 64))
    decoded = ours.double().decode(ids)
    assert decoded.dtype == torch.float64
    torch.testing.assert_close(decoded, theirs.double().decode(ids), rtol=0, atol=1e-12)


@torch.no_grad()
def test_encoding_is_equal_once_codes_have_unit_length() -> None:
    ours, theirs = models()
    pixels = torch.rand(6, 3, 32, 32) * 2 - 1
    ids = ours.encode(pixels)
    assert (their_ids(theirs, pixels) != ids).float().mean() > 0.1, "raw codes are known to disagree"
    ours.quantize.embedding.weight.copy_(F.normalize(ours.quantize.embedding.weight, dim=-1))
    copy_weights(ours, theirs)
    assert torch.equal(ours.encode(pixels), ids), "scaling rows must not change our ids"
    assert torch.equal(their_ids(theirs, pixels), ids)


@torch.no_grad()
@pytest.mark.parametrize(
    "broken", ["mid.block_1.conv1.weight", "down.2.attn.1.q.weight", "down.0.downsample.conv.bias"]
)
def test_a_single_foreign_weight_is_noticed(broken: str) -> None:
    ours, theirs = models()
    pixels = torch.rand(6, 3, 32, 32) * 2 - 1
    before = theirs.encoder(pixels)
    torch.testing.assert_close(ours.encoder(pixels), before, rtol=0, atol=1e-5)
    theirs.state_dict()[f"encoder.{broken}"].add_(0.05)
    assert (theirs.encoder(pixels) - before).abs().max() > 1e-4
