"""A tiny random checkpoint and its export, made once."""

from pathlib import Path

import pytest

from janus_mega.checkpoint.hf.export import export_hf
from tests.support.trained import make_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="session")
def export(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_hf(checkpoint, tmp_path_factory.mktemp("export") / "hf")
