"""Tokenizers and configuration come out of a checkpoint as the very bytes that its manifest vouches for."""

import shutil
from pathlib import Path

import pytest

from data_pipeline.errors import UserError
from janus_mega.checkpoint import trained
from janus_mega.checkpoint.format import CONFIG_FILE, IMAGE_TOKENIZER_DIR, TEXT_TOKENIZER_DIR
from janus_mega.checkpoint.manager import save_checkpoint
from janus_mega.checkpoint.state import TrainState
from janus_mega.checkpoint.trained import open_trained


@pytest.fixture
def copied(checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(checkpoint, tmp_path / checkpoint.name)


def test_a_text_tokenizer_that_changes_after_it_was_verified_is_refused(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = trained.load_text_tokenizer

    def changed_first(path: Path) -> object:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        return load(path)

    assert open_trained(copied).text_tokenizer.path.parent.name == TEXT_TOKENIZER_DIR
    monkeypatch.setattr(trained, "load_text_tokenizer", changed_first)
    with pytest.raises(UserError, match="use an older one|not a sentencepiece model"):
        _ = open_trained(copied).text_tokenizer


def test_an_image_tokenizer_that_vouches_for_itself_alone_is_refused(copied: Path) -> None:
    opened = open_trained(copied)
    assert opened.image_tokenizer is not None
    config = copied / IMAGE_TOKENIZER_DIR / "config.json"
    config.write_bytes(config.read_bytes() + b" ")  # still names the right digest of the weights
    with pytest.raises(UserError, match="sha256 differs"):
        _ = open_trained(copied).image_tokenizer


def test_a_configuration_that_this_version_does_not_know_is_named_by_its_own_path(copied: Path) -> None:
    config = copied / CONFIG_FILE
    config.write_bytes(config.read_bytes() + b"\n")
    with pytest.raises(UserError, match=r"config\.yaml: .*damaged"):
        open_trained(copied)
    with pytest.raises(UserError, match="step-00000001/config.yaml.*unknown key 'surprise'"):
        with_surprise(copied)


def with_surprise(directory: Path) -> None:
    """Opens a checkpoint whose configuration has a field too many, saved as such."""
    text = (directory / CONFIG_FILE).read_text() + "surprise: 1\n"
    state = TrainState(step=1, consumed_rows=1, plan_digest="", config_text=text)
    open_trained(save_checkpoint(directory.parent / "strange", [], state))
