"""The manifest and index beside the shards of one source: what is where, how long it is, whether it is whole.

    janus.json        schema, kind, shards (name, bytes, sha256, samples), totals, tokenizers, template, settings
    index/*.npy       memory-mapped, 22 bytes a sample: ptr i8 [shards + 1] first sample of each shard; off u8 and
                      len u4, byte range of a sample in its tar; ntok i4 text ids; nund u1 and ngen u1 images to
                      understand and to draw; crc u4 of the sample's bytes. Beside them uid u8 [N, 2], its identity,
                      and for t2i img u8, where the image's ids begin, and cap u1, the caption's number in its image
    shards/*.tar      WebDataset tars

For `interleaved` a sample's range spans its tar members, headers included. For `text` and `t2i` it is the row of text
ids inside the record's .npy. The captions of an image are samples of one uid that follow each other and share its ids.
Tars of others are indexed where they lie (layout `pairs`: a picture and its caption by one key); nothing is copied.
A `Source` pickles as its path: workers open the index again.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.npy import open_npy
from data_pipeline.uid import words_text

SCHEMA = "janus-shards/1"
"""Name and major version of the directory layout."""

MANIFEST_NAME = "janus.json"
KINDS = ("interleaved", "text", "t2i")
SAMPLE_COLUMNS = {"off": "<u8", "len": "<u4", "ntok": "<i4", "nund": "|u1", "ngen": "|u1", "crc": "<u4"}
"""Index files with one entry per sample, and their dtypes."""
DRAWING_COLUMNS = {"img": "<u8", "cap": "|u1"}
"""Those that only t2i sources have."""
LAYOUTS = ("records", "pairs")
"""How tars are laid out: as prepare writes them, or as others do, a picture and its caption by one key."""

_REDO = "copy it again, or delete the directory and run `janus-mega data prepare` once more"


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardEntry:
    """One tar."""

    name: str
    bytes: int
    sha256: str
    num_samples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageTokenizerEntry:
    """The image tokenizer whose ids a t2i source holds."""

    digest: str
    image_size: int
    num_tokens: int
    codebook_size: int
    num_variants: int = 1
    """Crops of each picture whose ids are stored, side by side."""
    preprocessing: str = ""
    """What was done to pictures before: crop, resizer, decoder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Content of janus.json; byte-reproducible, so it holds no times and no paths of the machine that wrote it."""

    schema: str = SCHEMA
    kind: str
    layout: str = "records"
    """One of LAYOUTS."""
    shards_dir: str = "shards"
    """Where the tars are: relative to the manifest, or an absolute path (tars of others)."""
    num_samples: int
    num_text_tokens: int
    num_und_images: int
    num_gen_images: int
    shards: tuple[ShardEntry, ...]
    text_tokenizer: str
    """sha256 of the text tokenizer whose ids are stored, hex."""
    token_dtype: str
    """Numpy dtype of stored text ids, <u2 or <u4."""
    image_tokenizer: ImageTokenizerEntry | None = None
    """t2i only."""
    template: str | None = None
    """Dialogue template that question-answer samples were rendered with; None where there are none."""
    record_size: int = 0
    """Samples per block record (text and t2i); the last record of a shard may hold fewer."""
    rejects: dict[str, int] = field(default_factory=dict)
    """Raw records that were left out, by reason."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What prepare was told."""
    index: dict[str, str] = field(default_factory=dict)
    """sha256 of every index file, by name."""

    def to_json(self) -> bytes:
        """The bytes of janus.json."""
        return (json.dumps(asdict(self), indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def parse_manifest(content: bytes, path: Path) -> Manifest:
    """Reads janus.json.

    Raises:
        UserError: Not JSON, another schema, a missing or odd field.
    """
    try:
        fields = json.loads(content)
        schema = fields["schema"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a shard manifest ({error}); {_REDO}") from error
    if schema != SCHEMA:
        raise UserError(f"{path}: its schema is {schema!r}, this version reads {SCHEMA!r}; prepare the data again")
    known = {name: fields[name] for name in Manifest.__dataclass_fields__ if name in fields}
    try:
        known["shards"] = tuple(ShardEntry(**entry) for entry in known["shards"])
        if known.get("image_tokenizer") is not None:
            known["image_tokenizer"] = ImageTokenizerEntry(**known["image_tokenizer"])
        manifest = Manifest(**known)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged shard manifest ({error}); {_REDO}") from error
    bad_names = [entry.name for entry in manifest.shards if "/" in entry.name or not entry.name.endswith(".tar")]
    if manifest.kind not in KINDS or manifest.layout not in LAYOUTS or bad_names:
        value = bad_names[0] if bad_names else manifest.kind if manifest.kind not in KINDS else manifest.layout
        raise UserError(
            f"{path}: {value!r} is neither a kind ({', '.join(KINDS)}), a layout ({', '.join(LAYOUTS)}) nor a plain "
            f"tar name; {_REDO}"
        )
    return manifest


class Source:
    """One prepared directory: counts of every sample in memory-mapped arrays, and where its bytes are."""

    def __init__(self, path: Path, manifest: Manifest, digest: str, arrays: dict[str, np.ndarray]) -> None:
        self.path = path
        self.manifest = manifest
        self.digest = digest
        """sha256 of janus.json, hex; it covers shards and index through their own hashes."""
        self.kind = manifest.kind
        self.num_samples = manifest.num_samples
        self.num_text_tokens: np.ndarray = arrays["ntok"]
        """int32 [N]: text ids of the sample, without what the dialogue adds around them."""
        self.num_und_images: np.ndarray = arrays["nund"]
        """uint8 [N]."""
        self.num_gen_images: np.ndarray = arrays["ngen"]
        """uint8 [N]."""
        self.offset: np.ndarray = arrays["off"]
        self.length: np.ndarray = arrays["len"]
        self.crc: np.ndarray = arrays["crc"]
        self.uids: np.ndarray = arrays["uid"]
        """uint64 [N, 2]: identities, see `uid`."""
        self.image_offset: np.ndarray | None = arrays.get("img")
        """uint64 [N]: first byte of the first variant's ids in the tar; t2i only."""
        self.caption_number: np.ndarray | None = arrays.get("cap")
        """uint8 [N]: 0 begins a new image; t2i only."""
        self.first_samples: np.ndarray = arrays["ptr"]
        """int64 [shards + 1]: first sample of each shard."""
        self._first: list[int] = arrays["ptr"].tolist()

    def __reduce__(self) -> tuple[Callable[[Path], "Source"], tuple[Path]]:
        return open_source, (self.path,)

    def __len__(self) -> int:
        return self.num_samples

    def place_of(self, i: int) -> tuple[int, int]:
        """Returns (shard number, row within the shard) of sample i.

        Raises:
            IndexError: There is no such sample.
        """
        if not 0 <= i < self.num_samples:
            raise IndexError(f"sample {i} of {self.path}, which has {self.num_samples}")
        shard = bisect_right(self._first, i) - 1
        return shard, i - self._first[shard]

    def shard_path(self, shard: int) -> Path:
        """Path of a tar by its number."""
        return self.path / self.manifest.shards_dir / self.manifest.shards[shard].name

    def image_ids_offset(self, i: int, variant: int = 0) -> int:
        """Byte offset of a t2i sample's image ids in its tar."""
        assert self.image_offset is not None and self.manifest.image_tokenizer is not None
        return int(self.image_offset[i]) + variant * 2 * self.manifest.image_tokenizer.num_tokens

    def uid(self, i: int) -> str:
        """Identity of sample i, 32 hex digits."""
        if not 0 <= i < self.num_samples:
            raise IndexError(f"sample {i} of {self.path}, which has {self.num_samples}")
        return words_text(self.uids[i])


def open_source(path: str | Path) -> Source:
    """Opens a prepared directory after checking that every shard and index file is there in full size.

    Raises:
        UserError: No manifest, an unfinished directory, a missing shard, a truncated tar, a damaged index.
    """
    path = Path(path)
    manifest_path = path / MANIFEST_NAME
    try:
        content = manifest_path.read_bytes()
    except OSError as error:
        state = "prepare has not finished there" if (path / "parts").is_dir() else "it is no directory of shards"
        raise UserError(
            f"{manifest_path}: cannot be read, {state}; run `janus-mega data prepare` (it continues where it stopped)"
        ) from error
    manifest = parse_manifest(content, manifest_path)
    for entry in manifest.shards:
        _check_shard(path / manifest.shards_dir / entry.name, entry)
    of_samples = SAMPLE_COLUMNS | (DRAWING_COLUMNS if manifest.kind == "t2i" else {})
    names = {**of_samples, "ptr": "<i8"}
    arrays = {name: _open_array(path / "index" / f"{name}.npy", dtype) for name, dtype in names.items()}
    arrays["uid"] = _open_array(path / "index" / "uid.npy", "<u8", 2)
    counts = [entry.num_samples for entry in manifest.shards]
    if arrays["ptr"].tolist() != np.cumsum([0, *counts]).tolist() or sum(counts) != manifest.num_samples:
        raise UserError(
            f"{path / 'index' / 'ptr.npy'}: disagrees with {MANIFEST_NAME} about samples per shard; {_REDO}"
        )
    for name in (*of_samples, "uid"):
        if len(arrays[name]) != manifest.num_samples:
            raise UserError(
                f"{path / 'index' / name}.npy: has {len(arrays[name])} entries, {MANIFEST_NAME} says "
                f"{manifest.num_samples}; {_REDO}"
            )
    return Source(path, manifest, hashlib.sha256(content).hexdigest(), arrays)


def _check_shard(shard: Path, entry: ShardEntry) -> None:
    """Compares a tar's size with the manifest."""
    try:
        size = shard.stat().st_size
    except OSError as error:
        raise UserError(f"{shard}: the shard is missing ({entry.bytes} bytes in {MANIFEST_NAME}); {_REDO}") from error
    if size != entry.bytes:
        what = "truncated" if size < entry.bytes else "longer than written"
        raise UserError(f"{shard}: the tar is {what}: {size} bytes, {entry.bytes} in {MANIFEST_NAME}; {_REDO}")


def _open_array(path: Path, dtype: str, width: int = 1) -> np.ndarray:
    """Memory-maps one column of the index (an empty one is read, mmap refuses it)."""
    try:
        array = open_npy(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: missing or damaged index file ({error}); {_REDO}") from error
    if array.dtype.str != dtype or array.shape[1:] != (() if width == 1 else (width,)):
        shape = "[N]" if width == 1 else f"[N, {width}]"
        raise UserError(f"{path}: expected {dtype} {shape}, found {array.dtype.str} {list(array.shape)}; {_REDO}")
    return array
