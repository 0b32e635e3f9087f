"""The files of a checkpoint directory: names, hashes, manifest, and what is wrong with them.

A checkpoint is a directory that is complete or absent. Everything is written into a directory aside, every file is
hashed while it is written and fsynced, the manifest (which lists every file with size and SHA-256) comes last, then
the directory gets its name by one rename. So a directory with a valid manifest is a whole checkpoint.

    step-00000120/
      manifest.json            schema, step, attempt, layout, digests of configuration and plan, commit, files: name ->
                               bytes and digest; and a digest of itself
      tensors.json             tensor name -> shape, number format, pieces (file, key, offset, shape, sha256)
      state.json  config.yaml  where the run stands; the resolved configuration
      tensors-00000.safetensors ...  one file per rank; its digest is over the digests of its header and its tensors
      text_tokenizer/  image_tokenizer/   what export and generation need besides

The manifest is one way of writing its content: a byte that could be another one is damage. Schema 1 (no digests of
pieces; files of tensors hashed as a whole) is read too.
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from data_pipeline.errors import UserError
from janus_mega.checkpoint.disk import DISK, Disk
from janus_mega.checkpoint.index import Index
from janus_mega.checkpoint.tensor_file import (
    CHUNK_BYTES,
    Hashing,
    TensorFile,
    Unreadable,
    damaged,
    new_digest,
    open_regular,
)

SCHEMA = "janus-checkpoint/2"
OLDER_SCHEMAS = ("janus-checkpoint/1",)
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

_STEP_DIR = re.compile(r"step-(\d{8,})(?:-(\d+))?")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_JSON_BYTES = 2**31


class UnknownSchema(UserError):
    """A whole checkpoint of a version that this one cannot read; passing over it would lose work in silence."""


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file as the manifest lists it."""

    name: str
    bytes: int
    sha256: str
    is_tree: bool = False
    """Whether the digest is over those of the parts of a tensor file, see `tensor_file.Digests.tree`."""


def rank_file(rank: int) -> str:
    """File of the tensors that a rank writes."""
    return f"tensors-{rank:05d}.safetensors"


def parse_step(name: str) -> tuple[int, int] | None:
    """Step, and how often it had been saved before, of a checkpoint directory's name; None for other names."""
    match = _STEP_DIR.fullmatch(name)
    return (int(match[1]), int(match[2] or 0)) if match else None


def write_bytes(path: Path, content: bytes, name: str | None = None, disk: Disk = DISK) -> FileEntry:
    """Writes and fsyncs a small file; returns its size and hash under `name` (default: the file's own).

    Raises:
        ValueError: it is larger than a reader would take; nothing was written.
    """
    if len(content) > _MAX_JSON_BYTES:
        raise ValueError(
            f"{path.name}: {len(content)} bytes, at most {_MAX_JSON_BYTES} are read again; "
            "save on fewer ranks or with a lower ZeRO stage, so that there are fewer pieces"
        )
    with disk.create(path) as file:
        disk.write(file, content)
        disk.sync_file(file)
    return FileEntry(name or path.name, len(content), hashlib.sha256(content).hexdigest())


def copy_file(source: Path, path: Path, name: str, disk: Disk = DISK) -> FileEntry:
    """Copies a file in chunks, hashing what is written; fsynced."""
    digest, size = new_digest(), 0
    with source.open("rb") as reader, disk.create(path) as writer, Hashing() as hashing:
        while chunk := reader.read(CHUNK_BYTES):
            hashing.update(digest, chunk)
            disk.write(writer, chunk)
            size += len(chunk)
        disk.sync_file(writer)
    return FileEntry(name, size, digest.digest().hex())


def hash_file(path: Path) -> FileEntry:
    """Size and SHA-256 of what the disk holds."""
    digest, size = hashlib.sha256(), 0
    with open_regular(path) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return FileEntry(path.name, size, digest.hexdigest())


def read_listed(directory: Path, manifest: Mapping[str, Any], name: str, *, verify: bool = True) -> bytes:
    """Content of a small file, the very bytes that were compared with the manifest.

    Raises:
        UserError: they differ, or the file cannot be read.
    """
    path, entry = directory / name, manifest["files"][name]
    try:
        with open_regular(path) as file:
            content = _read_all(file.fileno())
    except OSError as error:
        raise damaged(path, error) from None
    if len(content) != entry["bytes"]:
        raise damaged(path, _other_size(len(content), entry))
    if verify and hashlib.sha256(content).hexdigest() != entry.get("sha256"):
        raise damaged(path, "bytes do not match the manifest's SHA-256")
    return content


def _read_all(descriptor: int) -> bytes:
    size = os.fstat(descriptor).st_size
    if size > _MAX_JSON_BYTES:
        raise OSError(f"{size} bytes are too many for such a file")
    with open(descriptor, "rb", closefd=False) as file:
        return file.read(size + 1)


def _other_size(size: int, entry: Mapping[str, Any]) -> str:
    return f"{size} bytes, the manifest says {entry['bytes']}"


def dump_json(value: Any) -> bytes:
    """JSON for people to read too, written in one way: sorted keys, indent 1."""
    return json.dumps(value, sort_keys=True, indent=1).encode()


def dump_compact(value: Any) -> bytes:
    """JSON with sorted keys and no white space: for long tables, where an indent takes four times as long to write."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def write_manifest(directory: Path, about: Mapping[str, Any], files: Sequence[FileEntry], disk: Disk = DISK) -> None:
    """Writes and fsyncs the manifest, the last file of a checkpoint.

    Args:
        directory: the checkpoint.
        about: step, world_size and whatever else the manifest tells, as JSON values.
        files: all other files.
        disk: where it happens.
    """
    body: dict[str, Any] = {
        "attempt": 0,
        "layout": {},
        "commit": "",
        "config_sha256": "",
        "plan_digest": "",
        **about,
        "schema": SCHEMA,
        "files": {
            entry.name: {"bytes": entry.bytes, "tree_sha256" if entry.is_tree else "sha256": entry.sha256}
            for entry in files
        },
    }
    body["sha256"] = hashlib.sha256(dump_json(body)).hexdigest()
    write_bytes(directory / MANIFEST_FILE, dump_json(body), disk=disk)


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest, its own digest checked.

    Raises:
        UserError: there is none, or it is damaged.
        UnknownSchema: it was written by an unknown version.
    """
    path = directory / MANIFEST_FILE
    try:
        with open_regular(path) as file:
            content = _read_all(file.fileno())
        body = json.loads(content.decode("utf-8"))
        claimed = body.pop("sha256")
        schema = body["schema"]
        is_whole = claimed == hashlib.sha256(dump_json(body)).hexdigest()
        is_canonical = content == dump_json({**body, "sha256": claimed})
    except FileNotFoundError:
        raise Unreadable(  # on a host that does not see it yet, too
            f"{directory}: no {MANIFEST_FILE}, so this is not a checkpoint; give a step directory"
        ) from None
    except OSError as error:
        raise damaged(path, error) from None
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise damaged(path, "not a readable manifest") from None
    if not is_whole or not is_canonical:
        raise damaged(path, "its content does not match its digest")
    if schema not in (SCHEMA, *OLDER_SCHEMAS):
        raise UnknownSchema(
            f"{path}: schema {schema!r} is unknown, this version reads {', '.join((*OLDER_SCHEMAS, SCHEMA))}; "
            "use the version that wrote it"
        )
    if not _has_form(body):
        raise damaged(path, "fields are missing or of another kind")
    return body


def refuse_unknown_schema(directory: Path) -> None:
    """Raises UnknownSchema if a whole checkpoint of another version lies there; is silent about everything else."""
    try:
        read_manifest(directory)
    except UnknownSchema:
        raise
    except UserError:
        return


def _has_form(body: dict[str, Any]) -> bool:
    """Whether a manifest's fields are what the rest of this package takes for granted."""
    files = body.get("files")
    return (
        all(type(body.get(name)) is int and body[name] >= 0 for name in ("step", "world_size"))
        and isinstance(files, dict)
        and {INDEX_FILE, STATE_FILE, CONFIG_FILE} <= files.keys()
        and MANIFEST_FILE not in files
        and all(_is_inside(name) and _is_entry(entry) for name, entry in files.items())
    )


def _is_inside(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return bool(parts) and "/".join(parts) == name and not {"/", "..", "."} & set(parts) and "\0" not in name


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or type(entry.get("bytes")) is not int or entry["bytes"] < 0:
        return False
    digests = [value for name, value in entry.items() if name in ("sha256", "tree_sha256")]
    return len(digests) == 1 and isinstance(digests[0], str) and _SHA256.fullmatch(digests[0]) is not None


def find_damage(directory: Path, *, content: bool = True) -> str | None:
    """One line about the first thing that is wrong with a checkpoint directory, or None when it is whole.

    Args:
        directory: the checkpoint.
        content: also hash every file; otherwise names, kinds and sizes alone.
    """
    return damage_of(partial(check_directory, directory, content=content))


def damage_of(check: Callable[[], object]) -> str | None:
    """What a check raises about a checkpoint, as a line; None where it raises nothing."""
    try:
        check()
    except (UserError, OSError) as error:
        return str(error)
    return None


def check_directory(directory: Path, *, content: bool = True) -> None:
    """Raises UserError or OSError about the first thing that is wrong with a directory; see `find_damage`."""
    directory = Path(directory)
    manifest = read_manifest(directory)
    stranger = next(_strangers(directory, manifest), None)
    named = parse_step(directory.name)
    if named is not None and named[0] != manifest["step"]:
        raise UserError(
            f"{directory}: its manifest is of step {manifest['step']}; the directory was renamed, use an older one"
        )
    for name in manifest["files"]:
        check_file(directory, manifest, name, content=content)
    if stranger is not None:
        raise UserError(f"{stranger}: not listed in {MANIFEST_FILE}; remove it")
    if content:
        check_table(directory, manifest)


def check_table(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Raises UserError where the table of tensors and the headers of their files disagree; reads no tensor."""
    read_index(directory, manifest).check_all()


def read_index(directory: Path, manifest: Mapping[str, Any], *, verify: bool = True) -> Index:
    """The table of tensors; UserError if it is damaged."""
    content = read_listed(directory, manifest, INDEX_FILE, verify=verify)
    return Index(directory / INDEX_FILE, content, manifest["files"])


def _strangers(directory: Path, manifest: Mapping[str, Any]) -> Iterator[Path]:
    """Files, links and folders that the manifest knows nothing of."""
    files = {MANIFEST_FILE, *manifest["files"]}
    folders = {str(folder) for name in files for folder in PurePosixPath(name).parents}
    pending = [directory]
    while pending:
        for path in sorted(pending.pop().iterdir()):
            name = path.relative_to(directory).as_posix()
            if path.is_dir() and not path.is_symlink() and name in folders:
                pending.append(path)
            elif name not in files:
                yield path


def check_file(directory: Path, manifest: Mapping[str, Any], name: str, *, content: bool = True) -> None:
    """Compares one file with what the manifest says of it.

    Args:
        directory: the checkpoint.
        manifest: its manifest.
        name: one of its files.
        content: hash it; otherwise its kind and size alone.

    Raises:
        UserError: it is damaged; `Unreadable` if the system did not give it.
    """
    path, entry = directory / name, manifest["files"][name]
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            raise damaged(path, "not a file")
        if status.st_size != entry["bytes"]:
            raise damaged(path, _other_size(status.st_size, entry))
        if content:
            is_same = (
                TensorFile(path).digests().tree == entry["tree_sha256"]
                if "tree_sha256" in entry
                else hash_file(path).sha256 == entry["sha256"]
            )
            if not is_same:
                raise damaged(path, "bytes do not match the manifest's SHA-256")
    except OSError as error:
        raise damaged(path, error) from None
