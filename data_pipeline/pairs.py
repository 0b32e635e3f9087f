"""Tars of others, as img2dataset and open_clip write them: a picture, its caption and facts of it by one key.

The key of a member is its name up to the first dot of the file name, as webdataset has it. The picture is the member
.jpg, .jpeg, .png or .webp, the caption is .txt, else "caption" in .json. The import, the index of such tars in place
and the reader of training samples all go through here, so they agree on keys, captions and identities.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError
from data_pipeline.tar_scan import Member, scan_stretch, scan_tar

PICTURE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
PICKLED_EXTENSIONS = ("pyd", "pickle", "pkl", "pth", "pt")
"""Members that could run code when they are opened; tars with such are refused."""


@dataclass(frozen=True, slots=True)
class Pair:
    """The members of one key, which lie behind one another."""

    key: str
    start: int
    """Byte offset of the first header."""
    end: int
    """Byte offset after the last member."""
    picture: Member | None
    text: Member | None
    facts: Member | None
    """The .json."""


def split_name(name: str) -> tuple[str, str]:
    """Key and extension (lower case) of a member."""
    directory, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return directory + slash + stem, extension.lower()


def scan_pairs(path: Path) -> Iterator[Pair]:
    """The pairs of a tar in order, headers read only.

    Raises:
        UserError: The tar is damaged, holds pickles, or the members of a key do not lie behind one another.
    """
    try:
        yield from _pairs(scan_tar(path))
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: {error}") from error


def _pairs(members: Iterable[Member]) -> Iterator[Pair]:
    """Groups members by key.

    Raises:
        ValueError: A pickle, a key that comes again, or two members of one kind.
    """
    done: set[str] = set()
    run: list[Member] = []
    key = ""
    for member in members:
        own_key, extension = split_name(member.name)
        if extension.rpartition(".")[2] in PICKLED_EXTENSIONS:
            raise ValueError(f"member {member.name!r} is a pickle, which is never opened; write the tar without such")
        if run and own_key != key:
            yield _pair(key, run)
            done.add(key)
            run = []
        if own_key in done:
            raise ValueError(
                f"members of key {own_key!r} do not lie behind one another; write the tar sorted by key "
                "(`tar --sort=name`)"
            )
        key = own_key
        run.append(member)
    if run:
        yield _pair(key, run)


def _pair(key: str, run: list[Member]) -> Pair:
    by_extension: dict[str, Member] = {}
    for member in run:
        extension = split_name(member.name)[1]
        extension = "picture" if extension in PICTURE_EXTENSIONS else extension
        if extension in by_extension and extension in ("picture", "txt", "json"):
            other = by_extension[extension].name
            raise ValueError(f"members {other!r} and {member.name!r} are of one kind and key; keep one of them")
        by_extension[extension] = member
    parts = [by_extension.get(name) for name in ("picture", "txt", "json")]
    return Pair(key, run[0].header, run[-1].end, *parts)


@dataclass(frozen=True, slots=True)
class PairContent:
    """What a pair holds."""

    picture: memoryview
    caption: str


def read_pair(stretch: bytes | memoryview) -> PairContent:
    """Picture and caption from the bytes of a pair's members, headers included.

    Raises:
        ValueError: The bytes are damaged, or there is no picture or caption.
    """
    view = memoryview(stretch)
    pair = next(_pairs(scan_stretch(view)), None)
    if pair is None or pair.picture is None:
        raise ValueError("there is no picture among the members")
    text = view[pair.text.data : pair.text.data + pair.text.size] if pair.text else None
    facts = parse_facts(view[pair.facts.data : pair.facts.data + pair.facts.size]) if pair.facts else {}
    return PairContent(view[pair.picture.data : pair.picture.data + pair.picture.size], pair_caption(text, facts))


def parse_facts(content: bytes | memoryview) -> dict[str, Any]:
    """The object of a .json member.

    Raises:
        ValueError: It is none.
    """
    try:
        facts = json.loads(bytes(content))
    except RecursionError as error:
        raise ValueError("its .json is nested too deeply") from error
    if not isinstance(facts, dict):
        raise ValueError("its .json is no object")
    return facts


def pair_caption(text: bytes | memoryview | None, facts: dict[str, Any]) -> str:
    """The caption: the .txt, else "caption" of the .json.

    Raises:
        ValueError: Neither holds one, or it is not UTF-8.
    """
    caption = bytes(text).decode("utf-8") if text is not None else facts.get("caption")
    if not isinstance(caption, str) or not caption.strip():
        raise ValueError("it has no caption, neither .txt nor 'caption' in .json")
    caption.encode("utf-8")
    return caption


def pair_identity(tar: Path, key: str, facts: dict[str, Any]) -> str:
    """What a pair is called: its uid, else the sha256 of its picture, its URL, or tar and key."""
    for name in ("uid", "sha256", "url"):
        given = facts.get(name)
        if isinstance(given, str) and given.isprintable() and given:
            return given
    return f"{tar.stem}/{key}"
