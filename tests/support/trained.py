"""A tiny Janus checkpoint with random weights and a real text tokenizer, for tests of export and inference.

Weights are larger than an initialisation and norms are not ones, so that swapped, transposed or forgotten tensors
show in the logits.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.spec import DataSpec, Template
from data_pipeline.text.load import load_text_tokenizer
from data_pipeline.text.train import train_sentencepiece
from janus_mega.checkpoint.hf.names import HF_ROWS, IMAGE_TOKENIZER_PREFIX
from janus_mega.checkpoint.manager import save_checkpoint
from janus_mega.checkpoint.name_map import convert, plan_import
from janus_mega.checkpoint.state import TrainState
from janus_mega.checkpoint.trained import companion_files, heads_of
from janus_mega.config import derive
from janus_mega.config.load import dump
from janus_mega.config.schema import (
    BackboneConfig,
    EncoderConfig,
    ImageTokenizerConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    StageConfig,
)
from janus_mega.models.vision.image_tokenizer import build_vq, save_image_tokenizer
from janus_mega.models.vision.vq import VqModel
from janus_mega.parallel.slices import Slice

VOCAB_SIZE = 512
TEXT = """A small picture shows a red square beside a blue circle, and below it the number three.
The quick brown fox jumps over the lazy dog while seven wizards quietly judge my vow of 1234567890.
    indented = [line for line in text.split("\\n") if line]   # code, with   runs of spaces
--------====== What do you see? I see the digit 7. Draw a nine, please; then draw an eight!
"""

MODEL = ModelConfig(
    name="test",
    backbone=BackboneConfig(
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        ffn_hidden_size=48,
        vocab_size=VOCAB_SIZE + 8,
        max_position_embeddings=256,
        rope_theta=5000.0,
        norm_eps=1e-5,
    ),
    understanding=EncoderConfig(image_size=16, patch_size=4, hidden_size=24, num_layers=2, num_heads=2, mlp_ratio=2.0),
    image_tokenizer=ImageTokenizerConfig(
        image_size=16, base_channels=32, channel_multiplier=[1, 1, 2], latent_channels=16, codebook_size=64, code_dim=6
    ),
)


def make_tokenizer(folder: Path) -> Path:
    """Trains a sentencepiece model on `TEXT`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.txt").write_text(TEXT)
    return train_sentencepiece([folder / "text.txt"], VOCAB_SIZE, folder / "tokenizer.model").path


def random_weights(model: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    """fp32 weights by our global names, the image tokenizer apart, with the shapes of transformers' classes."""
    from data_pipeline.dialogue import SpecialIds
    from janus_mega.checkpoint.hf.config import model_config
    from janus_mega.checkpoint.hf.model import expected_shapes

    plain = replace(model, backbone=replace(model.backbone, qk_norm=False))
    shapes = expected_shapes(model_config(plain, SpecialIds(1, 2, 3, 4, 5, 6)))
    generator = torch.Generator().manual_seed(seed)

    def fill(name: str) -> Tensor:
        values = torch.randn(shapes[name], generator=generator)
        if "norm" in name and name.endswith("weight"):
            return 1.0 + 0.2 * values
        return values * (0.1 if values.ndim < 2 else 2.0 / values[0].numel() ** 0.5)

    weights = dict(convert(plan_import(HF_ROWS, shapes), fill, heads_of(model)))
    return {name: tensor for name, tensor in weights.items() if not name.startswith(IMAGE_TOKENIZER_PREFIX)}


def make_image_tokenizer(model: ModelConfig, folder: Path, seed: int = 0) -> Path:
    """Writes a random image tokenizer."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in VqModel(model.image_tokenizer).state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    weights = {name: torch.randn(shape, generator=generator) * 0.15 for name, shape in shapes.items()}
    save_image_tokenizer(build_vq(model.image_tokenizer, weights), model.image_tokenizer, folder)
    return folder


def run_config(model: ModelConfig, template: Template, tokenizer: Path) -> RunConfig:
    """A run around a model."""
    return RunConfig(
        name="test",
        run_dir="runs/test",
        model=model,
        data=DataSpec(
            text_tokenizer=str(tokenizer), template=template, geometry=derive.image_geometry(model), seq_len=256
        ),
        optimizer=OptimizerConfig(lr=1e-3),
        stage=StageConfig(name="all", num_steps=1, global_batch_size=1),
    )


def make_checkpoint(
    folder: Path, model: ModelConfig = MODEL, template: Template = Template.deepseek, seed: int = 0
) -> Path:
    """Saves a tiny random checkpoint with all its companions under `folder`; returns the step directory."""
    tokenizer = make_tokenizer(folder / "tokenizer")
    assert load_text_tokenizer(tokenizer).vocab_size <= model.backbone.vocab_size
    image_tokenizer = make_image_tokenizer(model, folder / "image_tokenizer", seed)
    weights = random_weights(model, seed)
    state = TrainState(
        step=1, consumed_rows=1, plan_digest="none", config_text=dump(run_config(model, template, tokenizer))
    )
    return save_checkpoint(
        folder / "checkpoints",
        [Slice(name, tuple(tensor.shape), (0,) * tensor.ndim, tensor) for name, tensor in weights.items()],
        state,
        extra_files=companion_files(tokenizer, image_tokenizer),
    )
