"""One tokenizer and one raw directory for all tests of the data side."""

from pathlib import Path

import pytest

from data_pipeline.spec import ImageGeometry
from data_pipeline.text.interface import TextTokenizer
from tests.support.raw import train_tokenizer

GEOMETRY = ImageGeometry(
    understanding_size=16, understanding_tokens=16, generation_size=16, generation_tokens=16, codebook_size=64
)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    """A small sentencepiece tokenizer."""
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tokenizer_path(tokenizer: TextTokenizer) -> Path:
    """Its file."""
    return tokenizer.path


@pytest.fixture
def geometry() -> ImageGeometry:
    """16 x 16 pictures of 16 tokens in either pathway."""
    return GEOMETRY
