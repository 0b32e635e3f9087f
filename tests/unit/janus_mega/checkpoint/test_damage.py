"""Damage of every kind, in every region of every kind of file, is found; nothing of it is ever loaded.

Two things are asked each time: does `find_damage` say so, and does reading everything refuse with one line. They look
at different bytes in different ways, so each has to find all of it.
"""

import hashlib
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from data_pipeline.errors import UserError
from janus_mega.checkpoint.format import FileEntry, dump_compact, find_damage, read_manifest, write_manifest
from janus_mega.checkpoint.manager import find_latest, save_checkpoint
from janus_mega.checkpoint.reader import open_checkpoint
from janus_mega.checkpoint.tensor_file import TensorFile
from tests.support.checkpoints import EXTRA_FILE, TENSORS, rows_of, save_on_threads, state

KINDS = ("manifest.json", "tensors.json", "state.json", "config.yaml", EXTRA_FILE, "tensors-00000.safetensors")


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A checkpoint of two ranks at step 7, with an older one below the same root."""
    for step in (3, 7):
        results = save_on_threads(tmp_path / "run", 2, lambda rank: rows_of(rank, 2), step)
    assert isinstance(results[0], Path)
    return results[0]


def read_everything(directory: Path) -> dict[str, torch.Tensor]:
    """All that a checkpoint holds."""
    reader = open_checkpoint(directory)
    reader.read_state()
    for name in reader.manifest["files"]:
        if not name.startswith("tensors"):
            reader.read_bytes(name)
    return {name: reader.read(name) for name in reader.names}


def assert_found(directory: Path, what: object, *, by_reading: bool = True) -> None:
    assert find_damage(directory) is not None, what
    if by_reading:
        with pytest.raises(UserError) as caught:
            read_everything(directory)
        assert "\n" not in str(caught.value), what


def regions(path: Path) -> dict[str, range]:
    """Parts of a file, so that none is forgotten by chance."""
    size = path.stat().st_size
    if path.suffix != ".safetensors":
        return {"content": range(size)}
    head = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    text = len(path.read_bytes()[:head].rstrip())
    return {"length": range(8), "header": range(8, text), "padding": range(text, head), "data": range(head, size)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_anywhere_is_found(whole: Path, kind: str) -> None:
    chooser, file = random.Random(0), whole / kind
    content, trials = file.read_bytes(), 0
    for region, places in regions(file).items():
        assert places, f"{kind} has no {region} to flip; change a name"
        step = max(1, len(places) // 250)
        for place in places[chooser.randrange(step) :: step]:
            flipped = bytearray(content)
            flipped[place] ^= 1 << chooser.randrange(8)
            file.write_bytes(flipped)
            assert_found(whole, (kind, region, place))
            trials += 1
    file.write_bytes(content)
    assert trials >= min(len(content), 250) and find_damage(whole) is None
    read_everything(whole)


def _cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def _instead(make: Callable[[Path], None]) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.rename(path.parent.parent / "away")
        make(path)

    return change


def _longer(more: bytes) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        with path.open("ab") as file:
            file.write(more)

    return change


def _link_as_long(path: Path) -> None:
    size = path.stat().st_size
    path.unlink()
    path.symlink_to("n" * min(size, 4000))  # the size of a link is the length of what it names


CHANGES: dict[str, Callable[[Path], object]] = {
    "a byte less": lambda path: _cut(path, path.stat().st_size - 1),
    "half": lambda path: _cut(path, path.stat().st_size // 2),
    "empty": lambda path: _cut(path, 0),
    "a byte more": _longer(b"\0"),
    "white space more": _longer(b"\n"),
    "missing": Path.unlink,
    "zeroes": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a directory": _instead(Path.mkdir),
    "a link to the same bytes": _instead(lambda path: path.symlink_to(path.parent.parent / "away")),
    "a link to nothing, as long as the file": _link_as_long,
    "a pipe": _instead(os.mkfifo),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", CHANGES)
def test_another_file_in_its_place_is_found_and_passed_over(whole: Path, kind: str, change: str) -> None:
    CHANGES[change](whole / kind)
    assert_found(whole, (kind, change))
    assert find_latest(whole.parent) == whole.parent / "step-00000003"


def test_swapped_missing_and_extra_files_are_found(whole: Path) -> None:
    older, backup = whole.parent / "step-00000003", whole.parent / "backup"
    shutil.copytree(whole, backup)

    def again() -> None:
        shutil.rmtree(whole)
        shutil.copytree(backup, whole)

    first, second = whole / "tensors-00000.safetensors", whole / "tensors-00001.safetensors"
    first.rename(whole / "x"), second.rename(first), (whole / "x").rename(second)
    assert_found(whole, "two ranks' files swapped")
    for kind in KINDS:
        again()
        if (older / kind).read_bytes() != (whole / kind).read_bytes():
            shutil.copy(older / kind, whole / kind)
            assert_found(whole, f"{kind} of another step")
    for stranger in ("stray.bin", "text_tokenizer/stray", ".note-00000.json"):
        again()
        (whole / stranger).write_bytes(b"x")
        assert_found(whole, stranger, by_reading=False)
    again()
    (whole / "empty").mkdir()
    assert_found(whole, "a directory more", by_reading=False)
    again()
    (whole / "text_tokenizer").rename(whole.parent / "aside")
    (whole / "text_tokenizer").symlink_to("../aside")
    assert_found(whole, "a linked directory", by_reading=False)
    again()
    renamed = whole.rename(whole.with_name("step-00000009"))
    assert_found(renamed, "renamed to another step", by_reading=False)
    assert find_damage(shutil.copytree(backup, whole.parent.parent / "best")) is None  # other names are free


def test_whoever_can_make_digests_right_still_cannot_contradict_the_tables(whole: Path, tmp_path: Path) -> None:
    """A writer's bug: digests fit, but the table names a piece twice, or other shapes than the file has."""
    for change in ("overlap", "gap", "shape", "dtype"):
        directory = save_checkpoint(tmp_path / change, rows_of(0, 1), state(1))
        index = json.loads((directory / "tensors.json").read_bytes())
        entry = index["decoder.layers.0.mlp.linear_fc2.weight"]
        if change == "overlap":
            entry["pieces"] *= 2
        elif change == "gap":
            entry["shape"] = [7, 4]
        elif change == "shape":
            entry["shape"], entry["pieces"][0]["shape"] = [4, 6], [4, 6]
        else:
            entry["dtype"] = "I32"
        _publish_anew(directory, "tensors.json", dump_compact(index))
        assert_found(directory, change)


def _publish_anew(directory: Path, name: str, content: bytes) -> None:
    manifest = read_manifest(directory)
    (directory / name).write_bytes(content)
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (directory / "manifest.json").unlink()
    entries = [
        FileEntry(file, entry["bytes"], entry.get("sha256") or entry["tree_sha256"], "tree_sha256" in entry)
        for file, entry in manifest["files"].items()
    ]
    write_manifest(directory, manifest, entries)


def hostile_heads() -> Iterator[tuple[str, bytes]]:
    """Files that claim to be safetensors."""

    def file(header: object, data: bytes = bytes(16), length: int | None = None) -> bytes:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return (len(text) if length is None else length).to_bytes(8, "little") + text + data

    def one(**changes: object) -> dict[str, object]:
        return {"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], **changes}}

    yield "shorter than a length", b"\1\2\3"
    yield "length beyond the file", file(one(), length=2**40)
    yield "length of all ones", file(one(), length=2**64 - 1)
    yield "a header of 100 MB and more", (2**27).to_bytes(8, "little") + bytes(64)
    yield "no JSON", file(b"{" * 40)
    yield "deep JSON", file(b"[" * 200_000)
    yield "not utf-8", file(b'{"\xff": 1}')
    yield "utf-16", file(json.dumps(one()).encode("utf-16"))
    yield "a list", file([1])
    yield "a number of digits", file(b'{"w": ' + b"9" * 5000 + b"}")
    twice = json.dumps(one())[1:-1]
    yield "the same name twice", file(f"{{{twice}, {twice}}}".encode())
    yield "metadata of numbers", file({"__metadata__": {"a": 1}, **one()})
    yield "metadata that is a list", file({"__metadata__": [], **one()})
    yield "an entry that is a list", file({"w": [0, 16]})
    yield "a field missing", file({"w": {"dtype": "F32", "shape": [4]}})
    yield "a field more", file(one(module="os"))
    yield "an unknown dtype", file(one(dtype="F8_E4M3"))
    yield "a dtype of another kind", file(one(dtype=["F32"]))
    yield "a negative size", file(one(shape=[-4]))
    yield "a fraction", file(one(shape=[4.0]))
    yield "a truth value", file(one(shape=[True, 4]))
    yield "a huge size", file(one(shape=[2**63, 0]))
    yield "too many dimensions", file(one(shape=[1] * 4000 + [4]))
    yield "shape and bytes apart", file(one(shape=[5]))
    yield "offsets reversed", file(one(data_offsets=[16, 0]))
    yield "offsets behind the end", file(one(data_offsets=[16, 32]))
    yield "three offsets", file(one(data_offsets=[0, 8, 16]))
    yield "offsets into the header", file(one(data_offsets=[-8, 8]))
    yield "overlap", file({**one(), "v": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}})
    yield "a gap", file({**one(shape=[2], data_offsets=[8, 16])})
    yield "bytes behind the last tensor", file(one(shape=[2], data_offsets=[0, 8]))
    yield "data that nobody owns", file({})
    yield "a pickle", pickle.dumps({"w": 1}) + bytes(64)
    yield "empty", b""


@pytest.mark.parametrize("what", dict(hostile_heads()))
def test_a_hostile_header_is_one_line(tmp_path: Path, what: str) -> None:
    path = tmp_path / "tensors-00000.safetensors"
    path.write_bytes(dict(hostile_heads())[what])
    with pytest.raises(UserError, match=r"tensors-00000\.safetensors: not a safetensors file of ours") as caught:
        TensorFile(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_nothing_is_unpickled_while_everything_is_loaded(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something was unpickled")

    for module, names in ((pickle, ("load", "loads", "Unpickler", "_Unpickler")), (torch, ("load",))):
        for name in names:
            monkeypatch.setattr(module, name, refuse)
    monkeypatch.setattr("torch.serialization._load", refuse)
    monkeypatch.setattr("torch.serialization._legacy_load", refuse)
    found = find_latest(whole.parent)
    assert found == whole
    loaded = read_everything(whole)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())
    with pytest.raises(AssertionError):
        torch.load(whole)


def test_what_is_given_out_is_what_was_hashed(whole: Path) -> None:
    """The disk answers truly to whoever verifies and falsely ever after; no reader may believe the second answer."""
    reader = open_checkpoint(whole)
    true = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    assert find_damage(whole) is None
    reader.read("decoder.final_layernorm.weight")  # its file is open and known
    for path, content in true.items():
        path.write_bytes(bytes(byte ^ 1 for byte in content))
    for name in TENSORS:
        with pytest.raises(UserError, match="bytes do not match|not a safetensors file"):
            reader.read(name)
    with pytest.raises(UserError, match="bytes do not match"):
        reader.read_state()
    with pytest.raises(UserError, match="bytes do not match"):
        reader.read_bytes(EXTRA_FILE)


@pytest.mark.parametrize("change", [name for name in CHANGES if name != "zeroes"])
def test_what_only_looks_at_names_and_sizes_finds_whatever_shows_there(whole: Path, change: str) -> None:
    CHANGES[change](whole / "state.json")
    assert find_damage(whole, content=False) is not None
