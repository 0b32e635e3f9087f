"""A tiny random Janus, loaded once."""

import pytest

from janus_mega.infer.model import InferenceModel, load_trained
from tests.support.trained import make_checkpoint


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> InferenceModel:
    return load_trained(make_checkpoint(tmp_path_factory.mktemp("inference")))
