"""The files of a checkpoint directory: names, hashes, manifest, durable writing.

A checkpoint is a directory that is complete or absent. Everything is written into a directory aside, every file is
hashed while it is written and fsynced, the manifest (which lists every file with size and SHA-256) comes last, then
the directory gets its name by one rename. So a directory with a valid manifest is a whole checkpoint.

Tensors are written as safetensors by the few lines of `write_safetensors` rather than by the library: bytes go out
one tensor at a time and are hashed on their way, so a save needs no second copy of the model and the hash is of what
was meant, not of what a disk gave back. The library reads the files.

    step-00000120/
      manifest.json            schema, step, world_size, files: name -> bytes, sha256; and a digest of itself
      tensors.json             tensor name -> shape, number format, pieces (file, key, offset, shape)
      state.json  config.yaml  where the run stands; the resolved configuration
      tensors-00000.safetensors ...  one file per rank
      text_tokenizer/  image_tokenizer/   what export and generation need besides
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.errors import UserError
from janus_mega.checkpoint.disk import DISK, Disk

SCHEMA = "janus-checkpoint/1"
MANIFEST_FILE = "manifest.json"
TRASH_PREFIX = ".trash-"
"""What is to be removed gets a name that begins so, first of all."""
INDEX_FILE = "tensors.json"
STATE_FILE = "state.json"
CONFIG_FILE = "config.yaml"
TEXT_TOKENIZER_DIR = "text_tokenizer"
"""Holds the one file that rebuilds the text tokenizer: a sentencepiece .model or a tokenizer.json."""
IMAGE_TOKENIZER_DIR = "image_tokenizer"
"""A copy of the image tokenizer's directory."""

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Number formats by their safetensors name."""
_CHUNK_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file as the manifest lists it."""

    name: str
    bytes: int
    sha256: str


def rank_file(rank: int) -> str:
    """File of the tensors that a rank writes."""
    return f"tensors-{rank:05d}.safetensors"


def write_safetensors(
    path: Path, tensors: Sequence[tuple[str, Tensor]], metadata: dict[str, str], disk: Disk = DISK
) -> FileEntry:
    """Writes and fsyncs a safetensors file, moving one tensor at a time to the CPU; returns its size and hash."""
    ordered = sorted(tensors, key=lambda item: -item[1].element_size())  # keeps every tensor aligned, as readers expect
    header: dict[str, Any] = {"__metadata__": metadata}
    position = 0
    for key, tensor in ordered:
        if key in header:
            raise ValueError(f"{path.name}: tensor {key} is given twice")
        end = position + tensor.numel() * tensor.element_size()
        header[key] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with disk.create(path) as file:
        head = len(text).to_bytes(8, "little") + text
        digest.update(head)
        disk.write(file, head)
        for _, tensor in ordered:
            raw = memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
            for start in range(0, len(raw), _CHUNK_BYTES):
                digest.update(raw[start : start + _CHUNK_BYTES])
                disk.write(file, raw[start : start + _CHUNK_BYTES])
        disk.sync_file(file)
    return FileEntry(path.name, 8 + len(text) + position, digest.hexdigest())


def write_bytes(path: Path, content: bytes, name: str | None = None, disk: Disk = DISK) -> FileEntry:
    """Writes and fsyncs a small file; returns its size and hash under `name` (default: the file's own)."""
    with disk.create(path) as file:
        disk.write(file, content)
        disk.sync_file(file)
    return FileEntry(name or path.name, len(content), hashlib.sha256(content).hexdigest())


def copy_file(source: Path, path: Path, name: str, disk: Disk = DISK) -> FileEntry:
    """Copies a file in chunks, hashing what is written; fsynced."""
    digest, size = hashlib.sha256(), 0
    with source.open("rb") as reader, disk.create(path) as writer:
        while chunk := reader.read(_CHUNK_BYTES):
            digest.update(chunk)
            disk.write(writer, chunk)
            size += len(chunk)
        disk.sync_file(writer)
    return FileEntry(name, size, digest.hexdigest())


def hash_file(path: Path) -> FileEntry:
    """Size and SHA-256 of what the disk holds."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return FileEntry(path.name, size, digest.hexdigest())


def dump_json(value: Any) -> bytes:
    """Canonical JSON: sorted keys, no spaces to differ by."""
    return json.dumps(value, sort_keys=True, indent=1).encode()


def write_manifest(directory: Path, step: int, world_size: int, files: Sequence[FileEntry], disk: Disk = DISK) -> None:
    """Writes and fsyncs the manifest, the last file of a checkpoint."""
    body: dict[str, Any] = {
        "schema": SCHEMA,
        "step": step,
        "world_size": world_size,
        "files": {entry.name: {"bytes": entry.bytes, "sha256": entry.sha256} for entry in files},
    }
    body["sha256"] = hashlib.sha256(dump_json(body)).hexdigest()
    write_bytes(directory / MANIFEST_FILE, dump_json(body), disk=disk)


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest, its own digest checked.

    Raises:
        UserError: there is none, it is damaged, or it was written by an unknown version.
    """
    path = directory / MANIFEST_FILE
    try:
        body = json.loads(path.read_bytes())
        claimed = body.pop("sha256")
        schema = body["schema"]
    except FileNotFoundError:
        raise UserError(
            f"{directory}: no {MANIFEST_FILE}, so this is not a checkpoint; give a step directory"
        ) from None
    except (ValueError, KeyError, AttributeError, TypeError):
        raise UserError(f"{path}: not a readable manifest; the checkpoint is damaged, use an older one") from None
    if claimed != hashlib.sha256(dump_json(body)).hexdigest():
        raise UserError(f"{path}: its content does not match its digest; the checkpoint is damaged, use an older one")
    if schema != SCHEMA:
        raise UserError(
            f"{path}: schema {schema!r} is unknown, this version reads {SCHEMA!r}; use the version that wrote it"
        )
    return body


def find_damage(directory: Path, *, content: bool = True) -> str | None:
    """One line about the first thing that is wrong with a checkpoint directory, or None when it is whole.

    Args:
        directory: the checkpoint.
        content: also hash every file; otherwise names and sizes alone.
    """
    try:
        manifest = read_manifest(directory)
    except (UserError, OSError) as error:
        return str(error)
    files = manifest["files"]
    for name in files:
        damage = find_file_damage(directory, manifest, name, content=content)
        if damage is not None:
            return damage
    present = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    extra = sorted(present - set(files) - {MANIFEST_FILE})
    return f"{directory / extra[0]}: not listed in {MANIFEST_FILE}; remove it" if extra else None


def find_file_damage(directory: Path, manifest: dict[str, Any], name: str, *, content: bool = True) -> str | None:
    """One line about what is wrong with one listed file, or None."""
    path, entry = directory / name, manifest["files"][name]
    try:
        size = path.stat().st_size
        if size != entry["bytes"]:
            return (
                f"{path}: {size} bytes, the manifest says {entry['bytes']}; the checkpoint is damaged, use an older one"
            )
        if content and hash_file(path).sha256 != entry["sha256"]:
            return f"{path}: bytes do not match the manifest's SHA-256; the checkpoint is damaged, use an older one"
    except OSError as error:
        return f"{path}: {error.strerror or error}; the checkpoint is damaged, use an older one"
    return None
