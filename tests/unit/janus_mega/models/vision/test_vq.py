"""The VQ network: sizes of VQ-16, names of the published checkpoints, lookup by direction, straight-through, dtypes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from janus_mega.config.schema import ImageTokenizerConfig
from janus_mega.models.vision import vq
from janus_mega.models.vision.vq import Quantizer, VqModel, VqOutput

TINY = ImageTokenizerConfig(
    image_size=16,
    base_channels=32,
    channel_multiplier=[1, 1, 2],
    num_res_blocks=1,
    latent_channels=32,
    codebook_size=24,
)


def num_parameters(module: nn.Module) -> int:
    """Count scalars."""
    return sum(p.numel() for p in module.parameters())


def tiny_model() -> VqModel:
    """A tiny tokenizer with fixed weights and a codebook of unlike lengths."""
    torch.manual_seed(0)
    model = VqModel(TINY)
    nn.init.normal_(model.quantize.embedding.weight)
    return model


def floating_parts(out: VqOutput) -> list[torch.Tensor]:
    """All floating tensors of an output."""
    return [out.reconstruction, out.directions, out.codes]


@pytest.fixture(scope="module")
def vq16() -> VqModel:
    """The paper's tokenizer without memory behind it."""
    with torch.device("meta"):
        return VqModel(ImageTokenizerConfig())


def test_vq16_has_the_published_sizes(vq16: VqModel) -> None:
    assert num_parameters(vq16) == pytest.approx(71.88e6, abs=0.01e6)
    assert num_parameters(vq16.encoder) == pytest.approx(29.3e6, abs=0.05e6)
    assert num_parameters(vq16.decoder) == pytest.approx(42.4e6, abs=0.05e6)
    assert vq16.grid_size == 24


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("encoder.conv_in.weight", (128, 3, 3, 3)),
        ("encoder.conv_blocks.0.res.1.conv2.weight", (128, 128, 3, 3)),
        ("encoder.conv_blocks.2.res.0.nin_shortcut.weight", (256, 128, 1, 1)),
        ("encoder.conv_blocks.3.downsample.conv.weight", (256, 256, 3, 3)),
        ("encoder.conv_blocks.4.res.0.nin_shortcut.weight", (512, 256, 1, 1)),
        ("encoder.conv_blocks.4.attn.1.proj_out.bias", (512,)),
        ("encoder.mid.0.norm1.weight", (512,)),
        ("encoder.mid.1.q.weight", (512, 512, 1, 1)),
        ("encoder.mid.2.conv1.bias", (512,)),
        ("encoder.norm_out.weight", (512,)),
        ("encoder.conv_out.weight", (256, 512, 3, 3)),
        ("decoder.conv_in.weight", (512, 256, 3, 3)),
        ("decoder.conv_blocks.0.attn.2.norm.weight", (512,)),
        ("decoder.conv_blocks.1.res.0.nin_shortcut.weight", (256, 512, 1, 1)),
        ("decoder.conv_blocks.3.upsample.conv.weight", (128, 128, 3, 3)),
        ("decoder.conv_blocks.4.res.2.conv2.weight", (128, 128, 3, 3)),
        ("decoder.conv_out.weight", (3, 128, 3, 3)),
        ("quantize.embedding.weight", (16384, 8)),
        ("quant_conv.weight", (8, 256, 1, 1)),
        ("post_quant_conv.weight", (256, 8, 1, 1)),
    ],
)
def test_vq16_has_the_published_names(vq16: VqModel, name: str, shape: tuple[int, ...]) -> None:
    assert tuple(vq16.state_dict()[name].shape) == shape


def test_nothing_hangs_where_the_published_network_has_nothing(vq16: VqModel) -> None:
    names = set(vq16.state_dict())
    absent = ("encoder.conv_blocks.3.attn", "encoder.conv_blocks.4.downsample", "decoder.conv_blocks.4.upsample")
    assert not [name for name in names if name.startswith((*absent, "decoder.conv_blocks.1.attn"))]
    assert not list(vq16.buffers())


def test_lookup_compares_directions_not_lengths() -> None:
    quantizer = Quantizer(3, 2)
    with torch.no_grad():
        quantizer.embedding.weight.copy_(torch.tensor([[100.0, 0.0], [0.01, 0.01], [0.0, 3.0]]))
    features = F.normalize(torch.tensor([[1.0, 0.9], [1.0, 0.1], [-0.2, 1.0]]), dim=-1)
    assert quantizer.lookup(features).tolist() == [1, 0, 2]
    torch.testing.assert_close(quantizer.codes(torch.tensor([[0, 1]])).norm(dim=-1), torch.ones(1, 2))


def test_lookup_in_parts_is_the_lookup_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer = Quantizer(50, 4)
    features = F.normalize(torch.randn(23, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    whole = quantizer.lookup(features)
    monkeypatch.setattr(vq, "LOOKUP_ROWS", 5)
    assert torch.equal(quantizer.lookup(features), whole)


def test_encode_then_decode_is_the_forward_pass() -> None:
    model = tiny_model().eval()
    pixels = torch.rand(3, 3, 16, 16) * 2 - 1
    out = model(pixels)
    assert out.ids.shape == (3, 16) and out.reconstruction.shape == pixels.shape
    assert torch.equal(model.encode(pixels), out.ids)
    torch.testing.assert_close(model.decode(out.ids), out.reconstruction, rtol=0, atol=1e-5)


def test_ids_are_in_raster_order() -> None:
    model = tiny_model().eval()
    ids = torch.zeros(1, 16, dtype=torch.int64)
    changed = ids.clone()
    changed[0, 3] = 5  # first row, last column of the grid
    difference = (model.decode(changed) - model.decode(ids)).abs().sum(dim=(0, 1))  # [16, 16]
    quadrants = difference.view(2, 8, 2, 8).sum(dim=(1, 3))
    assert quadrants.argmax() == 1, "the change belongs to the upper right"


def test_the_gradient_passes_the_codebook_as_the_identity() -> None:
    model = tiny_model().double()
    out = model(torch.rand(2, 3, 16, 16))
    out.directions.retain_grad()
    out.reconstruction.square().mean().backward()
    assert model.quantize.embedding.weight.grad is None, "the reconstruction must not move the codes"
    assert model.encoder.conv_in.weight.grad.abs().sum() > 0
    codes = out.codes.detach().requires_grad_()
    model._decode_codes(codes).square().mean().backward()
    torch.testing.assert_close(out.directions.grad, codes.grad, rtol=1e-9, atol=1e-14)


def test_codes_carry_a_gradient_to_the_codebook_only_where_used() -> None:
    model = tiny_model()
    out = model(torch.rand(2, 3, 16, 16))
    (out.codes - out.directions.detach()).square().sum().backward()
    moved = model.quantize.embedding.weight.grad.abs().sum(dim=1) > 0
    assert set(moved.nonzero().flatten().tolist()) == set(out.ids.unique().tolist())


def test_the_dtype_of_the_weights_is_kept_and_lookup_never_narrows_below_fp32() -> None:
    model = tiny_model().to(torch.bfloat16)
    out = model(torch.rand(2, 3, 16, 16))
    assert out.reconstruction.dtype == torch.bfloat16
    assert out.directions.dtype == out.codes.dtype == torch.float32
    assert model.decode(out.ids).dtype == torch.bfloat16
    assert {part.dtype for part in floating_parts(tiny_model().double()(torch.rand(2, 3, 16, 16)))} == {torch.float64}
