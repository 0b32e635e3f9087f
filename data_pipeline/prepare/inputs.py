"""What raw files looked like when shards were begun: name, size and a fingerprint of each.

Places do not count, so a directory may be moved between two calls. The fingerprint is the sha256 of a file's first and
last bytes: a MiB each, less where there are hundreds of files, so that a restart never reads more than a GiB before it
works. Of tens of thousands of files (folders of pictures) name and size must do.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError

EDGE_BYTES = 1 << 20
"""What is read at either end of a file at most."""
MAX_READ_BYTES = 1 << 30
"""What all fingerprints together may read."""
MAX_OPENED = 10_000
"""More files than these are not opened."""
MAX_LISTED = 1_000
"""Files that a manifest lists one by one; more are summarised."""

InputEntry = tuple[str, int, str]
"""Name, bytes, fingerprint."""


def describe_inputs(files: Sequence[Path]) -> list[InputEntry]:
    """One entry a file, in order.

    Raises:
        UserError: A file cannot be read.
    """
    edge_bytes = min(EDGE_BYTES, MAX_READ_BYTES // (2 * max(len(files), 1))) if len(files) <= MAX_OPENED else 0
    return [_describe(path, edge_bytes) for path in files]


def _describe(path: Path, edge_bytes: int) -> InputEntry:
    try:
        if not edge_bytes:
            return path.name, path.stat().st_size, ""
        with path.open("rb", buffering=0) as stream:
            size = os.fstat(stream.fileno()).st_size
            digest = hashlib.sha256(stream.read(min(size, edge_bytes)))
            if size > edge_bytes:
                stream.seek(max(edge_bytes, size - edge_bytes))
                digest.update(stream.read(edge_bytes))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path of the raw input") from error
    return path.name, size, digest.hexdigest()[:32]


def inputs_setting(entries: Sequence[InputEntry]) -> Any:
    """What a manifest says of the inputs: each file, or the sum of very many."""
    if len(entries) <= MAX_LISTED:
        return [list(entry) for entry in entries]
    digest = hashlib.sha256("".join(f"{entry}\n" for entry in entries).encode()).hexdigest()
    return {"files": len(entries), "bytes": sum(size for _, size, _ in entries), "sha256": digest}


def check_inputs(then: Any, now: Any, directory: Path) -> None:
    """Compares what the inputs were with what they are, both as lists of entries or as a summary.

    Raises:
        UserError: They differ; names the first file that does.
    """
    if then == now:
        return
    rule = "the shards there were made of other inputs; give a new output directory, or the inputs as they were"
    if not isinstance(then, list) or not isinstance(now, list):
        raise UserError(f"{directory}: inputs = {then!r} became {now!r}: {rule}")
    for was, is_now in zip(then, now, strict=False):
        if tuple(was) != tuple(is_now):
            raise UserError(f"{directory}: input {was[0]!r} {_change(was, is_now)}: {rule}")
    odd = (then if len(then) > len(now) else now)[min(len(then), len(now))]
    state = "is no longer given" if len(then) > len(now) else "is new"
    raise UserError(f"{directory}: input {odd[0]!r} {state} ({len(then)} files then, {len(now)} now): {rule}")


def _change(was: Sequence[Any], is_now: Sequence[Any]) -> str:
    if was[0] != is_now[0]:
        return f"stood where now {is_now[0]!r} stands"
    if was[1] != is_now[1]:
        return f"had {was[1]} bytes, now {is_now[1]}"
    return f"has other content of the same {was[1]} bytes"
