"""What can be wrong with somebody's tars: for every kind, what stock webdataset makes of it and how it is put right.

The statements about webdataset are about version 1.0.2 with its default settings (`wds.WebDataset(url)`), unless they
name a handler; a test reads such a tar with it and compares. Findings are capped per kind and shard, counts are not.
"""

from collections import Counter
from dataclasses import dataclass, field
from enum import Enum


class Harm(Enum):
    """What a kind of finding costs who trains on the tars as they are."""

    silent = "silent"
    """Samples are lost or wrong, and nobody is told."""
    stops = "stops"
    """The reader raises, or drops the rest of a shard where a handler swallows that."""
    unsafe = "unsafe"
    """A reader or unpacker may run code, write outside its directory, or exhaust memory."""
    odd = "odd"
    """Legal, but rarely meant."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """One kind of finding."""

    harm: Harm
    title: str
    webdataset: str
    """What stock webdataset does with it."""
    fix: str


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing found."""

    code: str
    """Key of EXPLANATIONS."""
    shard: str
    member: str
    """Name of the tar member, or nothing where it is about the tar."""
    at: int
    """Byte offset in the shard: the member's header, or the damage."""
    detail: str


@dataclass(slots=True)
class Findings:
    """Collects findings; keeps at most `limit` of a kind per shard and counts all."""

    limit: int = 1000
    kept: list[Finding] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    _in_shard: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, code: str, shard: str, member: str, at: int, detail: str = "") -> None:
        """Notes one."""
        assert code in EXPLANATIONS, code
        self.count(code, shard, 1)
        if self._in_shard[code, shard] <= self.limit:
            self.kept.append(Finding(code, shard, member, at, detail))

    def count(self, code: str, shard: str, number: int) -> None:
        """Counts findings that are too many to be listed."""
        self.counts[code] += number
        self._in_shard[code, shard] += number

    @property
    def num_left_out(self) -> int:
        """Findings that were counted but not kept."""
        return sum(self.counts.values()) - len(self.kept)

    @property
    def num_harmful(self) -> int:
        """Findings of any harm but odd."""
        return sum(count for code, count in self.counts.items() if EXPLANATIONS[code].harm is not Harm.odd)


_REPACK = "pack the shard again from the raw data; what is left of it is listed by its members"
_SKIPPED = "skips it, so its sample comes without that part and nobody is told"

EXPLANATIONS: dict[str, Explanation] = {
    "truncated": Explanation(
        Harm.silent,
        "the tar is cut off",
        "cut inside a header or between members: ends quietly, the last sample comes without the parts that are "
        "missing; cut inside content: raises ReadError, and with a handler that continues the rest is dropped quietly",
        "copy the shard again, compare sizes with where it comes from; " + _REPACK,
    ),
    "missing_end": Explanation(
        Harm.silent,
        "no end-of-archive blocks",
        "reads what is there and ends quietly, so a shard that was cut between two members looks whole",
        "copy it again; where the shard is whole (its writer never closed it), append 1024 zero bytes",
    ),
    "damaged_header": Explanation(
        Harm.silent,
        "a member's header is damaged",
        "takes it for the end of the shard: everything behind it is lost quietly, and the sample before may be partial "
        "(at byte 0 it raises ReadError)",
        _REPACK,
    ),
    "data_after_end": Explanation(
        Harm.silent,
        "bytes after the end of the archive",
        "stops at the first end: of tars joined with `cat` only the first is read",
        "split it at the byte named, or join tars with `tar --concatenate`",
    ),
    "odd_size": Explanation(
        Harm.silent,
        "a tar whose size is no multiple of 512",
        "does not look: the last member may have lost or gained bytes",
        "copy it again; " + _REPACK,
    ),
    "empty_tar": Explanation(
        Harm.stops,
        "a tar without a member",
        "0 bytes: raises ReadError; end blocks alone: gives no sample, quietly where other shards give some",
        "remove the shard from the list, or write it again",
    ),
    "compressed": Explanation(
        Harm.odd,
        "a compressed tar",
        "unpacks it on every read; no byte of it can be read on its own",
        "unpack it (gunzip, unxz, unzstd); pictures do not shrink any further",
    ),
    "interleaved_key": Explanation(
        Harm.silent,
        "the members of a sample are not side by side",
        "gives every run of members as a sample of its own: captions without pictures and pictures without captions",
        "sort the members by name: `tar --sort=name` when packing",
    ),
    "duplicate_key": Explanation(
        Harm.silent,
        "two samples of one shard have the same key",
        "gives both under one key, so whatever joins or counts by key takes one for the other",
        "give every sample a key of its own",
    ),
    "duplicate_member": Explanation(
        Harm.stops,
        "one sample has the same member twice",
        "raises ValueError (names are compared in lower case); with a handler that continues it keeps the first",
        "remove one of the two, or rename it",
    ),
    "duplicate_uid": Explanation(
        Harm.silent,
        "one uid stands for two samples",
        "knows no uids: trains on both",
        "remove one; or leave it out by a mask (`janus-mega data mask`)",
    ),
    "repeated_key": Explanation(
        Harm.odd,
        "the same key in two shards (and no uid)",
        "gives both under one key, so whatever joins, resumes or counts by key takes one for the other",
        "put the shard's number into its keys, as img2dataset does",
    ),
    "dotted_key": Explanation(
        Harm.silent,
        "a dot in the key",
        "cuts names at their first dot: `0.25.jpg` is the member `25.jpg` of sample `0`, so samples are joined into "
        "one or lack the field that is asked for",
        "replace dots in keys before packing (`0.25.jpg` -> `0%2E25.jpg`)",
    ),
    "skipped_name": Explanation(
        Harm.silent,
        "a name that is no member of a sample",
        "skips names without an extension, that begin with a dot, or below a directory __like_this__; hidden files in "
        "a directory become samples of their own",
        "rename it to key.extension, or leave it out",
    ),
    "resource_fork": Explanation(
        Harm.silent,
        "a leftover of macOS",
        "skips it at the top of the tar; in a directory it becomes a sample of its own that cuts its neighbour in two",
        "pack with COPYFILE_DISABLE=1, or `tar --exclude='._*' --exclude=.DS_Store`",
    ),
    "link": Explanation(
        Harm.silent,
        "a link instead of content",
        _SKIPPED + " (tar writes hard links for files that are the same on disk)",
        "pack with `tar --dereference --hard-dereference`",
    ),
    "special_member": Explanation(
        Harm.silent,
        "a device, pipe, sparse file or unknown type",
        _SKIPPED + " (sparse files are read)",
        "pack plain files only",
    ),
    "unsafe_name": Explanation(
        Harm.unsafe,
        "a name that leaves its directory or hides something",
        "takes it as a key as it is; unpacking the tar writes outside the target directory",
        "rename it to a plain relative name",
    ),
    "pickle": Explanation(
        Harm.unsafe,
        "a pickle",
        "`.decode()` unpickles .pyd, .pkl and .pickle, which runs whatever code is inside",
        "store arrays as .npy (no objects), everything else as .json",
    ),
    "oversized_member": Explanation(
        Harm.unsafe,
        "a very large member",
        "reads it into memory whole, once per worker",
        "split it, or raise --max-member-mib if it is meant",
    ),
    "pixel_bomb": Explanation(
        Harm.unsafe,
        "a picture with too many pixels",
        "`.decode('pil')` unpacks it up to 178 million pixels (3 bytes each), beyond that it raises",
        "remove it, or shrink it",
    ),
    "undecodable": Explanation(
        Harm.stops,
        "content that does not decode",
        "gives the bytes; `.decode()` raises in the middle of training (or drops the sample with a handler that "
        "skips); lenient decoders give what is left of a picture",
        "remove the sample, or fetch its content again",
    ),
    "unsupported_picture": Explanation(
        Harm.odd,
        "a picture of a format that is not taken",
        "`.decode('pil')` decodes it where Pillow can",
        "convert it to JPEG, PNG or WebP",
    ),
    "wrong_extension": Explanation(
        Harm.odd,
        "content of another format than its name says",
        "decodes pictures by their content; tools that go by the name fail",
        "rename it",
    ),
    "empty_member": Explanation(
        Harm.silent,
        "a member of 0 bytes",
        "gives it as it is: an empty caption is trained on, an empty picture fails when it is decoded",
        "remove the sample, or fetch its content again",
    ),
    "empty_text": Explanation(
        Harm.silent,
        "a text without a character that shows",
        "gives it as it is: an empty caption is trained on",
        "remove the sample",
    ),
    "missing_member": Explanation(
        Harm.silent,
        "a sample lacks what most others of its shard have",
        "gives the incomplete sample; `.to_tuple('jpg', 'txt')` raises on it, or skips it with a handler",
        "remove the sample, or pack the missing part",
    ),
    "mixed_extensions": Explanation(
        Harm.silent,
        "pictures or texts under several extensions in one shard",
        "gives them as fields of different names: `.to_tuple('jpg', ...)` fails on the .png, a map by name skips it",
        "ask for all of them (`jpg;jpeg;png;webp`), or rename them when packing",
    ),
}
