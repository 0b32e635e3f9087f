"""The image tokenizer's chunk: sums over pictures that add up, formulas of the losses, layout-free fresh weights."""

import pytest
import torch
import torch.nn.functional as F

from janus_mega.config.load import load_config
from janus_mega.config.schema import ImageTokenizerConfig, ParallelConfig, Precision, RunConfig, TokenizerRunConfig
from janus_mega.models.vision.vq import VqModel
from janus_mega.models.vision.vq_training import MODULE, TASKS, VqChunk, build_vq_chunk, fresh_weights

TINY = ImageTokenizerConfig(
    image_size=8,
    base_channels=32,
    channel_multiplier=[1, 1],
    num_res_blocks=1,
    latent_channels=32,
    codebook_size=20,
    commitment_weight=0.5,
)
FP32 = ParallelConfig(precision=Precision.fp32)


def tiny_chunk() -> VqChunk:
    """A chunk with the fresh weights of seed 0."""
    chunk = build_vq_chunk(TINY, FP32).to_empty(device="cpu")
    chunk.image_tokenizer.load_state_dict(fresh_weights(TINY, seed=0))
    return chunk


def pictures(count: int) -> torch.Tensor:
    """Noise, uint8 [count, 3, 8, 8]."""
    return torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_losses_follow_their_formulas() -> None:
    chunk, images = tiny_chunk(), pictures(5)
    sums = chunk({"pixel_values": images})
    assert (sums.dtype, sums.shape) == (torch.float32, (len(TASKS),))
    pixels = images.float() / 127.5 - 1
    out = chunk.image_tokenizer(pixels)
    torch.testing.assert_close(sums[0] / 5, F.mse_loss(out.reconstruction, pixels))
    torch.testing.assert_close(sums[1] / 5, 1.5 * F.mse_loss(out.codes, out.directions))


def test_sums_of_micro_batches_add_up_to_the_batch() -> None:
    chunk, images = tiny_chunk(), pictures(6)
    parts = sum(chunk({"pixel_values": part}) for part in images.split([1, 3, 2]))
    torch.testing.assert_close(parts, chunk({"pixel_values": images}))


def test_each_term_moves_what_it_should() -> None:
    chunk = tiny_chunk()
    model = chunk.image_tokenizer
    reconstruction, codebook = chunk({"pixel_values": pictures(3)})
    reconstruction.backward(retain_graph=True)
    assert not model.quantize.embedding.weight.grad.any(), "codes move by the codebook's loss alone"
    assert model.encoder.conv_in.weight.grad.any() and model.decoder.conv_out.weight.grad.any()
    model.zero_grad(set_to_none=False)
    codebook.backward()
    assert not model.decoder.conv_out.weight.grad.any()
    assert model.quantize.embedding.weight.grad.any() and model.encoder.conv_in.weight.grad.any()


def test_the_commitment_weight_scales_the_pull_on_the_encoder_alone() -> None:
    def gradients(weight: float) -> tuple[torch.Tensor, torch.Tensor]:
        chunk = tiny_chunk()
        chunk.commitment_weight = weight
        chunk({"pixel_values": pictures(3)})[1].backward()
        model = chunk.image_tokenizer
        return model.encoder.conv_out.weight.grad, model.quantize.embedding.weight.grad

    half, whole = gradients(0.5), gradients(1.0)
    torch.testing.assert_close(whole[0], 2 * half[0])
    torch.testing.assert_close(whole[1], half[1])


@pytest.mark.parametrize(("precision", "dtype"), [(Precision.fp32, torch.float32), (Precision.bf16, torch.bfloat16)])
def test_the_chunk_is_built_on_the_meta_device_in_the_precision_of_the_run(
    precision: Precision, dtype: torch.dtype
) -> None:
    chunk = build_vq_chunk(TINY, ParallelConfig(precision=precision))
    assert {(p.is_meta, p.dtype) for p in chunk.parameters()} == {(True, dtype)}
    assert chunk.config.params_dtype == dtype
    names = {name for name, _ in chunk.named_parameters()}
    assert names == {f"{MODULE}.{name}" for name in VqModel(TINY).state_dict()}


def test_bf16_losses_are_summed_in_fp32() -> None:
    chunk = tiny_chunk().to(torch.bfloat16)
    exact = tiny_chunk()({"pixel_values": pictures(4)})
    sums = chunk({"pixel_values": pictures(4)})
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums[0], exact[0], rtol=0.05, atol=0)


def test_fresh_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(123)
    before = torch.get_rng_state()
    weights = fresh_weights(TINY, seed=4)
    assert torch.equal(torch.get_rng_state(), before), "the caller's generator must not move"
    torch.manual_seed(9)
    again, other = fresh_weights(TINY, seed=4), fresh_weights(TINY, seed=5)
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert not torch.equal(weights["encoder.conv_in.weight"], other["encoder.conv_in.weight"])


def test_the_demo_trains_the_tokenizer_that_its_model_draws_with() -> None:
    tokenizer = load_config(TokenizerRunConfig, "demo/image_tokenizer.yaml").config
    stage = load_config(RunConfig, "demo/stage1.yaml").config
    assert tokenizer.image_tokenizer == stage.model.image_tokenizer
