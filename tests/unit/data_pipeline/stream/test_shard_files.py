"""Open tars: few of them, all that a read needs, and one line when there is none."""

import os
import pickle

import pytest

from data_pipeline.errors import UserError
from data_pipeline.stream.shard_files import ShardFiles, open_limit


class FourShards:
    """A source of tars that hold their number."""

    def __init__(self, directory):
        self.directory = directory
        for shard in range(4):
            self.shard_path(shard).write_bytes(f"shard {shard}".encode())

    def shard_path(self, shard):
        return self.directory / f"{shard}.tar"


@pytest.fixture
def files(tmp_path):
    opened = ShardFiles(FourShards(tmp_path))
    opened.limit = 2
    yield opened
    opened.close()


def num_open():
    return len(os.listdir("/proc/self/fd"))


def test_only_a_few_stay_open(files):
    before = num_open()
    for shard in (0, 1, 2, 3, 0, 2, 1, 3) * 5:
        assert files.read(shard, 6, 1) == str(shard).encode()
    assert num_open() <= before + 2
    files.close()
    assert num_open() == before
    assert files.read(3, 0, 99) == b"shard 3"


def test_what_is_read_together_is_open_together(files):
    descriptors = files.descriptors([3, 0, 1, 3, 2])
    assert [os.pread(file, 9, 6) for file in descriptors] == [b"3", b"0", b"1", b"3", b"2"]
    assert descriptors[0] == descriptors[3]
    before = num_open()
    files.descriptors([1, 0])
    assert num_open() == before - 2


def test_a_missing_shard_is_told_in_one_line(files, tmp_path):
    (tmp_path / "2.tar").unlink()
    with pytest.raises(UserError, match=r"2\.tar: the shard cannot be opened \(No such file") as caught:
        files.descriptors([0, 2])
    assert "\n" not in str(caught.value)
    assert files.read(1, 0, 7) == b"shard 1"


def test_open_shards_do_not_travel(files):
    files.descriptors([0, 1])
    copy = pickle.loads(pickle.dumps(files))
    assert copy.read(2, 0, 7) == b"shard 2"
    assert copy.limit == files.limit
    copy.close()


def test_sources_share_what_the_system_allows():
    assert open_limit(1) >= open_limit(4) >= open_limit(1000) == 8
