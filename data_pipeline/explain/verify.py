"""Whether a prepared directory is what its manifest says, byte for byte; lists every problem and stops at none.

For every shard its size and sha256, for every sample its crc32 as the reader sees it, for the index its own sha256 and
the places it should give when it is made anew from the tars' headers; digests of tokenizers, and the masks.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.explain.places import places_in_tar
from data_pipeline.explain.tar_walk import Damage, Entry, walk_tar
from data_pipeline.files import sha256_of
from data_pipeline.manifest import (
    DRAWING_COLUMNS,
    MANIFEST_NAME,
    SAMPLE_COLUMNS,
    Manifest,
    ShardEntry,
    Source,
    parse_manifest,
)
from data_pipeline.masks.store import list_masks, read_mask
from data_pipeline.npy import open_npy
from data_pipeline.spec import ImageGeometry
from data_pipeline.stream.read import SampleReader

_CHUNK_BYTES = 1 << 22
_LISTED_PER_SHARD = 20
"""Samples of one shard and problem that are named one by one."""

Progress = Callable[[int, int], None]
"""(bytes done, bytes in all)."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is not as the manifest says."""

    file: str
    """Relative to the directory."""
    place: str
    """Sample, column or byte; nothing where it is the whole file."""
    problem: str


@dataclass(slots=True)
class Verification:
    """What was compared, and what differs."""

    path: str
    num_shards: int = 0
    num_samples: int = 0
    """Samples whose crc32 was compared."""
    num_bytes: int = 0
    problems: list[Problem] = field(default_factory=list)

    def add(self, file: str, place: str, problem: str) -> None:
        """Notes a problem."""
        self.problems.append(Problem(file, place, problem))


def verify_source(
    path: str | Path, *, text_tokenizer: str = "", image_tokenizer: str = "", progress: Progress | None = None
) -> Verification:
    """Compares a directory with its manifest.

    Args:
        path: Directory that holds janus.json.
        text_tokenizer: Digest (hex) that the shards' ids should have been made with; empty compares nothing.
        image_tokenizer: The same for image ids.
        progress: Told of bytes as they are read.

    Raises:
        UserError: There is no manifest that can be read, so nothing to compare with.
    """
    path = Path(path)
    try:
        content = (path / MANIFEST_NAME).read_bytes()
    except OSError as error:
        raise UserError(
            f"{path / MANIFEST_NAME}: cannot be read ({error.strerror}); give a directory that "
            "`janus-mega data prepare` has finished, or ask `janus-mega data doctor` about tars without a manifest"
        ) from error
    manifest = parse_manifest(content, path / MANIFEST_NAME)
    found = Verification(str(path))
    _check_digests(manifest, found, text_tokenizer, image_tokenizer)
    arrays = _check_index(path, manifest, found)
    source = Source(path, manifest, hashlib.sha256(content).hexdigest(), arrays) if arrays else None
    total = sum(entry.bytes for entry in manifest.shards)
    for number, entry in enumerate(manifest.shards):
        _check_shard(path, manifest, number, source, found)
        found.num_bytes += entry.bytes
        if progress:
            progress(found.num_bytes, total)
    if source:
        _check_masks(source, found)
    return found


def _check_digests(manifest: Manifest, found: Verification, text_tokenizer: str, image_tokenizer: str) -> None:
    if text_tokenizer and text_tokenizer != manifest.text_tokenizer:
        found.add(
            MANIFEST_NAME,
            "text_tokenizer",
            f"ids were made with sha256 {manifest.text_tokenizer}, given {text_tokenizer}",
        )
    if image_tokenizer:
        made_with = manifest.image_tokenizer.digest if manifest.image_tokenizer else "none"
        if made_with != image_tokenizer:
            found.add(
                MANIFEST_NAME,
                "image_tokenizer",
                f"image ids were made with sha256 {made_with}, given {image_tokenizer}",
            )


def _check_index(path: Path, manifest: Manifest, found: Verification) -> dict[str, np.ndarray] | None:
    """The columns of the index, or None where a problem forbids to use them."""
    columns = {**SAMPLE_COLUMNS, "ptr": "<i8", "uid": "<u8"} | (DRAWING_COLUMNS if manifest.kind == "t2i" else {})
    arrays: dict[str, np.ndarray] = {}
    for name, dtype in columns.items():
        file = path / "index" / f"{name}.npy"
        where = f"index/{name}.npy"
        try:
            array = open_npy(file)
        except (OSError, ValueError, EOFError) as error:
            found.add(where, "", f"missing or damaged ({str(error).splitlines()[0]})")
            continue
        expected = manifest.index.get(file.name)
        if expected and sha256_of(file) != expected:
            found.add(where, "", f"its sha256 is not the {expected} of {MANIFEST_NAME}")
        length = len(manifest.shards) + 1 if name == "ptr" else manifest.num_samples
        shape = (length, 2) if name == "uid" else (length,)
        if array.dtype.str != dtype or array.shape != shape:
            shown = f"{array.dtype.str} {list(array.shape)}, not {dtype} {list(shape)}"
            found.add(where, "", f"holds {shown}")
            continue
        arrays[name] = array
    for name, expected in manifest.index.items():
        if name.removesuffix(".npy") not in columns and not _has_hash(path / "index" / name, expected):
            found.add(f"index/{name}", "", f"missing, or its sha256 is not the {expected} of {MANIFEST_NAME}")
    if len(arrays) < len(columns):
        found.add("index", "", "samples cannot be checked without the whole index; only shards are")
        return None
    counts = np.cumsum([0, *(entry.num_samples for entry in manifest.shards)])
    if arrays["ptr"].tolist() != counts.tolist():
        found.add(
            "index/ptr.npy", "", f"disagrees with {MANIFEST_NAME} about samples per shard; samples are not checked"
        )
        return None
    for name, total in (
        ("ntok", manifest.num_text_tokens),
        ("nund", manifest.num_und_images),
    ):
        held = int(arrays[name].sum(dtype=np.int64))
        if held != total:
            found.add(f"index/{name}.npy", "", f"sums to {held}, {MANIFEST_NAME} says {total}")
    return arrays


def _has_hash(path: Path, expected: str) -> bool:
    try:
        return sha256_of(path) == expected
    except OSError:
        return False


def _check_shard(path: Path, manifest: Manifest, number: int, source: Source | None, found: Verification) -> None:
    entry = manifest.shards[number]
    tar = path / manifest.shards_dir / entry.name
    where = f"{manifest.shards_dir}/{entry.name}"
    found.num_shards += 1
    try:
        size = tar.stat().st_size
        if size != entry.bytes:
            found.add(where, "", f"has {size} bytes, {MANIFEST_NAME} says {entry.bytes}")
        elif sha256_of(tar) != entry.sha256:
            found.add(where, "", f"its sha256 is not the {entry.sha256} of {MANIFEST_NAME}")
        entries = _walk(tar, size, where, found)
    except OSError as error:
        found.add(where, "", f"cannot be read ({error.strerror})")
        return
    if source is None:
        return
    _check_places(source, number, entries, where, found)
    _check_samples(source, number, entry, where, found)


def _walk(tar: Path, size: int, where: str, found: Verification) -> list[Entry]:
    """Members of a tar; damages become problems."""
    entries = []
    with tar.open("rb") as stream:
        for item in walk_tar(stream, size):
            if isinstance(item, Damage):
                about = f" in member {item.name!r}" if item.name else ""
                found.add(where, f"byte {item.at}", f"damaged tar ({item.code}){about}: {item.detail}")
            else:
                entries.append(item)
    return entries


def _check_places(source: Source, shard: int, entries: list[Entry], where: str, found: Verification) -> None:
    """Compares the index with one made anew from the tar's headers and records."""
    first, last = (int(place) for place in source.first_samples[shard : shard + 2])
    try:
        expected = places_in_tar(source.shard_path(shard), entries, source.manifest)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        found.add(where, "", f"the index cannot be made anew from it ({error!r})")
        return
    columns = {
        "off": source.offset,
        "len": source.length,
        "ntok": source.num_text_tokens,
        "nund": source.num_und_images,
        "uid": source.uids,
        "img": source.image_offset,
    }
    for name, values in expected.items():
        stored = columns[name]
        assert stored is not None
        if len(values) != last - first:
            found.add(where, "", f"holds {len(values)} samples, the index has {last - first}")
            return
        differs = values != stored[first:last]
        wrong = np.flatnonzero(differs.any(axis=1) if differs.ndim > 1 else differs)
        if len(wrong):
            at = first + int(wrong[0])
            found.add(
                f"index/{name}.npy",
                f"sample {at}",
                f"says {stored[at].tolist()}, {where} has {values[wrong[0]].tolist()}; {len(wrong)} samples differ",
            )


def _check_samples(source: Source, shard: int, entry: ShardEntry, where: str, found: Verification) -> None:
    """Reads every sample through the reader of training, which compares its crc32."""
    first, last = (int(place) for place in source.first_samples[shard : shard + 2])
    reader = SampleReader(source, ImageGeometry())
    num_broken = 0
    for i in range(first, last):
        try:
            _ = reader.members(i) if source.kind == "interleaved" else reader.read(i)
        except (UserError, ValueError, KeyError) as error:
            num_broken += 1
            if num_broken <= _LISTED_PER_SHARD:
                told = str(error).removeprefix(f"{source.shard_path(shard)}: ").split("; ")[0]
                found.add(where, f"sample {i} ({source.uid(i)})", told)
    if num_broken > _LISTED_PER_SHARD:
        found.add(where, "", f"{num_broken - _LISTED_PER_SHARD} more of its {entry.num_samples} samples are damaged")
    found.num_samples += last - first
    reader.close()


def _check_masks(source: Source, found: Verification) -> None:
    for name in list_masks(source):
        try:
            read_mask(source, name)
        except UserError as error:
            found.add(f"masks/{name}.npy", "", str(error).split(": ", 1)[-1])
