"""A tar as it lies on the disk, damaged or not: every member that can be found, and every place where one cannot.

`tar_scan` refuses what is not a plain tar of plain files; this walk never stops at damage. It understands ustar, GNU
and PAX names, says where a member is cut off or a header is wrong, and then searches for the next header, first at any
byte (the magic word of ustar and GNU), then in whole blocks (old headers have no magic). It keeps one header at a time.

Sizes are skipped exactly as Python's tarfile does it (links and directories have no content, whatever they claim),
because that is the reader under webdataset whose view has to be explained.
"""

import io
from collections.abc import Generator, Iterator
from dataclasses import dataclass

BLOCK = 512
_CHUNK_BYTES = 1 << 20
_MAX_EXTENSION_BYTES = 1 << 20
_MAGIC = b"ustar"
_MAGIC_AT = 257
_WITHOUT_CONTENT = frozenset(b"123456")
_ZERO_BLOCK = bytes(BLOCK)


@dataclass(frozen=True, slots=True)
class Entry:
    """One member, of any type."""

    name: str
    type: str
    """Type letter of the header: 0 file, 1 hard link, 2 symbolic link, 3 and 4 devices, 5 directory, 6 pipe ..."""
    header: int
    """Byte offset of its first header (that of a long name, where it has one)."""
    data: int
    """Byte offset of its content."""
    size: int
    """Bytes of its content."""
    link: str = ""
    """What a link points to."""

    @property
    def is_file(self) -> bool:
        """Whether it has content."""
        return self.type in "07"

    @property
    def end(self) -> int:
        """Byte offset after its padding."""
        return self.data + -(-self.size // BLOCK) * BLOCK


@dataclass(frozen=True, slots=True)
class Damage:
    """A place where the tar does not go on as it should."""

    code: str
    """Which kind, a key of `findings.EXPLANATIONS`."""
    at: int
    """Byte offset."""
    name: str
    """The member it is about, or nothing."""
    detail: str


@dataclass(frozen=True, slots=True)
class _Header:
    """The fields of one header block."""

    name: str
    type: int
    size: int
    link: str


def walk_tar(stream: io.BufferedIOBase, size: int) -> Iterator[Entry | Damage]:
    """Yields members and damages in the order of their offsets.

    Args:
        stream: The tar, seekable; its position may be moved between two items.
        size: Its bytes.
    """
    at = 0
    while at < size:
        stream.seek(at)
        block = stream.read(BLOCK)
        if len(block) < BLOCK:
            yield Damage("truncated", at, "", f"the file ends {len(block)} bytes into a header")
            return
        if block == _ZERO_BLOCK:
            next_at = yield from _after_end(stream, at, size)
        else:
            next_at = yield from _member(stream, block, at, size)
        if next_at < 0:
            return
        at = next_at
    if size:
        yield Damage("missing_end", size, "", "the file ends without the end-of-archive blocks")
    else:
        yield Damage("empty_tar", 0, "", "the file has 0 bytes")


def _member(stream: io.BufferedIOBase, block: bytes, at: int, size: int) -> Generator[Entry | Damage, None, int]:
    """Yields the member whose first header is `block`; returns where the next one is, or -1 where there is none."""
    first = at
    name = link = ""
    forced_size = -1
    while True:
        try:
            header = _parse(block)
        except ValueError as error:
            found = _next_header(stream, at + 1, size)
            yield Damage("damaged_header", at, name, f"{error}; {_resumed(found)}")
            return found
        at += BLOCK
        if header.type not in b"LKxg":
            break
        content = _read(stream, at, min(header.size, _MAX_EXTENSION_BYTES))
        end = at + -(-header.size // BLOCK) * BLOCK
        if end > size:
            found = _next_header(stream, at, size)
            yield Damage("truncated", first, header.name, f"the file ends inside a long name; {_resumed(found)}")
            return found
        if header.type == ord("L"):
            name = _text(content)
        elif header.type == ord("K"):
            link = _text(content)
        elif header.type == ord("x"):
            fields = _pax_fields(content)
            name, link = fields.get("path", name), fields.get("linkpath", link)
            forced_size = int(fields["size"]) if fields.get("size", "").isdecimal() else forced_size
        at = end
        block = _read(stream, at, BLOCK)
        if len(block) < BLOCK or block == _ZERO_BLOCK:
            yield Damage("truncated", first, name, "a long name is not followed by its member")
            return at if len(block) == BLOCK else -1
    if header.type == ord("S"):
        at += _sparse_blocks(stream, block, at) * BLOCK
    content_size = 0 if header.type in _WITHOUT_CONTENT else forced_size if forced_size >= 0 else header.size
    kind = chr(header.type) if header.type else "0"
    entry = Entry(name or header.name, kind, first, at, content_size, link or header.link)
    if kind == "0" and entry.name.endswith("/"):
        entry = Entry(entry.name, "5", first, at, content_size, "")
    if at + content_size > size:
        found = _next_header(stream, at, size)
        there = f"the member says {content_size} bytes, {max(size - at, 0)} are left"
        yield Damage("truncated", first, entry.name, f"{there}; {_resumed(found)}")
        return found
    yield entry
    return entry.end


def _after_end(stream: io.BufferedIOBase, at: int, size: int) -> Generator[Damage, None, int]:
    """Reports what follows the end-of-archive block; returns where members go on, or -1."""
    position = at
    while position < size:
        chunk = _read(stream, position, _CHUNK_BYTES)
        if chunk.count(0) != len(chunk):
            found = _next_header(stream, position, size)
            if found < 0:
                stray = position + len(chunk) - len(chunk.lstrip(b"\0"))
                yield Damage("data_after_end", stray, "", "bytes that are no member follow the end of the archive")
                return -1
            yield Damage("data_after_end", at, "", f"the archive ends here, and another begins at byte {found}")
            return found
        position += len(chunk)
    if size % BLOCK:
        yield Damage("odd_size", size - size % BLOCK, "", f"{size} bytes are no whole number of {BLOCK}-byte blocks")
    return -1


def _next_header(stream: io.BufferedIOBase, start: int, size: int) -> int:
    """Offset of the first block from `start` on that is a whole header; -1 where there is none."""
    at = start
    while at + BLOCK <= size:
        chunk = _read(stream, at, _CHUNK_BYTES + BLOCK)
        found = [place for place in (_magic_header(chunk), _old_header(chunk, -at % BLOCK)) if place >= 0]
        if found:
            return at + min(found)
        if len(chunk) < _CHUNK_BYTES + BLOCK:
            return -1
        at += _CHUNK_BYTES
    return -1


def _magic_header(chunk: bytes) -> int:
    """First place in a chunk where a header with a magic word begins, at any byte; -1 where none does."""
    place = chunk.find(_MAGIC)
    while place >= 0:
        start = place - _MAGIC_AT
        if start >= 0 and _is_header(chunk[start : start + BLOCK]):
            return start
        place = chunk.find(_MAGIC, place + 1)
    return -1


def _old_header(chunk: bytes, first: int) -> int:
    """First block of a chunk, on the grid of the tar, that is a header without magic; -1 where none is."""
    for start in range(first, len(chunk) - BLOCK + 1, BLOCK):
        if chunk[start] and chunk[start + 148 : start + 154].strip(b" \0").isdigit():
            block = chunk[start : start + BLOCK]
            if _is_header(block):
                return start
    return -1


def _is_header(block: bytes) -> bool:
    if len(block) < BLOCK or not block[0]:
        return False
    try:
        _parse(block)
    except ValueError:
        return False
    return True


def _parse(block: bytes) -> _Header:
    """The fields of a header block.

    Raises:
        ValueError: It is none; the message says what is wrong.
    """
    try:
        checksum = _number(block[148:156])
    except ValueError as error:
        raise ValueError("no tar header: its checksum is no number") from error
    rest = block[:148] + bytes(b" " * 8) + block[156:]
    signed = sum(rest) - 256 * sum(byte > 127 for byte in rest)
    if checksum not in (sum(rest), signed):
        raise ValueError("the header's checksum is wrong")
    try:
        size = _number(block[124:136])
    except ValueError as error:
        raise ValueError("the header's size is no number") from error
    name, prefix = _text(block[:100]), _text(block[345:500])
    is_gnu = block[_MAGIC_AT : _MAGIC_AT + 8] == b"ustar  \0"
    if prefix and not is_gnu and block[_MAGIC_AT : _MAGIC_AT + 5] == _MAGIC:
        name = f"{prefix}/{name}"
    return _Header(name, block[156], size, _text(block[157:257]))


def _number(field: bytes) -> int:
    """A number field: octal digits, or base 256 behind a marker.

    Raises:
        ValueError: Neither, or negative.
    """
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip()
    if digits and not digits.isdigit():
        raise ValueError("no number")
    return int(digits or b"0", 8)


def _text(field: bytes) -> str:
    """A name; bytes that are no UTF-8 become lone surrogates, as tarfile has it."""
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _pax_fields(content: bytes) -> dict[str, str]:
    """The records of a PAX header; what cannot be read is left out."""
    fields: dict[str, str] = {}
    while content:
        digits, _, _ = content.partition(b" ")
        if not digits.isdigit() or len(digits) > 9 or not len(digits) < int(digits) <= len(content):
            break
        record, content = content[len(digits) + 1 : int(digits)], content[int(digits) :]
        key, _, value = record.rstrip(b"\n").partition(b"=")
        fields[_text(key)] = value.decode("utf-8", "surrogateescape")
    return fields


def _sparse_blocks(stream: io.BufferedIOBase, block: bytes, at: int) -> int:
    """Further header blocks of an old GNU sparse file."""
    count, goes_on = 0, block[482]
    while goes_on and count < 1024:
        more = _read(stream, at + count * BLOCK, BLOCK)
        if len(more) < BLOCK:
            break
        count, goes_on = count + 1, more[504]
    return count


def _read(stream: io.BufferedIOBase, at: int, size: int) -> bytes:
    stream.seek(at)
    return stream.read(size)


def _resumed(found: int) -> str:
    """What is known of the bytes after a damage."""
    return f"the next member begins at byte {found}" if found >= 0 else "no member is found after it"
