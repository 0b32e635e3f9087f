"""What must hold after any crash, checked on simulated disks without writing them out.

A model of discovery (names, sizes, digests: the newest directory whose manifest verifies) says what a start after the
crash would find, and the rules say what it must find. That the model and the real code agree is tested by writing some
hundred of the states to a real folder (`write_out`); the model is there because it is a thousand times faster.

* Whatever stands under a step name is a whole checkpoint, exactly as its save left it: complete or absent.
* The newest acknowledged checkpoint is found, or a newer one that is whole. Acknowledged: the call had returned.
* A checkpoint that retention was told to keep is there from its acknowledgement on.
* A directory that conversions write is complete or absent, and there once its call has returned.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from janus_mega.checkpoint.format import MANIFEST_FILE, dump_json
from tests.support.crash_states import WHOLE, Fate, Point, State, survived

STEP_NAME = re.compile(r"step-(\d{8,})(?:-(\d+))?")
NO_FILE = -1
"""Size of an empty directory."""
Content = frozenset[tuple[str, str]]
"""(relative name, SHA-256) of all files of a directory."""


@dataclass(frozen=True, slots=True)
class Begun:
    """Somebody began to write something."""

    label: str


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """The call that wrote something has returned."""

    label: str


@dataclass(frozen=True, slots=True)
class Damaged:
    """The medium changes what was written; nothing is promised of it any more."""

    label: str
    name: str
    """Of its directory."""


@dataclass(frozen=True, slots=True)
class Written:
    """One thing that a trace writes, as it was when its call returned."""

    label: str
    folder: str
    """Of the checkpoint root that it lies in, or of an export itself; relative to the base."""
    content: Content
    is_export: bool = False
    must_stay: bool = True
    """Not removed by anything in the trace."""


def content_of(directory: Path) -> Content:
    """The files of a real directory."""
    return frozenset(
        (path.relative_to(directory).as_posix(), hashlib.sha256(path.read_bytes()).hexdigest())
        for path in directory.rglob("*")
        if path.is_file()  # an empty directory is nothing that a writer should leave
    )


@dataclass
class Rules:
    """The promises about one trace, in the order in which things were written."""

    written: list[Written]
    verdicts: dict[tuple[tuple[str, int, int, Fate], ...], tuple[Content, bool]] = field(default_factory=dict)
    hashes: dict[tuple[int, int, Fate], str] = field(default_factory=dict)

    def violations(self, point: Point, state: State) -> Iterable[str]:
        """One line about every promise that a state breaks."""
        damaged = {note.label: note.name for note in point.notes if isinstance(note, Damaged)}
        begun = {note.label for note in point.notes if isinstance(note, Begun)}
        acknowledged = {note.label for note in point.notes if isinstance(note, Acknowledged)} - set(damaged)
        for folder in dict.fromkeys(item.folder for item in self.written):
            items = [item for item in self.written if item.folder == folder and item.label in begun]
            if self.written and next(item for item in self.written if item.folder == folder).is_export:
                yield from self._export_violations(state, folder, items, acknowledged)
            else:
                yield from self._root_violations(state, folder, items, acknowledged, set(damaged.values()))

    def find(self, state: State, root: str) -> str | None:
        """Name of the checkpoint that discovery would choose."""
        for name, inode in self._published(state, root):
            if self._judge(state, inode)[1]:
                return name
        return None

    def _root_violations(
        self, state: State, root: str, items: list[Written], acknowledged: set[str], damaged: set[str]
    ) -> Iterable[str]:
        present = {name: self._judge(state, inode) for name, inode in self._published(state, root)}
        order = {item.content: number for number, item in enumerate(items)}
        for name, (content, _) in present.items():
            if content not in order and name not in damaged:
                yield f"{root}/{name}: neither whole nor absent"
        found = next((content for content, whole in present.values() if whole), None)
        newest = max((number for number, item in enumerate(items) if item.label in acknowledged), default=None)
        if newest is not None and (found is None or order.get(found, -1) < newest):
            yield f"{root}: {items[newest].label} was acknowledged, discovery finds something else or nothing"
        whole_ones = {content for content, whole in present.values() if whole}
        for item in items:
            if item.must_stay and item.label in acknowledged and item.content not in whole_ones:
                yield f"{root}: {item.label} was acknowledged and to be kept, and is gone"

    def _export_violations(
        self, state: State, folder: str, items: list[Written], acknowledged: set[str]
    ) -> Iterable[str]:
        inode = state.find(folder)
        content = None if inode is None else self._content(state, inode)[1]
        order = {item.content: number for number, item in enumerate(items)}
        if content is not None and content not in order:
            yield f"{folder}: neither complete nor absent"
        newest = max((number for number, item in enumerate(items) if item.label in acknowledged), default=None)
        is_busy = any(item.label not in acknowledged for item in items)  # replacing it, so it may be absent
        if newest is not None and not is_busy and (content is None or order.get(content, -1) < newest):
            yield f"{folder}: {items[newest].label} had returned, the directory is another one or absent"

    def _published(self, state: State, root: str) -> list[tuple[str, int]]:
        """(name, inode) of everything with a step name, newest first."""
        inode = state.find(root)
        if inode is None:
            return []
        matches = [(STEP_NAME.fullmatch(name), name, child) for name, child in state.entries[inode].items()]
        rows = [(int(match[1]), int(match[2] or 0), name, child) for match, name, child in matches if match]
        return [(name, child) for _, _, name, child in sorted(rows, reverse=True)]

    def _content(self, state: State, inode: int) -> tuple[tuple[tuple[str, int, int, Fate], ...], Content]:
        rows = []
        for name, file in sorted(state.files_below(inode)):
            size = len(state.contents[file]) if file in state.contents else NO_FILE
            rows.append((name, file, size, state.fates.get(file, WHOLE)))
        key = tuple(rows)
        if key not in self.verdicts:
            content = frozenset((name, self._hash(state, file, size, fate)) for name, file, size, fate in key)
            self.verdicts[key] = content, self._is_whole(state, {row[0]: row[1] for row in key})
        return key, self.verdicts[key][0]

    def _judge(self, state: State, inode: int) -> tuple[Content, bool]:
        return self.verdicts[self._content(state, inode)[0]]

    def _hash(self, state: State, file: int, size: int, fate: Fate) -> str:
        key = (file, size, fate)
        if key not in self.hashes:
            content = b"directory" if size == NO_FILE else survived(state.contents[file], fate)
            self.hashes[key] = hashlib.sha256(content).hexdigest()
        return self.hashes[key]

    def _is_whole(self, state: State, files: dict[str, int]) -> bool:
        """Whether a manifest is there, matches its own digest, and lists exactly these files with these bytes."""
        manifest = files.pop(MANIFEST_FILE, None)
        if manifest is None:
            return False
        try:
            body = json.loads(state.bytes_of(manifest))
            claimed = body.pop("sha256")
            listed = body["files"].keys()
        except (ValueError, KeyError, AttributeError, TypeError):
            return False
        if claimed != hashlib.sha256(dump_json(body)).hexdigest() or listed != files.keys():
            return False
        return all(
            inode in state.contents and is_listed(body["files"][name], state.bytes_of(inode))
            for name, inode in files.items()
        )


def is_listed(entry: dict[str, Any], content: bytes) -> bool:
    """Whether a manifest's entry is of these bytes; tensor files have the digest of their parts' digests."""
    if "tree_sha256" not in entry:
        return entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    start = 8 + int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8:start])
        parts = [content[:start]]
        for field in sorted(header.keys() - {"__metadata__"}, key=lambda key: header[key]["data_offsets"]):
            first, end = header[field]["data_offsets"]
            parts.append(content[start + first : start + end])
    except (ValueError, KeyError, TypeError, AttributeError):
        return False
    tree = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()
    return entry == {"bytes": len(content), "tree_sha256": tree}


def write_out(state: State, folder: Path) -> None:
    """Makes a state real, in an empty folder."""
    _write_directory(state, 0, folder)


def _write_directory(state: State, inode: int, folder: Path) -> None:
    for name, child in state.entries[inode].items():
        if child in state.entries:
            (folder / name).mkdir()
            _write_directory(state, child, folder / name)
        else:
            (folder / name).write_bytes(state.bytes_of(child))
