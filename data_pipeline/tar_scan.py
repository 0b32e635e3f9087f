"""The header scan of a tar: where each member's bytes are. Nothing is extracted, links and devices are refused.

Webdataset writes and streams tars; random access needs only this. Formats read: ustar and what GNU and PAX writers
produce for plain short names.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import UserError

BLOCK = 512
_REGULAR = (b"0", b"\0")


@dataclass(frozen=True, slots=True)
class Member:
    """One regular file inside a tar."""

    name: str
    header: int
    """Byte offset of its header."""
    data: int
    """Byte offset of its content."""
    size: int

    @property
    def end(self) -> int:
        """Byte offset after its padding."""
        return self.data + -(-self.size // BLOCK) * BLOCK


def parse_header(block: bytes | memoryview, at: int) -> Member | None:
    """Reads the 512-byte header at offset `at`; None is the end-of-archive block.

    Raises:
        ValueError: No tar header, a wrong checksum, or a member that is not a plain file.
    """
    block = bytes(block)
    if len(block) < BLOCK:
        raise ValueError(f"the tar ends inside the header at byte {at}")
    if block[:BLOCK].count(0) == BLOCK:
        return None
    try:
        checksum = int(block[148:156].strip(b"\0 ") or b"0", 8)
        size = int(block[124:136].strip(b"\0 ") or b"0", 8)
        name = block[:100].split(b"\0", 1)[0].decode()
        prefix = block[345:500].split(b"\0", 1)[0].decode()
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"no tar header at byte {at}") from error
    if sum(block) - sum(block[148:156]) + 8 * 32 != checksum or size < 0:
        raise ValueError(f"the tar header at byte {at} has a wrong checksum")
    name = f"{prefix}/{name}" if prefix else name
    if block[156:157] not in _REGULAR:
        raise ValueError(f"member {name!r} at byte {at} is a link, directory, device or extension, not a plain file")
    return Member(name, at, at + BLOCK, size)


def scan_tar(path: Path) -> Iterator[Member]:
    """Members of a tar in order, headers read only.

    Raises:
        UserError: The tar is truncated or holds something else than plain files.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        at = 0
        while True:
            stream.seek(at)
            try:
                member = parse_header(stream.read(BLOCK), at)
                if member is not None and member.end > size:
                    raise ValueError(f"the tar ends inside member {member.name!r}")
            except ValueError as error:
                raise UserError(f"{path}: damaged tar, {error}; write it again") from error
            if member is None:
                return
            yield member
            at = member.end
