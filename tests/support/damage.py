"""Damage for tars and pictures: every way a byte string can go wrong, chosen by a seeded generator.

A mutation says whether it is structural: then the tar itself shows it (a header that is no header, an end that is not
where it should be), whatever the content. Content that changes under whole headers only a checksum can see.
"""

import functools
import io
import struct
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

BLOCK = 512
Random = np.random.Generator


@dataclass(frozen=True)
class Damaged:
    """Bytes after a mutation."""

    content: bytes
    how: str
    is_structural: bool


def headers_of(content: bytes) -> list[int]:
    """Offsets of the headers of a whole tar."""
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return [member.offset for member in tar]


def checksummed(header: bytes) -> bytes:
    """A header with its checksum made right."""
    total = sum(header[:148]) + sum(header[156:]) + 8 * 32
    return header[:148] + b"%06o\0 " % total + header[156:]


def _flip(content: bytes, random: Random) -> Damaged:
    array = bytearray(content)
    for place in random.integers(0, len(array), random.integers(1, 20)):
        array[place] ^= int(random.integers(1, 256))
    return Damaged(bytes(array), "flip", False)


def _flip_header(content: bytes, random: Random) -> Damaged:
    array = bytearray(content)
    header = int(random.choice(headers_of(content)))
    array[header + int(random.integers(0, 148))] ^= int(random.integers(1, 256))
    return Damaged(bytes(array), "flip header", True)


def _truncate(content: bytes, random: Random) -> Damaged:
    end = len(content) - len(content) % BLOCK
    last = len(content.rstrip(b"\0"))  # what is cut off the padding behind costs nothing
    return Damaged(content[: int(random.integers(0, min(last, end)))], "truncate", True)


def _truncate_at_block(content: bytes, random: Random) -> Damaged:
    last = len(content.rstrip(b"\0")) // BLOCK
    return Damaged(content[: BLOCK * int(random.integers(0, last + 1))], "truncate at block", True)


def _odd(random: Random) -> int:
    """A number of bytes that is no whole number of blocks."""
    size = int(random.integers(1, 3000))
    return size + (size % BLOCK == 0)


def _remove(content: bytes, random: Random) -> Damaged:
    last = len(content.rstrip(b"\0"))
    start = int(random.integers(0, last))
    return Damaged(content[:start] + content[start + _odd(random) :], "remove", True)


def _remove_blocks(content: bytes, random: Random) -> Damaged:
    start = BLOCK * int(random.integers(0, len(content) // BLOCK))
    return Damaged(content[:start] + content[start + BLOCK * int(random.integers(1, 8)) :], "remove blocks", False)


def _insert(content: bytes, random: Random) -> Damaged:
    start = int(random.integers(0, len(content.rstrip(b"\0"))))
    return Damaged(content[:start] + random.bytes(_odd(random)) + content[start:], "insert", True)


def _zero(content: bytes, random: Random) -> Damaged:
    header = int(random.choice(headers_of(content)))
    array = bytearray(content)
    array[header : header + BLOCK] = bytes(BLOCK)
    return Damaged(bytes(array), "zero header", True)


def _overwrite(content: bytes, random: Random) -> Damaged:
    array = bytearray(content)
    size = int(random.integers(1, 4000))
    start = int(random.integers(0, max(len(array) - size, 1)))
    array[start : start + size] = random.bytes(size)
    return Damaged(bytes(array[: len(content)]), "overwrite", False)


def _swap(content: bytes, random: Random) -> Damaged:
    """Two members change places, headers and all."""
    places = [*headers_of(content), len(content.rstrip(b"\0")) // BLOCK * BLOCK + BLOCK]
    a, b = sorted(random.choice(len(places) - 1, 2, replace=False).tolist())
    first, second = content[places[a] : places[a + 1]], content[places[b] : places[b + 1]]
    between, rest = content[places[a + 1] : places[b]], content[places[b + 1] :]
    return Damaged(content[: places[a]] + second + between + first + rest, "swap", False)


def _duplicate(content: bytes, random: Random) -> Damaged:
    places = headers_of(content)
    at = int(random.integers(0, len(places) - 1))
    member = content[places[at] : places[at + 1]]
    into = int(random.choice(places))
    return Damaged(content[:into] + member + content[into:], "duplicate", False)


def _append(content: bytes, random: Random) -> Damaged:
    return Damaged(content + content, "append", True)


_NUMBERS = (
    b"77777777777\0", b"00000000000\0", b"-0000000001\0", b"zzzzzzzzzzz\0", b"\x80" + b"\x7f" * 11, b"\xff" * 12,
    b"            ", b"00000000001\0", b"00000100000\0",
)  # fmt: skip
_NAMES = (
    b"/etc/passwd", b"../../up.jpg", b"a\\b.jpg", b"\xff\xfe.jpg", b"", b".hidden", b"no_extension", b"x.pyd",
    b"a" * 100, b"con\x07trol.jpg", b"__meta__/x.jpg", b"1.2.3.jpg",
)  # fmt: skip


def _edit_header(content: bytes, random: Random) -> Damaged:
    """Odd numbers, names and types in a header whose checksum is right."""
    array = bytearray(content)
    at = int(random.choice(headers_of(content)))
    header = bytearray(array[at : at + BLOCK])
    what = int(random.integers(0, 4))
    if what == 0:
        header[124:136] = _NUMBERS[int(random.integers(len(_NUMBERS)))]
    elif what == 1:
        header[0:100] = _NAMES[int(random.integers(len(_NAMES)))].ljust(100, b"\0")
    elif what == 2:
        header[156] = int(random.choice(list(b"01234567xgLKSVZ\0")))
    else:
        header[257:265] = random.choice([b"\0" * 8, b"ustar  \0", b"ustar\x0000", b"gnutar\0\0"])
    array[at : at + BLOCK] = checksummed(bytes(header))
    return Damaged(bytes(array), "edit header", False)


def _odd_member(content: bytes, random: Random) -> Damaged:
    """A member that somebody might smuggle in, between two whole ones."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo(str(random.choice(["z.jpg", "z.pyd", "../z.txt", "z" * 300 + ".txt", "/z.png", "z"])))
        data = _bomb(random) if random.random() < 0.4 else random.bytes(int(random.integers(0, 900)))
        info.type = bytes([int(random.choice(list(b"0001234567")))])
        info.linkname = "y" * int(random.choice([1, 200]))
        info.size = len(data) if info.type in (b"0", b"7") else 0
        tar.addfile(info, io.BytesIO(data) if info.size else None)
    member = stream.getvalue().rstrip(b"\0")
    member += bytes(-len(member) % BLOCK)
    at = int(random.choice(headers_of(content)))
    return Damaged(content[:at] + member + content[at:], "odd member", False)


TAR_DAMAGE: tuple[Callable[[bytes, Random], Damaged], ...] = (
    _flip, _flip_header, _truncate, _truncate_at_block, _remove, _remove_blocks, _insert, _zero, _overwrite, _swap,
    _duplicate, _append, _edit_header, _odd_member,
)  # fmt: skip


def damage_tar(content: bytes, random: Random) -> Damaged:
    """One mutation of a whole tar."""
    return TAR_DAMAGE[int(random.integers(len(TAR_DAMAGE)))](content, random)


@functools.cache
def _zeros(num_bytes: int) -> bytes:
    return zlib.compress(bytes(num_bytes), 9)


def _png_with(name: bytes, content: bytes) -> bytes:
    """A small PNG with a chunk between its header and its pixels."""
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "png")
    whole = stream.getvalue()
    chunk = struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    return whole[:33] + chunk + whole[33:]


def _bomb(random: Random) -> bytes:
    """A small picture file that says it is a large one, or unpacks to much besides its pixels."""
    what = int(random.integers(0, 12))
    if what < 3:
        name, head = ((b"zTXt", b"key\0\0"), (b"iCCP", b"profile\0\0"), (b"iTXt", b"key\0\1\0\0\0"))[what]
        return _png_with(name, head + _zeros(256 << 20))
    if what == 3:
        return _png_with(b"IDAT", _zeros(256 << 20))
    stream = io.BytesIO()
    kind = str(random.choice(["png", "jpeg", "webp"]))
    Image.new("RGB", (8, 8)).save(stream, kind)
    content = bytearray(stream.getvalue())
    width, height = (int(size) for size in random.choice([65_535, 60_000, 16_383, 9_000, 1], 2))
    if kind == "png":
        content[16:24] = struct.pack(">II", width, height)
    elif kind == "jpeg":
        at = content.index(b"\xff\xc0") + 5
        content[at : at + 4] = struct.pack(">HH", height, width)
    else:
        content[26:30] = struct.pack("<HH", min(width, 16_383), min(height, 16_383))
    return bytes(content)


def damage_picture(content: bytes, random: Random) -> bytes:
    """One mutation of a picture file."""
    how = int(random.integers(0, 6))
    if how == 0:
        return _bomb(random)
    if how == 1:
        return content[: int(random.integers(0, len(content)))]
    if how == 2:
        return _flip(content[:200], random).content + content[200:]  # headers
    if how == 3:
        start = int(random.integers(0, len(content)))
        return content[:start] + random.bytes(int(random.integers(1, 200))) + content[start:]
    if how == 4:
        return random.bytes(8) + content[8:] if random.random() < 0.3 else content[:12] + random.bytes(60)
    return _flip(content, random).content
