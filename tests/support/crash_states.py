"""What a power loss may leave of recorded operations: a simulated file system that forgets.

The rules are the weakest that ext4, XFS and NFS servers have in common:

* Bytes of a file are there for good after fsync of the file. Later ones may be lost, cut anywhere, or there as zeros
  (the size was written, the blocks were not), also with zeros in front of bytes that did arrive.
* Names (creating, renaming, removing) are there for good after fsync of the directory they stand in; a rename after
  fsync of the directory it goes to. Until then each may have happened or not, whatever their order was: fsync of a file
  does not make its name durable, and of two names the later one may survive alone.
* What stays in order: changes of the same name in the same directory, and changes of where the same file or directory
  hangs. A rename is done or undone as a whole.

`crash_points` yields one point after every operation, `Point.states` the states a loss of power there may leave: all
subsets of the pending changes that keep that order (a seeded choice where they are too many), each with the pending
bytes of files lost, whole, cut and zeroed.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.support.crash_disk import MEET, NOTE, Operation

Entries = dict[int, dict[str, int]]
"""Names of every directory, by its inode; a name leads to an inode."""
ROOT = 0
"""Inode of the folder that everything lies in."""
MAX_SUBSETS = 48
LOST, WHOLE = ("cut", 0), ("whole",)
Fate = tuple[Any, ...]
"""What became of the bytes of a file: whole, ("cut", size) or ("zero", from, to)."""


@dataclass(frozen=True, slots=True)
class Change:
    """A change of names that is not durable yet."""

    number: int
    removes: tuple[int, str] | None
    adds: tuple[int, str, int] | None
    after: frozenset[int]
    """Changes that cannot be missing when this one is there."""

    def touches(self, directory: int) -> bool:
        """Whether fsync of a directory makes it durable."""
        place = self.adds or self.removes
        return place is not None and place[0] == directory


@dataclass(frozen=True, slots=True)
class State:
    """One state of the disk after a crash."""

    entries: Entries
    fates: dict[int, Fate]
    """Of files with bytes that were not durable; all others are whole."""
    contents: dict[int, bytes]
    """Bytes of every file as they were written up to the crash."""

    def bytes_of(self, inode: int) -> bytes:
        """What the disk gives back."""
        return survived(self.contents[inode], self.fates.get(inode, WHOLE))

    def find(self, path: str) -> int | None:
        """Inode of a path, or None."""
        inode = ROOT
        for name in path.split("/") if path else ():
            if name not in self.entries.get(inode, {}):
                return None
            inode = self.entries[inode][name]
        return inode

    def files_below(self, directory: int, prefix: str = "") -> Iterator[tuple[str, int]]:
        """(relative name, inode) of all files and empty directories below a directory."""
        for name, inode in self.entries[directory].items():
            if self.entries.get(inode):
                yield from self.files_below(inode, f"{prefix}{name}/")
            else:
                yield prefix + name, inode


def inodes_below(entries: Entries, directory: int) -> Iterator[int]:
    """All files and directories that can be reached."""
    for inode in entries[directory].values():
        yield inode
        if inode in entries:
            yield from inodes_below(entries, inode)


def survived(content: bytes, fate: Fate) -> bytes:
    """The bytes of a file after a crash."""
    if fate == WHOLE:
        return content
    if fate[0] == "cut":
        return content[: fate[1]]
    _, start, end = fate
    return content[:start] + bytes(end - start) + content[end:]


@dataclass
class Point:
    """The disk as it was after one operation, before the next."""

    number: int
    operation: Operation
    durable: Entries
    pending: list[Change]
    contents: dict[int, bytes]
    durable_bytes: dict[int, int]
    notes: Sequence[Any]
    """All remarks of the recording up to here."""

    def states(self, chance: random.Random, budget: int) -> Iterator[State]:
        """Different states that a loss of power may leave here; about `budget`, seeded where there are more."""
        hurt = {inode for inode, content in self.contents.items() if len(content) > self.durable_bytes[inode]}
        subsets = subsets_in_order(self.pending, chance)
        for number, subset in enumerate(subsets):
            entries = self._entries(subset)
            dirty = sorted(hurt & set(inodes_below(entries, ROOT))) if hurt else []
            seen = set()
            for turn in range(max(2, budget // len(subsets)) if dirty else 1):
                fates = self._fates(dirty, turn, number, chance)
                key = frozenset(fates.items())
                if key not in seen:
                    seen.add(key)
                    yield State(entries, fates, self.contents)

    def _entries(self, subset: frozenset[int]) -> Entries:
        entries = dict(self.durable)
        copied: set[int] = set()

        def directory(inode: int) -> dict[str, int]:
            if inode not in copied:
                copied.add(inode)
                entries[inode] = dict(entries.get(inode, {}))
            return entries[inode]

        for change in self.pending:
            if change.number in subset:
                apply(change, directory)
        return entries

    def _fates(self, dirty: list[int], turn: int, subset: int, chance: random.Random) -> dict[int, Fate]:
        """Turn 0: all bytes are lost; 1: all are there; then one file is hurt, or each as it goes."""
        lost = {inode: ("cut", self.durable_bytes[inode]) for inode in dirty}
        if turn < 2:
            return {} if turn else lost
        hurt = dirty[(turn + subset) % len(dirty)]
        if turn % 3 == 2:
            return {hurt: self._hurt(hurt, chance)}
        if turn % 3 == 0:
            return lost | {hurt: chance.choice((WHOLE, self._hurt(hurt, chance)))}
        return {inode: chance.choice((WHOLE, lost[inode], self._hurt(inode, chance))) for inode in dirty}

    def _hurt(self, inode: int, chance: random.Random) -> Fate:
        start, size = self.durable_bytes[inode], len(self.contents[inode])
        kind = chance.randrange(4)
        if kind == 0:
            return ("cut", chance.randrange(start, size))
        if kind == 1:
            return ("zero", start, size)
        first = chance.randrange(start, size)
        return ("zero", first, size if kind == 2 else chance.randrange(first, size) + 1)


def subsets_in_order(pending: list[Change], chance: random.Random) -> list[frozenset[int]]:
    """Sets of pending changes that may have happened: all of them, or `MAX_SUBSETS` with the most telling ones."""
    if len(pending) <= 5:
        subsets = [frozenset[int]()]
        for change in pending:  # in order, so what a change needs was decided before
            subsets += [subset | {change.number} for subset in subsets if change.after <= subset]
        return subsets
    everything = frozenset(change.number for change in pending)
    chosen = {frozenset[int](): None, everything: None}
    for change in pending:
        alone = _with_needs(change.number, pending)
        chosen[alone] = None
        chosen[everything - frozenset(other.number for other in pending if _needs(other, change.number, pending))] = (
            None
        )
    for end in range(1, len(pending)):
        chosen[frozenset(change.number for change in pending[:end])] = None
    fixed = list(chosen)
    if len(fixed) > MAX_SUBSETS:
        fixed = fixed[:2] + chance.sample(fixed[2:], MAX_SUBSETS - 2)
    for _ in range(MAX_SUBSETS - len(fixed)):
        share, subset = chance.random(), set[int]()
        for change in pending:
            if change.after <= subset and chance.random() < share:
                subset.add(change.number)
        chosen[frozenset(subset)] = None
    return [*fixed, *(subset for subset in chosen if subset not in set(fixed))][:MAX_SUBSETS]


def _with_needs(number: int, pending: Sequence[Change]) -> frozenset[int]:
    by_number = {change.number: change for change in pending}
    found, todo = {number}, [number]
    while todo:
        for needed in by_number[todo.pop()].after - found:
            if needed in by_number:
                found.add(needed)
                todo.append(needed)
    return frozenset(found)


def _needs(change: Change, number: int, pending: Sequence[Change]) -> bool:
    return number in _with_needs(change.number, pending)


def apply(change: Change, directory: Any) -> None:
    """Makes a change; `directory(inode)` gives the names to change."""
    if change.removes is not None:
        parent, name = change.removes
        directory(parent).pop(name, None)
    if change.adds is not None:
        parent, name, inode = change.adds
        directory(parent)[name] = inode
        directory(parent)


@dataclass
class SimulatedDisk:
    """Follows operations and knows at any time what is durable and what is pending."""

    live: Entries = field(default_factory=lambda: {ROOT: {}})
    durable: Entries = field(default_factory=lambda: {ROOT: {}})
    pending: list[Change] = field(default_factory=list)
    contents: dict[int, bytes] = field(default_factory=dict)
    durable_bytes: dict[int, int] = field(default_factory=dict)
    num_inodes: int = 0
    num_changes: int = 0
    files: dict[int, int] = field(default_factory=dict)
    """Inode of a file by the number its create has in the recording."""

    def do(self, operation: Operation) -> None:
        """Follows one operation."""
        match operation.kind:
            case "make_directory":
                inode = self._new_inode()
                self.live[inode], self.durable[inode] = {}, {}
                self._change(None, self._place(operation.path), inode)
            case "create":
                inode = self.files[operation.file] = self._new_inode()
                self.contents[inode], self.durable_bytes[inode] = b"", 0
                self._change(None, self._place(operation.path), inode)
            case "write":
                self.contents[self.files[operation.file]] += operation.content
            case "sync_file":
                inode = self.files[operation.file]
                self.durable_bytes[inode] = len(self.contents[inode])
            case "sync_directory":
                self._sync(self.find(operation.path))
            case "rename":
                source = self._place(operation.path)
                self._change(source, self._place(operation.target), self.live[source[0]][source[1]])
            case "remove_file" | "remove_directory":
                self._change(self._place(operation.path), None, None)
            case "damage":  # not a crash: the medium changed what it holds
                parent, name = self._place(operation.path)
                inode = self.live[parent][name] = self._new_inode()  # so that nobody takes it for the one it was
                self.durable[parent] = self.durable[parent] | {name: inode}
                self.contents[inode], self.durable_bytes[inode] = operation.content, len(operation.content)
            case _:
                raise ValueError(f"operation {operation.kind} is unknown")

    def find(self, path: str) -> int:
        """Inode of a path in the running system."""
        inode = ROOT
        for name in path.split("/") if path not in ("", ".") else ():
            inode = self.live[inode][name]
        return inode

    def _new_inode(self) -> int:
        self.num_inodes += 1
        return self.num_inodes

    def _place(self, path: str) -> tuple[int, str]:
        parent, _, name = path.rpartition("/")
        return self.find(parent), name

    def _change(self, source: tuple[int, str] | None, target: tuple[int, str] | None, inode: int | None) -> None:
        moved = self.live[source[0]][source[1]] if source else inode
        adds = (*target, inode) if target is not None and inode is not None else None
        after = set()
        for change in self.pending:
            same_slot = {change.removes, change.adds and change.adds[:2]} & ({source, target} - {None})
            same_inode = change.adds is not None and change.adds[2] == moved
            if same_slot or same_inode:
                after.add(change.number)
        self.num_changes += 1
        change = Change(self.num_changes, source, adds, frozenset(after))
        self.pending.append(change)
        apply(change, lambda directory: self.live[directory])

    def _sync(self, directory: int) -> None:
        settled: set[int] = set()
        for change in self.pending:
            if change.touches(directory):
                settled |= _with_needs(change.number, self.pending)
        # Points that were handed out keep the tables they were made with.
        self.durable = {inode: dict(names) for inode, names in self.durable.items()}
        for change in self.pending:
            if change.number in settled:
                apply(change, lambda inode: self.durable.setdefault(inode, {}))
        self.pending = [
            Change(change.number, change.removes, change.adds, change.after - settled)
            for change in self.pending
            if change.number not in settled
        ]

    def is_directory(self, inode: int) -> bool:
        """Whether an inode is a directory."""
        return inode in self.live


def crash_points(operations: Sequence[Operation]) -> Iterator[Point]:
    """One point after each operation and each note."""
    disk, notes = SimulatedDisk(), list[Any]()
    for number, operation in enumerate(operations):
        if operation.kind == MEET:
            continue
        if operation.kind == NOTE:
            notes.append(operation.note)
        else:
            disk.do(operation)
        yield Point(
            number,
            operation,
            {inode: dict(names) for inode, names in disk.durable.items()},
            list(disk.pending),
            dict(disk.contents),
            dict(disk.durable_bytes),
            tuple(notes),
        )
