"""Masks on disk: which samples of a source do not exist for a plan, and why.

    <source>/masks/<name>.npy    uint8 [N], 1 = left out
    <source>/masks/<name>.json   manifest digest of the source, samples left out by reason, what the mask was made by,
                                 sha256 of the .npy

A mask never touches shards or index, so deleting its two files undoes it. It counts samples by their number, which
a newly prepared source may give to others: therefore it names the manifest it was made for, and is refused beside
another. The .json is written last and removed first; a mask whose two files disagree is damaged and says so.
"""

import hashlib
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.files import write_aside
from data_pipeline.manifest import Source

MASKS_DIR = "masks"
"""Folder of the masks below a source."""

_VERSION = 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def write_mask(
    source: Source, name: str, left_out: np.ndarray, reasons: Mapping[str, int], settings: Mapping[str, Any]
) -> str:
    """Writes a mask, or replaces the one of that name; the same arguments give the same bytes.

    Args:
        source: What it belongs to.
        name: Letters, digits, `-` and `_`.
        left_out: bool [N], True where the sample does not exist for a plan.
        reasons: Samples left out, by reason; one sample may count under several.
        settings: What the mask was made by, ready for JSON; no times, so that bytes repeat.

    Returns:
        Its digest, as `mask_digest` gives it.

    Raises:
        UserError: Another number of samples, a name that is no plain word, or a directory that cannot be written.
    """
    _check_name(source, name)
    if left_out.shape != (source.num_samples,) or left_out.dtype != np.bool_:
        raise UserError(
            f"{source.path}: mask {name!r} is {left_out.dtype} {list(left_out.shape)}, the source needs bool "
            f"[{source.num_samples}]; make the mask for this source"
        )
    content = npy_bytes(left_out.astype(np.uint8))
    digest = hashlib.sha256(content).hexdigest()
    facts = {
        "v": _VERSION,
        "source": source.digest,
        "num_samples": source.num_samples,
        "num_left_out": int(np.count_nonzero(left_out)),
        "reasons": {reason: int(count) for reason, count in reasons.items()},
        "settings": dict(settings),
        "sha256": digest,
    }
    array_path, facts_path = _paths(source, name)
    try:
        array_path.parent.mkdir(exist_ok=True)
        facts_path.unlink(missing_ok=True)
        write_aside(array_path, content)
        write_aside(facts_path, (json.dumps(facts, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        raise UserError(
            f"{array_path}: the mask cannot be written ({error.strerror}); make the directory writable"
        ) from error
    return digest


def read_mask(source: Source, name: str) -> np.ndarray:
    """Returns bool [N], True where the sample is left out.

    Raises:
        UserError: There is no such mask, it was made for another manifest, or its files are damaged.
    """
    facts = mask_facts(source, name)
    path = _paths(source, name)[0]
    try:
        content = path.read_bytes()
        array = np.load(io.BytesIO(content), allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise _damaged(path, str(error)) from error
    if hashlib.sha256(content).hexdigest() != facts["sha256"]:
        raise _damaged(path, "its sha256 is not that of its .json")
    if array.dtype != np.uint8 or array.shape != (source.num_samples,):
        raise _damaged(path, f"it holds {array.dtype} {list(array.shape)}, not uint8 [{source.num_samples}]")
    return np.asarray(array != 0)


def read_masks(source: Source, names: list[str]) -> np.ndarray:
    """Returns bool [N], True where any of the masks leaves the sample out; no names leave out nothing.

    Raises:
        UserError: As `read_mask`.
    """
    left_out = np.zeros(source.num_samples, np.bool_)
    for name in names:
        left_out |= read_mask(source, name)
    return left_out


def mask_digest(source: Source, name: str) -> str:
    """sha256 (hex) of the mask's array: what it leaves out, whatever the reasons.

    Raises:
        UserError: There is no such mask, it was made for another manifest, or its .json is damaged.
    """
    return str(mask_facts(source, name)["sha256"])


def mask_facts(source: Source, name: str) -> dict[str, Any]:
    """The mask's .json: source, num_samples, num_left_out, reasons, settings, sha256.

    Raises:
        UserError: There is no such mask, it was made for another manifest, or its .json is damaged.
    """
    _check_name(source, name)
    path = _paths(source, name)[1]
    try:
        content = path.read_bytes()
    except OSError as error:
        known = list_masks(source)
        there = f"there are: {', '.join(known)}" if known else "there is none"
        raise UserError(
            f"{source.path}: no mask {name!r}, {there}; correct the name or make it with `janus-mega data mask "
            f"{source.path} --name {name} ...`"
        ) from error
    try:
        facts = json.loads(content)
        version, made_for = facts["v"], facts["source"]
        if not isinstance(facts["sha256"], str):
            raise TypeError("its sha256 is no text")
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, str(error)) from error
    if version != _VERSION:
        raise UserError(f"{path}: mask of version {version}, this version reads {_VERSION}; make the mask again")
    if made_for != source.digest:
        raise UserError(
            f"{path}: the mask was made for manifest {made_for}, the source's is {source.digest} now; make the mask "
            f"again, or remove it with `janus-mega data mask {source.path} --remove {name}`"
        )
    return dict(facts)


def list_masks(source: Source) -> list[str]:
    """Names of the masks of a source, sorted; one made for another manifest is listed too."""
    paths = (source.path / MASKS_DIR).glob("*.json")
    return sorted(path.stem for path in paths if _NAME.fullmatch(path.stem))


def remove_mask(source: Source, name: str) -> None:
    """Deletes the two files of a mask, also of one that is damaged or was made for another manifest.

    Raises:
        UserError: There is no such mask, or the files cannot be deleted.
    """
    _check_name(source, name)
    array_path, facts_path = _paths(source, name)
    if not array_path.exists() and not facts_path.exists():
        known = list_masks(source)
        there = f"there are: {', '.join(known)}" if known else "there is none"
        raise UserError(f"{source.path}: no mask {name!r} to remove, {there}; correct the name")
    try:
        facts_path.unlink(missing_ok=True)
        array_path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{array_path}: the mask cannot be removed ({error.strerror}); delete its files") from error


def npy_bytes(array: np.ndarray) -> bytes:
    """A .npy file of an array."""
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def _paths(source: Source, name: str) -> tuple[Path, Path]:
    folder = source.path / MASKS_DIR
    return folder / f"{name}.npy", folder / f"{name}.json"


def _check_name(source: Source, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{source.path}: {name!r} is no name of a mask; use up to 64 letters, digits, - and _, beginning with a "
            "letter or digit"
        )


def _damaged(path: Path, why: str) -> UserError:
    return UserError(f"{path}: damaged mask ({why}); make the mask again")
