"""Sources of all three kinds, prepared as users do; a test that changes one copies it."""

import shutil

import pytest

from data_pipeline.manifest import open_source
from data_pipeline.prepare.interleaved import prepare_interleaved
from data_pipeline.prepare.options import PrepareOptions
from data_pipeline.prepare.t2i import prepare_t2i
from data_pipeline.prepare.text import prepare_text
from tests.support.raw import ColourTokenizer, write_raw


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, tokenizer):
    """Directories text, interleaved and t2i; read-only."""
    root = tmp_path_factory.mktemp("prepared")
    raw = write_raw(root / "raw")
    options = PrepareOptions(samples_per_shard=5, record_size=3)
    prepare_text([raw["text"]], root / "text", tokenizer, options=options)
    prepare_interleaved([raw["interleaved"]], root / "interleaved", tokenizer, options=options)
    prepare_t2i([raw["t2i"]], root / "t2i", tokenizer, ColourTokenizer(), options=options)
    return root


@pytest.fixture
def copy_of(prepared, tmp_path):
    """Returns a source that a test may write masks into."""

    def copy(kind):
        return open_source(shutil.copytree(prepared / kind, tmp_path / kind))

    return copy
