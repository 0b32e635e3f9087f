"""What is wrong with one member of a tar by its name, type and content; pictures by their headers unless told more."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from data_pipeline.explain.picture_header import HEAD_BYTES, TAIL_BYTES, picture_size, seems_cut
from data_pipeline.explain.tar_walk import Entry
from data_pipeline.images import MAX_PIXELS, ImageError, decode_image, image_extension
from data_pipeline.npy import parse_npy_header

PICTURES = {"jpg": "jpg", "jpeg": "jpg", "jpe": "jpg", "jfif": "jpg", "png": "png", "webp": "webp"}
"""Extensions of pictures that are taken, and the format each promises."""
OTHER_PICTURES = frozenset(["gif", "bmp", "tif", "tiff", "jp2", "jxl", "avif", "heic", "ico", "ppm", "pgm", "psd"])
TEXTS = frozenset(["txt", "text", "caption", "transcript"])
JSONS = frozenset(["json", "jsn"])
PICKLES = frozenset(["pyd", "pkl", "pickle", "pth", "pt", "joblib", "dill"])
MAX_TEXT_BYTES = 16 << 20
"""Longer texts and JSONs are not parsed."""

_RESERVED = re.compile(r"__[^/]*__($|/)")
_OBJECTS = re.compile(rb"'descr': ('\|?O|\[[^\n]*'\|?O'?)")
_RECORDS = re.compile(rb"NUMPY[\s\S]{4,6}\{'descr': \[")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")

Read = Callable[[int, int], bytes]
"""(offset in the member, bytes) -> content."""


@dataclass(frozen=True, slots=True)
class CheckOptions:
    """How far the checks go."""

    decode: bool = False
    """Decode every picture instead of looking at its header."""
    max_member_bytes: int = 256 << 20
    """Larger members are reported and not read."""
    limit: int = 1000
    """Findings of one kind and shard that are listed."""


@dataclass(frozen=True, slots=True)
class Content:
    """What the checks of a member's content found."""

    findings: tuple[tuple[str, str], ...] = ()
    """(code, detail)."""
    uids: tuple[str, ...] = ()
    """Identities that the member says its sample has."""


def split_name(name: str) -> tuple[str, str] | None:
    """(key, extension in lower case) as webdataset cuts a name; None for names that it skips.

    The key keeps its directory and ends at the first dot of the file's name. A hidden file in a directory gets the
    directory itself as its key, unless that has a dot.
    """
    folder, slash, file = name.rpartition("/")
    stem, dot, extension = file.partition(".")
    if not dot or "\n" in name or _RESERVED.match(name):
        return None
    if not stem and (not slash or "." in folder.rpartition("/")[2]):
        return None
    return folder + slash + stem, extension.lower()


def check_name(entry: Entry) -> Iterator[tuple[str, str]]:
    """Yields (code, detail) of what a name and a type alone tell."""
    name, file = entry.name, entry.name.rpartition("/")[2]
    parts = name.replace("\\", "/").split("/")
    if name.startswith(("/", "\\")) or ".." in parts or re.match(r"[A-Za-z]:[\\/]", name):
        yield "unsafe_name", "it leads out of the directory that the tar is unpacked in"
    elif "\\" in name or _CONTROL.search(name):
        yield "unsafe_name", "it holds backslashes or control characters"
    elif any("\ud800" <= letter <= "\udfff" for letter in name):
        yield "unsafe_name", "it is no UTF-8"
    if entry.type in "12":
        yield "link", f"a {'hard' if entry.type == '1' else 'symbolic'} link to {entry.link!r}"
        return
    if not entry.is_file:
        if entry.type != "5":
            yield "special_member", f"its type is {entry.type!r}"
        return
    if file.startswith("._") or file == ".DS_Store" or parts[0] == "__MACOSX":
        yield "resource_fork", ""
    elif split_name(name) is None or file.startswith("."):
        yield "skipped_name", ""


def last_extension(extension: str) -> str:
    """The part after the last dot, which says how a member is decoded."""
    return extension.rpartition(".")[2]


def check_content(entry: Entry, extension: str, read: Read, options: CheckOptions) -> Content:
    """Looks into a regular member.

    Args:
        entry: The member.
        extension: Its last extension, in lower case.
        read: Reads parts of it.
        options: How far to go.
    """
    if extension in PICKLES:
        return Content((("pickle", f".{extension}"),))
    if entry.size == 0:
        return Content((("empty_member", ""),))
    if entry.size > options.max_member_bytes:
        return Content((("oversized_member", f"{entry.size} bytes, --max-member-mib allows less"),))
    if extension in OTHER_PICTURES:
        return Content((("unsupported_picture", f".{extension}"),))
    if extension in PICTURES:
        return Content(tuple(_check_picture(entry, PICTURES[extension], read, options.decode)))
    if extension in TEXTS | JSONS and entry.size <= MAX_TEXT_BYTES:
        return _check_text(read(0, entry.size), extension in JSONS)
    if extension == "npy":
        return _check_array(entry, read)
    return Content()


def _check_picture(entry: Entry, promised: str, read: Read, decode: bool) -> Iterator[tuple[str, str]]:
    head = read(0, min(entry.size, HEAD_BYTES))
    try:
        found = image_extension(head)
        try:
            width, height = picture_size(head)
        except ImageError:
            if entry.size <= HEAD_BYTES:
                raise
            head = read(0, entry.size)
            width, height = picture_size(head)
        if width * height > MAX_PIXELS or width < 1 or height < 1:
            yield "pixel_bomb", f"{width} x {height} pixels, at most {MAX_PIXELS} are decoded"
            return
        tail = read(max(entry.size - TAIL_BYTES, 0), min(entry.size, TAIL_BYTES))
        is_cut = seems_cut(head, tail, entry.size)
        if is_cut and found != "jpg":
            raise ImageError("its end is missing")
        if decode or is_cut:
            decode_image(read(0, entry.size))
    except ImageError as error:
        yield "undecodable", f"{error}; it begins with {head[:16]!r}"
        return
    if found != promised:
        yield "wrong_extension", f"the content is {found}"


def _check_text(content: bytes, is_json: bool) -> Content:
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        return Content((("undecodable", f"no UTF-8 at its byte {error.start}"),))
    if not is_json:
        return Content() if text.strip() else Content((("empty_text", ""),))
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Content((("undecodable", f"no JSON ({str(error).splitlines()[0][:120]})"),))
    uid = value.get("uid") if isinstance(value, dict) else None
    return Content(uids=(uid,) if isinstance(uid, str) and uid else ())


def _check_array(entry: Entry, read: Read) -> Content:
    """A .npy: no objects, and as many bytes as its shape says. Records of several fields are not looked into."""
    head = read(0, min(entry.size, 1 << 16))
    if _OBJECTS.search(head[:4096]):
        return Content((("pickle", "a .npy that holds pickled objects"),))
    if _RECORDS.search(head[:64]):
        return Content()
    try:
        header = parse_npy_header(head)
    except ValueError as error:
        return Content((("undecodable", str(error)),))
    if header.num_bytes != entry.size:
        return Content((("undecodable", f"a .npy that promises {header.num_bytes} bytes and has {entry.size}"),))
    return Content()
