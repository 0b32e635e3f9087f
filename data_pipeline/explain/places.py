"""The index made anew from a finished tar: where its samples lie, by headers and records alone.

The writer notes places as it goes; this reads them back by another road, so that the two can be compared.
"""

import io
import json
from itertools import groupby
from pathlib import Path

import numpy as np

from data_pipeline.explain.member_checks import split_name
from data_pipeline.explain.tar_walk import Entry
from data_pipeline.manifest import Manifest
from data_pipeline.npy import array_of
from data_pipeline.uid import uid_text, uid_words


def places_in_tar(path: Path, entries: list[Entry], manifest: Manifest) -> dict[str, np.ndarray]:
    """Columns of the index for the samples of one tar, those that it tells; one entry per sample.

    Args:
        path: The tar.
        entries: Its members in order.
        manifest: What it says about kind and layout.

    Raises:
        ValueError: A record does not read, or misses a member.
    """
    with path.open("rb") as tar:
        if manifest.layout == "pairs":
            return {}
        if manifest.kind == "interleaved":
            return _documents(tar, entries)
        return _records(tar, entries, manifest)


def _runs(entries: list[Entry]) -> list[dict[str, Entry]]:
    """Members of each WebDataset sample by extension."""
    named = [(cut, entry) for entry in entries if entry.is_file and (cut := split_name(entry.name)) is not None]
    return [{cut[1]: entry for cut, entry in members} for _, members in groupby(named, key=lambda member: member[0][0])]


def _documents(tar: io.BufferedReader, entries: list[Entry]) -> dict[str, np.ndarray]:
    """Samples that are runs of members."""
    off, length, tokens, images, uids = [], [], [], [], []
    for run in _runs(entries):
        members = list(run.values())
        off.append(members[0].header)
        length.append(members[-1].end - members[0].header)
        document = json.loads(_content(tar, run["doc.json"]))
        tokens.append(sum(part["n"] for part in document["seq"] if part["t"] == "text"))
        images.append(sum(part["t"] == "image" for part in document["seq"]))
        uids += [document["uid"]] if uid_text(str(document.get("uid"))) == document.get("uid") else []
    told = {"uid": uid_words(uids)} if len(uids) == len(off) else {}
    return told | {
        "off": np.array(off, np.uint64),
        "len": np.array(length, np.uint32),
        "ntok": np.array(tokens, np.int32),
        "nund": np.array(images, np.uint8),
    }


def _records(tar: io.BufferedReader, entries: list[Entry], manifest: Manifest) -> dict[str, np.ndarray]:
    """Samples that are rows of block records."""
    columns: dict[str, list[np.ndarray]] = {}
    width = np.dtype(manifest.token_dtype).itemsize
    for run in _runs(entries):
        ends = _array(tar, run["off.npy"]).astype(np.int64)
        counts = np.diff(ends, prepend=0)
        start = run["tok.npy"].data + _payload_start(tar, run["tok.npy"])
        found: dict[str, np.ndarray] = {
            "off": (start + width * (ends - counts)).astype(np.uint64),
            "len": (width * counts).astype(np.uint32),
            "ntok": counts.astype(np.int32),
            "uid": _array(tar, run["uid.npy"]),
        }
        if manifest.kind == "t2i" and manifest.image_tokenizer is not None:
            row_bytes = 2 * manifest.image_tokenizer.num_tokens * manifest.image_tokenizer.num_variants
            image_row = _array(tar, run["cap.npy"]) if "cap.npy" in run else np.arange(len(ends))
            image_start = run["vq.npy"].data + _payload_start(tar, run["vq.npy"])
            found["img"] = (image_start + image_row.astype(np.int64) * row_bytes).astype(np.uint64)
        for name, values in found.items():
            columns.setdefault(name, []).append(values)
    return {name: np.concatenate(parts) for name, parts in columns.items()}


def _content(tar: io.BufferedReader, entry: Entry) -> bytes:
    tar.seek(entry.data)
    return tar.read(entry.size)


def _array(tar: io.BufferedReader, entry: Entry) -> np.ndarray:
    return array_of(_content(tar, entry))


def _payload_start(tar: io.BufferedReader, entry: Entry) -> int:
    """Bytes before the values of a .npy of format 1.0."""
    tar.seek(entry.data + 8)
    return 10 + int.from_bytes(tar.read(2), "little")
