"""Hashes of all pictures of a source, kept beside its masks so that another distance or mask costs no second pass.

    <source>/masks/pictures.<sha or look>.<manifest digest>.npy     PICTURE_DTYPE [P]

The name holds the manifest's digest, so hashes of other shards are never taken for these; the file may be deleted.
"""

import hashlib
import json
from pathlib import Path

import numpy as np

from data_pipeline.errors import BrokenSample, UserError
from data_pipeline.files import write_aside
from data_pipeline.images import ImageError
from data_pipeline.manifest import Source
from data_pipeline.masks.passes import Progress, over_samples
from data_pipeline.masks.picture_hash import perceptual_hash
from data_pipeline.masks.store import MASKS_DIR, npy_bytes
from data_pipeline.pairs import PICTURE_EXTENSIONS
from data_pipeline.stream.read import SampleReader

PICTURE_DTYPE = np.dtype([("sample", "<i8"), ("sha", "<u8", (2,)), ("look", "<u8"), ("state", "|u1")])
"""A picture: its sample, half of its sha256, its perceptual hash, and one of the states below."""

COMPARABLE, FLAT, UNDECODABLE, DAMAGED = range(4)
"""Damaged: the sample cannot be read, so its pictures are unknown; it counts as one that resembles nothing."""


def hashed_pictures(source: Source, *, looks: bool, workers: int = 1, progress: Progress | None = None) -> np.ndarray:
    """Hashes of the pictures of an interleaved source, PICTURE_DTYPE [P], in the order of samples and within them.

    Args:
        source: Prepared or indexed pictures.
        looks: Also perceptual hashes; without them nothing is decoded, `look` is 0 and all are comparable.
        workers: Processes.
        progress: Called as samples are done.
    """
    for kept_looks in (False, True) if not looks else (True,):
        kept = _read_kept(_kept_path(source, kept_looks), source)
        if kept is not None:
            return kept
    work = _hash_looks if looks else _hash_bytes
    runs = list(over_samples(source, np.arange(len(source)), work, workers, progress))
    table = np.concatenate([np.empty(0, PICTURE_DTYPE), *runs])
    path = _kept_path(source, looks)
    try:
        path.parent.mkdir(exist_ok=True)
        write_aside(path, npy_bytes(table))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); make the directory writable") from error
    return table


def sample_pictures(members: dict[str, memoryview]) -> list[memoryview]:
    """The pictures of a sample in the order of its document; the one picture of a pair.

    Raises:
        KeyError, ValueError, TypeError: Its document is damaged.
    """
    if "doc.json" in members:
        sequence = json.loads(bytes(members["doc.json"]))["seq"]
        return [members[part["name"]] for part in sequence if part["t"] == "image"]
    return [members[name] for name in PICTURE_EXTENSIONS if name in members]


def _hash_looks(reader: SampleReader, numbers: list[int]) -> np.ndarray:
    return _hash_run(reader, numbers, looks=True)


def _hash_bytes(reader: SampleReader, numbers: list[int]) -> np.ndarray:
    return _hash_run(reader, numbers, looks=False)


def _hash_run(reader: SampleReader, numbers: list[int], *, looks: bool) -> np.ndarray:
    rows: list[tuple[int, tuple[int, int], int, int]] = []
    for number in numbers:
        try:
            pictures = [bytes(picture) for picture in sample_pictures(reader.members(number))]
        except (BrokenSample, KeyError, ValueError, TypeError):
            rows.append((number, (0, 0), 0, DAMAGED))
            continue
        for content in pictures:
            look, state = _look(content) if looks else (0, COMPARABLE)
            digest = hashlib.sha256(content).digest()
            sha = (int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:16], "big"))
            rows.append((number, sha, look, state))
    return np.array(rows, PICTURE_DTYPE)


def _look(content: bytes) -> tuple[int, int]:
    try:
        found = perceptual_hash(content)
    except ImageError:
        return 0, UNDECODABLE
    return found.bits, FLAT if found.is_flat else COMPARABLE


def _kept_path(source: Source, looks: bool) -> Path:
    return source.path / MASKS_DIR / f"pictures.{'look' if looks else 'sha'}.{source.digest}.npy"


def _read_kept(path: Path, source: Source) -> np.ndarray | None:
    """Hashes that an earlier call has kept, if they are whole."""
    try:
        table = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    whole = table.dtype == PICTURE_DTYPE and table.ndim == 1
    if not whole or (len(table) and not 0 <= table["sample"].min() <= table["sample"].max() < len(source)):
        return None
    return np.asarray(table)
