"""The image tokenizer under the real loop: equal to a plain AdamW loop on any number of ranks, and after a restart."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from data_pipeline.errors import UserError
from janus_mega.checkpoint.reader import open_checkpoint
from janus_mega.config.schema import (
    CheckpointConfig,
    ImageTokenizerConfig,
    OptimizerConfig,
    ParallelConfig,
    Precision,
    TokenizerDataConfig,
    TokenizerRunConfig,
)
from janus_mega.models.vision.image_tokenizer import load_image_tokenizer
from janus_mega.models.vision.vq import VqModel
from janus_mega.models.vision.vq_training import MODULE, fresh_weights, loss_sums
from janus_mega.train.image_tokenizer import ImageTokenizerWorkload, train_image_tokenizer
from tests.support.ranks import import_what_ranks_need, results_of_ranks

pytestmark = pytest.mark.dist
import_what_ranks_need()

NUM_PICTURES, NUM_STEPS, BATCH = 10, 4, 8
EPS = 1e-5
"""Large enough that a bias before a norm, whose true gradient is zero, is not moved by rounding."""
WEIGHT_BAR = 4e-6
"""Measured worst difference of a weight after NUM_STEPS steps: 4e-7."""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TokenizerRunConfig:
    """A tiny tokenizer over ten noisy pictures."""
    raw = tmp_path_factory.mktemp("raw")
    noise = np.random.default_rng(0).integers(0, 256, (NUM_PICTURES, 8, 8, 3), dtype=np.uint8)
    for number, picture in enumerate(noise):
        Image.fromarray(picture).save(raw / f"{number}.png")
    lines = [json.dumps({"id": str(i), "image": f"{i}.png", "caption": ""}) for i in range(NUM_PICTURES)]
    (raw / "captions.jsonl").write_text("\n".join(lines))
    return TokenizerRunConfig(
        name="tiny",
        run_dir="",
        seed=5,
        image_tokenizer=ImageTokenizerConfig(
            image_size=8,
            base_channels=32,
            channel_multiplier=[1, 1],
            num_res_blocks=1,
            latent_channels=32,
            codebook_size=20,
        ),
        data=TokenizerDataConfig(path=str(raw / "captions.jsonl"), seed=1),
        parallel=ParallelConfig(precision=Precision.fp32, micro_batch_size=2),
        optimizer=OptimizerConfig(lr=1e-3, warmup_steps=2, weight_decay=0.1, eps=EPS),
        num_steps=NUM_STEPS,
        global_batch_size=BATCH,
        checkpoint=CheckpointConfig(save_every=2),
    )


def train(config: TokenizerRunConfig, run_dir: Path, world_size: int) -> Path:
    """Train in forked ranks; the frozen tokenizer's directory."""
    config = replace(config, run_dir=str(run_dir))
    return Path(results_of_ranks(lambda: str(train_image_tokenizer(config)), world_size)[0])


def trained_weights(run_dir: Path, step: int = NUM_STEPS) -> dict[str, Tensor]:
    """Weights of the checkpoint at `step`."""
    (path,) = (run_dir / "checkpoints").glob(f"step-*{step}")
    reader = open_checkpoint(path)
    return {name.removeprefix(f"{MODULE}."): reader.read(name) for name in reader.weight_names}


@pytest.fixture(scope="module")
def plain_weights(config: TokenizerRunConfig) -> dict[str, Tensor]:
    """The same training as a plain loop: one process, whole batches, torch's AdamW and clipping."""
    model = VqModel(config.image_tokenizer)
    model.load_state_dict(fresh_weights(config.image_tokenizer, config.seed))
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=EPS)
    workload = ImageTokenizerWorkload(config)
    for step, batches in enumerate(workload.batches(0, 1, 0, NUM_STEPS)):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 2)
        pixels = torch.cat([batch["pixel_values"] for batch in batches]).float() / 127.5 - 1
        assert len(pixels) == BATCH
        optimizer.zero_grad()
        loss_sums(pixels, model(pixels), 0.25).sum().div(BATCH).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return {name: value.detach() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("world_size", [1, 2])
def test_training_equals_a_plain_loop(
    config: TokenizerRunConfig, plain_weights: dict[str, Tensor], tmp_path: Path, world_size: int, record_property
) -> None:
    train(config, tmp_path, world_size)
    weights = trained_weights(tmp_path)
    assert weights.keys() == plain_weights.keys()
    worst = max(float((weights[name] - plain_weights[name]).abs().max()) for name in weights)
    record_property("worst", worst)
    assert worst <= WEIGHT_BAR
    fresh = fresh_weights(config.image_tokenizer, config.seed)
    moved = {name: float((weights[name] - fresh[name]).abs().max()) for name in weights if weights[name].ndim > 1}
    assert min(moved.values()) > 10 * WEIGHT_BAR


def test_a_restart_continues_bit_for_bit_and_writes_the_same_tokenizer(
    config: TokenizerRunConfig, tmp_path: Path
) -> None:
    first = load_image_tokenizer(train(config, tmp_path, 1))
    expected = trained_weights(tmp_path)
    (last,) = (tmp_path / "checkpoints").glob(f"step-*{NUM_STEPS}")
    shutil.rmtree(last)
    again = load_image_tokenizer(train(config, tmp_path, 1))
    weights = trained_weights(tmp_path)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert again.digest == first.digest
    image = np.zeros((1, 3, 8, 8), np.uint8)
    assert again.decode(again.encode(image)).shape == image.shape


def test_a_finished_run_is_not_trained_again(config: TokenizerRunConfig, tmp_path: Path) -> None:
    path = train(config, tmp_path, 1)
    before = (tmp_path / "checkpoints").stat().st_mtime_ns
    shutil.rmtree(path)
    assert train(config, tmp_path, 1) == path
    assert (tmp_path / "checkpoints").stat().st_mtime_ns == before
    load_image_tokenizer(path)


def test_other_pictures_or_an_uncut_layout_are_refused(config: TokenizerRunConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="replicated"):
        train_image_tokenizer(replace(config, run_dir=str(tmp_path), parallel=ParallelConfig(tp_size=2)))
    with pytest.raises(UserError, match="zero_stage 3"):
        train_image_tokenizer(replace(config, run_dir=str(tmp_path), parallel=ParallelConfig(zero_stage=3)))
    missing = TokenizerDataConfig(path=str(tmp_path / "missing.jsonl"))
    with pytest.raises(UserError, match=r"missing\.jsonl"):
        train_image_tokenizer(replace(config, run_dir=str(tmp_path), data=missing))
