"""Shards shared by the tests of the data road."""

import pytest

from tests.support.shards import TinyShards, make_shards


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> TinyShards:
    """Text, questions and drawings; read-only, a test that damages them makes its own."""
    return make_shards(tmp_path_factory.mktemp("shards"))
