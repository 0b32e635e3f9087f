"""The frozen tokenizer: numpy in and out, its directory, its digest, and what it refuses."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from data_pipeline.errors import UserError
from janus_mega.config.schema import ImageTokenizerConfig
from janus_mega.models.vision.image_tokenizer import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    FrozenImageTokenizer,
    build_vq,
    load_image_tokenizer,
    save_image_tokenizer,
    tokenizer_digest,
)
from janus_mega.models.vision.vq import VqModel

TINY = ImageTokenizerConfig(
    image_size=8,
    base_channels=32,
    channel_multiplier=[1, 1, 1],
    num_res_blocks=1,
    latent_channels=32,
    codebook_size=300,
)


def tiny_model() -> VqModel:
    """Random weights, codes of unlike lengths."""
    torch.manual_seed(0)
    model = VqModel(TINY)
    nn.init.normal_(model.quantize.embedding.weight, std=3.0)
    return model


def pictures(count: int) -> np.ndarray:
    """Noise, uint8 [count, 3, 8, 8]."""
    return np.random.default_rng(0).integers(0, 256, (count, 3, 8, 8), dtype=np.uint8)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A directory with the tiny tokenizer."""
    save_image_tokenizer(tiny_model(), TINY, tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_encode_and_decode_are_the_models_own(saved: Path) -> None:
    tokenizer, model = load_image_tokenizer(saved), tiny_model().eval()
    images = pictures(3)
    ids = tokenizer.encode(images)
    assert (ids.dtype, ids.shape) == (np.uint16, (3, 4)) == (np.uint16, (3, tokenizer.num_tokens))
    pixels = torch.from_numpy(images).float() / 127.5 - 1
    with torch.no_grad():
        assert np.array_equal(ids, model.encode(pixels).numpy())
        decoded = model.decode(torch.from_numpy(ids.astype(np.int64)))
    expected = ((decoded + 1) / 2 * 255).clamp(0, 255)
    found = tokenizer.decode(ids)
    assert (found.dtype, found.shape) == (np.uint8, images.shape)
    assert np.abs(found - expected.numpy()).max() <= 0.5 + 1e-3
    assert (tokenizer.image_size, tokenizer.codebook_size) == (8, 300)


def test_batches_join_to_the_whole(saved: Path) -> None:
    images = pictures(7)
    ids = load_image_tokenizer(saved, batch_size=3).encode(images)
    assert np.array_equal(ids, load_image_tokenizer(saved, batch_size=64).encode(images))
    assert np.array_equal(ids[4:5], load_image_tokenizer(saved).encode(images[4:5]))
    assert load_image_tokenizer(saved).decode(ids[:0]).shape == (0, 3, 8, 8)
    assert load_image_tokenizer(saved).encode(images[:0]).shape == (0, 4)


def test_codes_are_stored_at_unit_length_and_saving_again_changes_nothing(saved: Path, tmp_path: Path) -> None:
    codebook = load_file(saved / WEIGHTS_FILE)["quantize.embedding.weight"]
    torch.testing.assert_close(codebook.norm(dim=-1), torch.ones(300))
    tokenizer = load_image_tokenizer(saved)
    save_image_tokenizer(tokenizer.model, TINY, tmp_path / "again")
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        assert (saved / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert FrozenImageTokenizer(tiny_model(), TINY).digest == tokenizer.digest


def test_the_digest_sees_every_weight_and_the_picture_size_and_nothing_else() -> None:
    weights = tiny_model().state_dict()
    digest = tokenizer_digest(weights, 8)
    assert len(digest) == 64
    assert tokenizer_digest(dict(reversed(weights.items())), 8) == digest, "order of names must not matter"
    assert tokenizer_digest({name: value.clone() for name, value in weights.items()}, 16) != digest
    for name in ("quantize.embedding.weight", "encoder.mid.1.q.weight", "decoder.norm_out.bias"):
        changed = {other: value.clone() for other, value in weights.items()}
        changed[name].view(-1)[-1] += 1e-3
        assert tokenizer_digest(changed, 8) != digest, name


def test_it_is_frozen_and_in_fp32() -> None:
    tokenizer = FrozenImageTokenizer(tiny_model().to(torch.bfloat16), TINY)
    assert not tokenizer.model.training
    assert {(p.dtype, p.requires_grad) for p in tokenizer.model.parameters()} == {(torch.float32, False)}


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (np.zeros((2, 3, 8, 9), np.uint8), r"\(2, 3, 8, 9\).*\[n, 3, 8, 8\]"),
        (np.zeros((2, 3, 8, 8), np.float32), "float32.*uint8"),
        (np.zeros((3, 8, 8), np.uint8), r"\(3, 8, 8\)"),
    ],
)
def test_other_pictures_are_refused(images: np.ndarray, words: str) -> None:
    with pytest.raises(UserError, match=words):
        FrozenImageTokenizer(tiny_model(), TINY).encode(images)


@pytest.mark.parametrize(
    ("ids", "words"), [(np.full((1, 4), 300), "300.*300 codes"), (np.zeros((1, 5), np.int64), "4 ids")]
)
def test_other_ids_are_refused(ids: np.ndarray, words: str) -> None:
    with pytest.raises(UserError, match=words):
        FrozenImageTokenizer(tiny_model(), TINY).decode(ids)


def rewrite_config(path: Path, **changes: object) -> None:
    """Change top-level entries of a directory's config.json."""
    content = json.loads((path / CONFIG_FILE).read_text())
    (path / CONFIG_FILE).write_text(json.dumps(content | changes))


def test_a_half_written_or_mixed_directory_is_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json is missing"):
        load_image_tokenizer(tmp_path / "nowhere")
    weights = load_file(saved / WEIGHTS_FILE)
    weights["quant_conv.bias"] += 1
    save_file(weights, saved / WEIGHTS_FILE)
    with pytest.raises(UserError, match="sha256"):
        load_image_tokenizer(saved)
    (saved / WEIGHTS_FILE).unlink()
    with pytest.raises(UserError, match=r"model\.safetensors is missing"):
        load_image_tokenizer(saved)


def test_another_format_or_field_is_refused(saved: Path) -> None:
    rewrite_config(saved, format="janus-image-tokenizer/2")
    with pytest.raises(UserError, match="janus-image-tokenizer/2"):
        load_image_tokenizer(saved)
    rewrite_config(saved, format="janus-image-tokenizer/1", image_tokenizer={"image_side": 8})
    with pytest.raises(UserError, match="image_side"):
        load_image_tokenizer(saved)
    (saved / CONFIG_FILE).write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        load_image_tokenizer(saved)


def test_weights_that_do_not_fit_are_refused_by_name() -> None:
    weights = tiny_model().state_dict()
    with pytest.raises(UserError, match=r"decoder\.conv_blocks\.0\.attn\.2\.k\.bias is missing"):
        build_vq(dataclasses.replace(TINY, num_res_blocks=2), weights)
    with pytest.raises(UserError, match=r"quantize\.embedding\.weight has shape \(300, 8\).*\(301, 8\)"):
        build_vq(dataclasses.replace(TINY, codebook_size=301), weights)
    with pytest.raises(UserError, match="image_size 9"):
        build_vq(dataclasses.replace(TINY, image_size=9), weights)
