"""The header scan of a tar: where each member's bytes are. Nothing is extracted, links and devices are refused.

Webdataset writes and streams tars; random access needs only this. Read are ustar and what GNU tar and Python's tarfile
write: long names in GNU 'L' members, names and sizes in PAX 'x' headers. Directories are passed over.
A member begins at the first of its headers, so the stretch of a member parses again by itself.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import UserError

BLOCK = 512
_REST_BYTES = 1 << 20
MAX_MEMBER_BYTES = (1 << 32) - 1
"""Larger members are refused: the index counts bytes of a sample in 32 bits."""

_MAX_EXTENSION_BYTES = 1 << 20
_REGULAR = (b"0", b"\0", b"7")
_DIRECTORY = b"5"
_LONG_NAME, _PAX, _PAX_GLOBAL = b"L", b"x", b"g"
_EXTENSIONS = (_LONG_NAME, _PAX, _PAX_GLOBAL)
_GNU_MAGIC = b"ustar  \0"


@dataclass(frozen=True, slots=True)
class Member:
    """One regular file inside a tar."""

    name: str
    header: int
    """Byte offset of its header, or of the first of several."""
    data: int
    """Byte offset of its content."""
    size: int

    @property
    def end(self) -> int:
        """Byte offset after its padding."""
        return self.data + _padded(self.size)


@dataclass(frozen=True, slots=True)
class _Header:
    """The fields of one header block."""

    name: str
    kind: bytes
    size: int


def parse_header(block: bytes | memoryview, at: int) -> Member | None:
    """Reads the 512-byte header at offset `at`; None is the end-of-archive block.

    Raises:
        ValueError: No tar header, a wrong checksum, or a member that is not a plain file of a short name.
    """
    header = _parse(bytes(block), at)
    if header is None:
        return None
    _check_plain(header.name, header.kind, at)
    return Member(header.name, at, at + BLOCK, header.size)


def scan_tar(path: Path) -> Iterator[Member]:
    """Members of a tar in order, headers read only.

    Raises:
        UserError: The tar is truncated or holds something else than plain files with relative names.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        yield from _members(lambda at, count: os.pread(descriptor, count, at), size, True)
    except ValueError as error:
        raise UserError(f"{path}: damaged tar, {error}; write it again") from error
    finally:
        os.close(descriptor)


def scan_stretch(stretch: bytes | memoryview) -> Iterator[Member]:
    """Members of a stretch of a tar that begins with a header and ends with a member; offsets count from its start.

    Raises:
        ValueError: As `scan_tar`, without the path.
    """
    view = memoryview(stretch)
    return _members(lambda at, count: bytes(view[at : at + count]), len(view), False)


def _members(read: Callable[[int, int], bytes], size: int, has_end: bool) -> Iterator[Member]:
    """Members of `size` bytes, which end with the end-of-archive block or just so.

    Raises:
        ValueError: Says what is wrong and where.
    """
    at = 0
    while at < size or has_end:
        first = at
        name, content_size = "", -1
        header = _parse(read(at, BLOCK), at)
        while header is not None and header.kind in _EXTENSIONS:
            content = _extension(read, header, at, size)
            if header.kind == _LONG_NAME:
                name = content.rstrip(b"\0").decode()
            else:
                fields = _pax_fields(content, at)
                if header.kind == _PAX_GLOBAL and fields.keys() & {"path", "size", "linkpath"}:
                    raise ValueError(f"the global header at byte {at} renames members")
                name = fields.get("path", name)
                content_size = int(fields["size"]) if fields.get("size", "").isdecimal() else content_size
            at += BLOCK + _padded(header.size)
            header = _parse(read(at, BLOCK), at)
            if header is None:
                raise ValueError(f"the long name at byte {first} is not followed by its member")
        if header is None:
            if has_end:
                _check_rest(read, at, size)
            return
        name = name or header.name
        content_size = header.size if content_size < 0 else content_size
        if header.kind == _DIRECTORY or (header.kind in _REGULAR and name.endswith("/")):
            at += BLOCK
            continue
        member = Member(name, first, at + BLOCK, content_size)
        _check_plain(name, header.kind, first)
        _check_place(member, size)
        yield member
        at = member.end


def _check_rest(read: Callable[[int, int], bytes], at: int, size: int) -> None:
    """Refuses members behind the end of the archive (tars joined by `cat`, a header that was zeroed).

    Raises:
        ValueError: Something else than zeros follows, or the tar is no whole number of blocks.
    """
    for place in range(at, size, _REST_BYTES):
        chunk = read(place, _REST_BYTES)
        if chunk.count(0) != len(chunk):
            raise ValueError(f"bytes follow the end of the archive at byte {at}, which readers would lose")
    if size % BLOCK:
        raise ValueError(f"its {size} bytes are no whole number of {BLOCK}-byte blocks")


def _parse(block: bytes, at: int) -> _Header | None:
    """One header block; None is the end-of-archive block.

    Raises:
        ValueError: No tar header, or a wrong checksum.
    """
    if len(block) < BLOCK:
        raise ValueError(f"the tar ends inside the header at byte {at}")
    if block[:BLOCK].count(0) == BLOCK:
        return None
    try:
        checksum = int(block[148:156].strip(b"\0 ") or b"0", 8)
        size = _number(block[124:136])
        name = block[:100].split(b"\0", 1)[0].decode()
        # Old GNU headers keep times where ustar has the first part of a long name.
        prefix = "" if block[257:265] == _GNU_MAGIC else block[345:500].split(b"\0", 1)[0].decode()
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"no tar header at byte {at}") from error
    if sum(block) - sum(block[148:156]) + 8 * 32 != checksum or size < 0:
        raise ValueError(f"the tar header at byte {at} has a wrong checksum")
    return _Header(f"{prefix}/{name}" if prefix else name, block[156:157], size)


def _number(field: bytes) -> int:
    """Octal digits, or for sizes from 8 GiB on the bytes of the number after a mark."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    return int(field.strip(b"\0 ") or b"0", 8)


def _extension(read: Callable[[int, int], bytes], header: _Header, at: int, size: int) -> bytes:
    """Content of a member that describes the next one."""
    if header.size > _MAX_EXTENSION_BYTES:
        raise ValueError(f"the long name at byte {at} has {header.size} bytes, at most {_MAX_EXTENSION_BYTES} are read")
    if at + BLOCK + _padded(header.size) > size:
        raise ValueError(f"the tar ends inside the long name at byte {at}")
    return read(at + BLOCK, header.size)


def _pax_fields(content: bytes, at: int) -> dict[str, str]:
    """Key and value of records `LENGTH KEY=VALUE\\n`."""
    fields: dict[str, str] = {}
    position = 0
    while position < len(content) and content[position]:
        digits = content[position : position + 12].split(b" ", 1)[0]
        length = int(digits) if digits.isdigit() else 0
        record = content[position : position + length]
        key, equals, value = record[len(digits) + 1 : -1].partition(b"=")
        if not equals or record[-1:] != b"\n" or len(record) != length:
            raise ValueError(f"the PAX header at byte {at} is damaged")
        if key.startswith(b"GNU.sparse"):
            raise ValueError(f"the member at byte {at} is sparse, not a plain file")
        if key in (b"path", b"size", b"linkpath"):
            try:
                fields[key.decode()] = value.decode()
            except UnicodeDecodeError as error:
                raise ValueError(f"the PAX header at byte {at} is not UTF-8") from error
        position += length
    return fields


def _check_plain(name: str, kind: bytes, at: int) -> None:
    if kind not in _REGULAR:
        raise ValueError(f"member {name!r} at byte {at} is a link, directory, device or extension, not a plain file")


def _check_place(member: Member, size: int) -> None:
    """Refuses names that lead out of a directory, and sizes out of bounds."""
    if member.name.startswith("/") or ".." in member.name.split("/") or "\0" in member.name or not member.name:
        raise ValueError(f"member {member.name!r} at byte {member.header} has a name that leads out of its directory")
    if member.size > MAX_MEMBER_BYTES:
        raise ValueError(f"member {member.name!r} has {member.size} bytes, at most {MAX_MEMBER_BYTES} are read")
    if member.end > size:
        raise ValueError(f"the tar ends inside member {member.name!r}")


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
