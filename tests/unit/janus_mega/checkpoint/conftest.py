"""A tiny random checkpoint and its export, made once."""

from pathlib import Path

import pytest

from janus_mega.checkpoint import finding
from janus_mega.checkpoint.hf.export import export_hf
from tests.support.trained import make_checkpoint


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be read is looked at again at once."""
    monkeypatch.setattr(finding, "_LOOK_AGAIN_S", (0.0, 0.0))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="session")
def export(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_hf(checkpoint, tmp_path_factory.mktemp("export") / "hf")
