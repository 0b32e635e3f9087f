"""Members to samples, the way webdataset does it: neighbours with one key are one sample; and what is odd about them.

What is remembered is bounded: per shard the keys seen (as 64-bit hashes) and a table of extensions, over all shards 21
bytes a sample for uids. Beyond the bounds samples are still read, but no longer compared, and the report says so.
"""

from collections import Counter
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np

from data_pipeline.explain.findings import Findings
from data_pipeline.explain.member_checks import JSONS, PICTURES, TEXTS, last_extension

MAX_KEYS_PER_SHARD = 2_000_000
MAX_UIDS = 50_000_000
_MAX_EXTENSIONS = 4096
_MAX_EXAMPLES = 200
_OURS = frozenset(["doc.json", "tok.npy", "seg.npy", "off.npy", "uid.npy", "vq.npy", "cap.npy", "img.npy"])
_EXPECTED_SHARE = 0.5
"""A part is missing where at least this share of the samples of the shard has it."""
_CONVENTION_SHARE = 0.05
"""An extension with a dot is meant as such where at least this share of the samples has it."""


def hash_of(text: str) -> int:
    """64 bits of a name."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little")


@dataclass(slots=True)
class _Run:
    """A run of neighbouring members with one key."""

    key: str
    at: int
    name: str
    extensions: dict[str, int] = field(default_factory=dict)
    uids: list[str] = field(default_factory=list)


class UidTable:
    """Uids of all samples of all shards, as hashes with their places."""

    def __init__(self) -> None:
        self._shards: list[str] = []
        self._hashes: list[np.ndarray] = []
        self._places: list[np.ndarray] = []
        self._size = 0
        self._scope = ""
        self._pending: list[tuple[int, int, bool]] = []

    @property
    def is_full(self) -> bool:
        """Whether samples were left out of the comparison."""
        return self._size >= MAX_UIDS

    def begin_shard(self, shard: str, scope: str = "") -> None:
        """Samples that follow are of this shard; they are compared with those of the same scope."""
        self.end_shard()
        self._scope = scope
        self._shards.append(shard)

    def add(self, identity: str, at: int, is_key: bool = False) -> None:
        """Adds a sample by its uid or, where it has none, by its key."""
        if self._size < MAX_UIDS:
            self._size += 1
            self._pending.append((hash_of(f"{self._scope} {'key' if is_key else ''} {identity}"), at, is_key))

    def end_shard(self) -> None:
        """Packs what was added."""
        if self._pending:
            self._hashes.append(np.array([hashed for hashed, _, _ in self._pending], np.uint64))
            places = np.empty(len(self._pending), [("shard", "<u4"), ("at", "<u8"), ("is_key", "?")])
            places["shard"] = len(self._shards) - 1
            places["at"] = [at for _, at, _ in self._pending]
            places["is_key"] = [is_key for _, _, is_key in self._pending]
            self._places.append(places)
            self._pending = []

    def report(self, findings: Findings) -> None:
        """Adds a finding for every sample whose uid an earlier one has."""
        self.end_shard()
        if not self._hashes:
            return
        hashes, places = np.concatenate(self._hashes), np.concatenate(self._places)
        order = np.argsort(hashes, kind="stable")
        again = np.flatnonzero(hashes[order][1:] == hashes[order][:-1]) + 1
        for number in again.tolist():
            first = places[order[number - 1]]
            place = places[order[number]]
            detail = f"also at byte {int(first['at'])} of {self._shards[int(first['shard'])]}"
            code = "repeated_key" if place["is_key"] else "duplicate_uid"
            findings.add(code, self._shards[int(place["shard"])], "", int(place["at"]), detail)


class SampleGrouper:
    """Follows the members of one shard; `add` for each in order, then `finish`."""

    def __init__(self, shard: str, findings: Findings, uids: UidTable) -> None:
        self.num_samples = 0
        self._shard = shard
        self._findings = findings
        self._uids = uids
        self._run: _Run | None = None
        self._seen: dict[int, tuple[frozenset[str], int]] = {}
        self._broken: set[int] = set()
        self._parts: dict[frozenset[str], list[tuple[str, int]]] = {}
        self._part_counts: Counter[frozenset[str]] = Counter()
        self._extensions: Counter[str] = Counter()
        self._extension_first: dict[str, tuple[str, int]] = {}
        self._known: dict[frozenset[str], frozenset[str]] = {}
        self._has_many_extensions = False

    def add(self, key: str, extension: str, name: str, at: int, uids: tuple[str, ...]) -> None:
        """The next member that belongs to a sample."""
        if self._run is None or self._run.key != key:
            self._end_run()
            self._run = _Run(key, at, name)
        run = self._run
        if extension in run.extensions:
            self._findings.add(
                "duplicate_member", self._shard, name, at, f"the first is at byte {run.extensions[extension]}"
            )
            return
        run.extensions[extension] = at
        run.uids += uids
        if extension not in self._extension_first:
            if len(self._extension_first) >= _MAX_EXTENSIONS:
                self._has_many_extensions = True
                return
            self._extension_first[extension] = (name, at)
        self._extensions[extension] += 1

    def interrupt(self) -> None:
        """Something lies here that is no member: the sample before it ends."""
        self._end_run()
        self._run = None

    def finish(self) -> None:
        """Judges the shard as a whole."""
        self.interrupt()
        self._judge_parts()
        self._judge_extensions()

    def _end_run(self) -> None:
        run = self._run
        if run is None:
            return
        self.num_samples += 1
        hashed = hash_of(run.key)
        extensions = frozenset(run.extensions)
        extensions = self._known.setdefault(extensions, extensions) if len(self._known) < 10_000 else extensions
        earlier = self._seen.get(hashed)
        if earlier is not None:
            code = "duplicate_key" if earlier[0] & extensions else "interleaved_key"
            self._findings.add(code, self._shard, run.name, run.at, f"other members of it begin at byte {earlier[1]}")
            self._broken.add(hashed)
            self._seen[hashed] = (earlier[0] | extensions, earlier[1])
        elif len(self._seen) < MAX_KEYS_PER_SHARD:
            self._seen[hashed] = (extensions, run.at)
        for uid in run.uids[:1]:
            self._uids.add(uid, run.at)
        if not run.uids and earlier is None:
            self._uids.add(run.key, run.at, is_key=True)
        parts = frozenset(part_of(extension) for extension in extensions)
        self._part_counts[parts] += 1
        examples = self._parts.setdefault(parts, [])
        if len(examples) < _MAX_EXAMPLES:
            examples.append((run.name, run.at))

    def _judge_parts(self) -> None:
        """Samples that lack what most have."""
        total = sum(self._part_counts.values())
        having: Counter[str] = Counter()
        for parts, count in self._part_counts.items():
            having.update(dict.fromkeys(parts, count))
        expected = {part for part, count in having.items() if part and count >= _EXPECTED_SHARE * total}
        for parts, count in self._part_counts.items():
            missing = sorted(expected - parts)
            if not missing:
                continue
            for name, at in self._parts[parts]:
                key = name.rpartition("/")[0] + "/" if "/" in name else ""
                stem = key + name.rpartition("/")[2].split(".", 1)[0]
                if hash_of(stem) in self._broken:
                    continue  # said already: its parts lie elsewhere in the shard
                self._findings.add("missing_member", self._shard, name, at, f"no {' and no '.join(missing)}")
            if len(self._parts[parts]) == _MAX_EXAMPLES:
                self._findings.count("missing_member", self._shard, count - _MAX_EXAMPLES)

    def _judge_extensions(self) -> None:
        """Dots in keys, and several extensions for one thing."""
        threshold = max(2, _CONVENTION_SHARE * self.num_samples)
        for extension, count in self._extensions.items():
            if "." in extension and not self._is_convention(extension) and count < threshold:
                name, at = self._extension_first[extension]
                self._findings.add("dotted_key", self._shard, name, at, f"webdataset takes {extension!r} for its field")
        if self._has_many_extensions:
            self._findings.add("dotted_key", self._shard, "", 0, f"more than {_MAX_EXTENSIONS} different extensions")
        for part, kinds in (("picture", PICTURES), ("text", dict.fromkeys(TEXTS))):
            used = [extension for extension in self._extensions if extension in kinds]
            if len(used) > 1:
                counts = ", ".join(f".{extension} {self._extensions[extension]}" for extension in sorted(used))
                rarest = min(used, key=lambda extension: self._extensions[extension])
                name, at = self._extension_first[rarest]
                self._findings.add("mixed_extensions", self._shard, name, at, f"{part}s: {counts}")

    def _is_convention(self, extension: str) -> bool:
        """Names that are meant to have two parts: our own, and pictures that are counted from 0."""
        first, _, last = extension.rpartition(".")
        return extension in _OURS or (first.isdigit() and int(first) < 1000 and f"0.{last}" in self._numbered())

    def _numbered(self) -> set[str]:
        """`0.jpg` for every extension, where this shard counts pictures from 0."""
        zeros = [extension for extension in self._extensions if extension.startswith("0.")]
        return {f"0.{last_extension(other)}" for other in self._extensions if zeros}


def part_of(extension: str) -> str:
    """What a member is to its sample, whatever the format: a picture, a text, facts, or its own extension."""
    last = last_extension(extension)
    if last in PICTURES:
        return "picture" if "." not in extension else ""  # numbered pictures: any count may be meant
    if last in TEXTS:
        return "text"
    return "json" if extension in JSONS else extension if len(extension) <= 16 else ""
