"""Options of how a step is computed: what each cannot be combined with, all said at once."""

from pathlib import Path

import pytest

from data_pipeline.errors import UserError
from janus_mega.config.load import load_config
from janus_mega.config.schema import RunConfig, TokenizerRunConfig
from janus_mega.config.validate import run_problems, tokenizer_run_problems, validate_run

HEAD_ONLY = "stage.trainable=[image_head]"
WHOLE = "stage.trainable=[backbone,understanding_encoder,text_head]"


def config(*overrides: str) -> RunConfig:
    return load_config(RunConfig, "run/tiny_cpu.yaml", overrides).config


@pytest.mark.parametrize(
    ("overrides", "world_size"),
    [
        (["parallel.compile=true", "parallel.check_calls=true", "parallel.tp_size=2", "parallel.pp_size=2"], 4),
        ([HEAD_ONLY, "parallel.encode_ahead=64", "parallel.zero_stage=2"], 2),
        ([WHOLE, "logging.task_gradients_every=100", "parallel.tp_size=2", "parallel.zero_stage=2"], 2),
        (["loss.z_loss=1e-4"], 1),
    ],
)
def test_what_works_together_is_accepted(overrides: list[str], world_size: int) -> None:
    assert list(run_problems(config(*overrides), world_size)) == []


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["parallel.compile=true", "parallel.zero_stage=2"], ["compile", "zero_stage 2"]),
        (["parallel.compile=true", "parallel.zero_stage=3"], ["compile", "zero_stage 3"]),
        ([WHOLE, "parallel.encode_ahead=64"], ["encode_ahead 64", "understanding_encoder"]),
        ([HEAD_ONLY, "parallel.encode_ahead=64", "parallel.zero_stage=3"], ["encode_ahead 64", "zero_stage 3"]),
        (["parallel.encode_ahead=-1"], ["encode_ahead -1"]),
        ([WHOLE, "logging.task_gradients_every=5", "parallel.pp_size=2"], ["task_gradients_every 5", "pp_size 2"]),
        ([WHOLE, "logging.task_gradients_every=5", "parallel.zero_stage=3"], ["gradients_every 5", "zero_stage 3"]),
        ([HEAD_ONLY, "logging.task_gradients_every=5"], ["task_gradients_every 5", "backbone"]),
        (["logging.task_gradients_every=-5"], ["task_gradients_every -5"]),
        (["loss.z_loss=-1.0"], ["loss.z_loss -1.0"]),
    ],
)
def test_what_does_not_is_refused_with_its_knob(overrides: list[str], words: list[str]) -> None:
    (message,) = run_problems(config(*overrides), world_size=2)
    assert all(word in message for word in words), message


def test_everything_is_said_at_once() -> None:
    broken = [
        HEAD_ONLY,
        "logging.task_gradients_every=1",
        "parallel.compile=true",
        "parallel.encode_ahead=1",
        "parallel.zero_stage=3",
        "loss.z_loss=-1.0",
    ]
    with pytest.raises(UserError) as caught:
        validate_run(config(*broken))
    for knob in ("parallel.compile", "parallel.encode_ahead 1", "task_gradients_every 1: the backbone", "loss.z_loss"):
        assert knob in str(caught.value)


@pytest.mark.parametrize("option", ["compile=true", "encode_ahead=1", "check_calls=true"])
def test_image_tokenizers_have_none_of_it(option: str, tmp_path: Path) -> None:
    path = tmp_path / "vq.yaml"
    path.write_text(
        "name: vq\nrun_dir: vq\ndata: {path: raw}\noptimizer: {lr: 1e-3}\nnum_steps: 5\nglobal_batch_size: 8\n"
        "image_tokenizer: {image_size: 16, base_channels: 32, channel_multiplier: [1, 2, 2], codebook_size: 256}\n"
    )
    loaded = load_config(TokenizerRunConfig, path, [f"parallel.{option}"]).config
    (message,) = tokenizer_run_problems(loaded, 1)
    assert option.split("=")[0] in message
