"""What the tests of this room share."""

import pytest


@pytest.fixture
def write(tmp_path):
    def write(content, name="shard.tar"):
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write
