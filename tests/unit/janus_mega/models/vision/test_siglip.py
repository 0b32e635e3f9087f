"""The understanding encoder equals transformers' JanusVisionModel, by name and by value, and survives a meta build."""

import pytest
import torch
from transformers.models.janus.configuration_janus import JanusVisionConfig
from transformers.models.janus.modeling_janus import JanusVisionModel

from data_pipeline.errors import UserError
from janus_mega.config.schema import EncoderConfig
from janus_mega.models.vision.registry import build_encoder
from janus_mega.models.vision.siglip import normalize_pixels

TINY = EncoderConfig(image_size=16, patch_size=4, hidden_size=32, num_layers=2, num_heads=4, mlp_ratio=2.5)


def reference_model() -> JanusVisionModel:
    """Build transformers' own encoder at the sizes of TINY."""
    config = JanusVisionConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=4,
        mlp_ratio=2.5,
        num_image_tokens=16,
    )
    return JanusVisionModel(config).eval()


def test_names_and_values_are_those_of_transformers() -> None:
    torch.manual_seed(0)
    theirs, ours = reference_model(), build_encoder(TINY)
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}
    ours.load_state_dict(theirs.state_dict(), strict=True)
    pixels = torch.rand(3, 3, 16, 16) * 2 - 1
    features = ours(pixels)
    assert features.shape == (3, ours.num_tokens, ours.hidden_size) == (3, 16, 32)
    torch.testing.assert_close(features, theirs(pixels).last_hidden_state, rtol=0, atol=1e-6)


def test_order_of_patches_is_raster() -> None:
    encoder = build_encoder(TINY)
    pixels = torch.zeros(1, 3, 16, 16)
    pixels[0, :, 0:4, 4:8] = 1.0  # second patch of the first row
    patches = encoder.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)[0]
    assert [i for i in range(16) if not torch.equal(patches[i], patches[15])] == [1]


def test_a_meta_build_materialises_to_the_same_encoder() -> None:
    torch.manual_seed(0)
    real = build_encoder(TINY)
    with torch.device("meta"):
        meta = build_encoder(TINY)
    assert all(p.is_meta for p in meta.parameters())
    assert not list(real.buffers()), "a buffer would be left unfilled after to_empty"
    meta.to_empty(device="cpu").load_state_dict(real.state_dict())
    pixels = torch.rand(2, 3, 16, 16)
    assert torch.equal(meta(pixels), real(pixels))


def test_every_parameter_gets_a_gradient_and_bf16_stays_bf16() -> None:
    encoder = build_encoder(TINY)
    encoder(torch.rand(2, 3, 16, 16)).pow(3).sum().backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for n, p in encoder.named_parameters() if "k_proj.bias" not in n
    )
    assert encoder.to(torch.bfloat16)(torch.rand(2, 3, 16, 16)).dtype == torch.bfloat16


def test_every_module_with_parameters_runs_once() -> None:
    encoder, calls = build_encoder(TINY), {}
    for name, module in encoder.named_modules():
        if list(module.parameters(recurse=False)):
            module.register_forward_hook(lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1}))
    encoder(torch.rand(1, 3, 16, 16))
    owners = {n.rpartition(".")[0] for n, _ in encoder.named_parameters()}
    assert calls == dict.fromkeys(owners, 1)
    assert encoder.encoder.layers[0].self_attn.config._attn_implementation == "sdpa"


def test_siglip_large_has_the_papers_parameters() -> None:
    with torch.device("meta"):
        encoder = build_encoder(EncoderConfig())
    assert encoder.num_tokens == 576
    assert sum(p.numel() for p in encoder.parameters()) == pytest.approx(303.7e6, abs=0.1e6)


def test_pixels_are_mapped_to_minus_one_and_one() -> None:
    pixels = torch.tensor([0, 127, 255], dtype=torch.uint8)
    torch.testing.assert_close(normalize_pixels(pixels), torch.tensor([-1.0, -1 / 255, 1.0]))
    assert normalize_pixels(pixels, torch.bfloat16).dtype == torch.bfloat16


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"siglop.*siglip"):
        build_encoder(EncoderConfig(name="siglop"))
