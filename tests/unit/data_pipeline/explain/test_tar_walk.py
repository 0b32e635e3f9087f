"""The walk against Python's own tarfile on odd but legal tars, and its way back after damage."""

import io
import tarfile

import numpy as np
import pytest

from data_pipeline.explain.tar_walk import BLOCK, Damage, Entry, walk_tar
from tests.support.damage import checksummed
from tests.support.tars import tar_of


def walk(content):
    return list(walk_tar(io.BytesIO(content), len(content)))


def members(content):
    return [
        (item.name, content[item.data : item.data + item.size]) for item in walk(content) if isinstance(item, Entry)
    ]


def by_tarfile(content):
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return [(m.name, tar.extractfile(m).read() if m.isreg() else b"") for m in tar]


def edited(content, at, start, field):
    header = bytearray(content[at : at + BLOCK])
    header[start : start + len(field)] = field
    return content[:at] + checksummed(bytes(header)) + content[at + BLOCK :]


WHOLE = tar_of(("a.txt", b"one"), ("b.txt", b"two" * 300), ("c/d.txt", b""), ("l", "2", "a.txt"), ("e.txt", b"x" * 512))


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_of_tarfile(form):
    long = "folder/" * 20 + "n" * 60 + ".txt"
    content = tar_of(("d", "5", ""), ("a.txt", b"1"), (long, b"22"), ("é.txt", b"3"), ("l", "1", "a.txt"), form=form)
    assert [(name.rstrip("/"), data) for name, data in members(content)] == by_tarfile(content)


def test_sizes_of_base_256_and_old_headers_without_magic():
    big = edited(WHOLE, 0, 124, b"\x80" + (3).to_bytes(11, "big"))
    assert members(big) == by_tarfile(big) == by_tarfile(WHOLE)
    old = edited(WHOLE, 0, 257, bytes(255))
    assert members(old) == by_tarfile(old)


def test_a_pax_size_goes_before_the_header_s():
    info = tarfile.TarInfo("a.txt")
    info.size = 3
    info.pax_headers = {"size": "3", "comment": "x" * 700}
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info, io.BytesIO(b"one"))
    (entry,) = walk(stream.getvalue())
    assert (entry.name, entry.size, entry.header) == ("a.txt", 3, 0) and entry.data > 1024


@pytest.mark.parametrize("field", [b"zzzzzzzzzzz\0", b"77777777777\0", b"\xff" * 12, b"\x80" + b"\x7f" * 11])
def test_impossible_sizes_are_damage_and_the_next_member_is_found(field):
    at = 1024
    content = edited(WHOLE, at, 124, field)
    damages = [item for item in walk(content) if isinstance(item, Damage)]
    assert [damage.at for damage in damages] == [at]
    assert [name for name, _ in members(content)] == ["a.txt", "c/d.txt", "l", "e.txt"]


def test_old_headers_are_found_again_on_the_grid():
    old = WHOLE
    for entry in [item for item in walk(WHOLE) if isinstance(item, Entry)]:
        old = edited(old, entry.header, 257, bytes(255))
    damaged = bytearray(old)
    damaged[1024] ^= 1
    assert [name for name, _ in members(bytes(damaged))] == ["a.txt", "c/d.txt", "l", "e.txt"]


def test_the_walk_ends_on_any_bytes():
    random = np.random.default_rng(0)
    for size in (0, 1, 511, 512, 513, 5000):
        for _ in range(20):
            items = walk(random.bytes(size))
            assert items and all(isinstance(item, Damage) for item in items)


def test_a_tar_of_headers_alone_takes_linear_time():
    """Every header lies about its size; each is damage and the next one is found at once."""
    one = edited(tar_of(("a.txt", b"")), 0, 124, b"77777777777\0")[:BLOCK]
    items = walk(one * 3000)
    assert len(items) == 3000 and all(isinstance(item, Damage) for item in items)
