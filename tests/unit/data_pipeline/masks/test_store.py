"""Masks on disk: what is written comes back, bytes repeat, and nothing made for other shards is believed."""

import json

import numpy as np
import pytest

from data_pipeline.errors import UserError
from data_pipeline.manifest import open_source
from data_pipeline.masks.store import (
    list_masks,
    mask_digest,
    mask_facts,
    read_mask,
    read_masks,
    remove_mask,
    write_mask,
)


@pytest.fixture
def source(copy_of):
    return copy_of("text")


def bits(source, *numbers):
    left_out = np.zeros(len(source), bool)
    left_out[list(numbers)] = True
    return left_out


def complaint(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_mask_comes_back_and_leaves_shards_and_index_alone(source):
    before = {path: path.read_bytes() for path in source.path.rglob("*") if path.is_file()}
    write_mask(source, "short-ones", bits(source, 1, 4), {"too short": 2}, {"min_tokens": 5})
    assert np.flatnonzero(read_mask(source, "short-ones")).tolist() == [1, 4]
    assert read_mask(source, "short-ones").dtype == bool
    facts = mask_facts(source, "short-ones")
    assert (facts["num_left_out"], facts["reasons"], facts["settings"]) == (2, {"too short": 2}, {"min_tokens": 5})
    after = {path: path.read_bytes() for path in source.path.rglob("*") if path.is_file()}
    assert set(after) - set(before) == {source.path / "masks" / f"short-ones.{end}" for end in ("npy", "json")}
    assert all(after[path] == content for path, content in before.items())
    assert open_source(source.path).digest == source.digest


def test_the_same_arguments_give_the_same_bytes(source):
    def written():
        digest = write_mask(source, "a", bits(source, 3), {"y": 1, "x": 1}, {"b": [1], "a": None})
        return digest, *((source.path / "masks" / f"a.{end}").read_bytes() for end in ("npy", "json"))

    first = written()
    assert first == written()
    assert first[0] == mask_digest(source, "a")


def test_the_digest_is_of_what_is_left_out(source):
    one = write_mask(source, "a", bits(source, 3), {"x": 1}, {})
    assert write_mask(source, "b", bits(source, 3), {"other reason": 1}, {"k": 2}) == one
    assert write_mask(source, "b", bits(source, 4), {"x": 1}, {}) != one


def test_several_masks_are_joined(source):
    write_mask(source, "b", bits(source, 1, 2), {}, {})
    write_mask(source, "a", bits(source, 2, 5), {}, {})
    assert list_masks(source) == ["a", "b"]
    assert np.flatnonzero(read_masks(source, ["a", "b"])).tolist() == [1, 2, 5]
    assert not read_masks(source, []).any()


def test_removing_is_deleting_two_files(source):
    write_mask(source, "a", bits(source, 1), {}, {})
    remove_mask(source, "a")
    assert list_masks(source) == [] and not list((source.path / "masks").iterdir())
    with pytest.raises(UserError, match="no mask 'a' to remove, there is none"):
        remove_mask(source, "a")


def test_an_unknown_name_lists_those_there_are(source):
    with pytest.raises(UserError, match=r"no mask 'dedup', there is none.*--name dedup"):
        read_mask(source, "dedup")
    write_mask(source, "a", bits(source), {}, {})
    write_mask(source, "b", bits(source), {}, {})
    with pytest.raises(UserError, match="there are: a, b; correct the name") as error:
        mask_digest(source, "dedup")
    complaint(error)


def test_a_mask_for_another_manifest_is_refused_with_both_digests(source):
    write_mask(source, "a", bits(source, 1), {}, {})
    path = source.path / "janus.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "licence": "CC0"}))
    changed = open_source(source.path)
    for read in (read_mask, mask_digest):
        with pytest.raises(UserError) as error:
            read(changed, "a")
        said = complaint(error)
        assert source.digest in said and changed.digest in said and "--remove a" in said
    remove_mask(changed, "a")


@pytest.mark.parametrize("name", ["", "../x", "a/b", "a.b", ".hidden", "-a", "a" * 65, "ä", "a\n"])
def test_names_are_plain_words(source, name):
    for call in (lambda: write_mask(source, name, bits(source), {}, {}), lambda: read_mask(source, name)):
        with pytest.raises(UserError, match="is no name of a mask"):
            call()
    assert not (source.path / "masks").exists()


@pytest.mark.parametrize("wrong", [np.zeros(3, bool), np.zeros(12, np.uint8), np.zeros((12, 1), bool)])
def test_a_mask_of_another_shape_is_not_written(source, wrong):
    assert len(source) == 12
    with pytest.raises(UserError, match=r"the source needs bool \[12\]"):
        write_mask(source, "a", wrong, {}, {})
    assert list_masks(source) == []


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", "swap", "pickle", "flip"])
def test_a_damaged_array_is_refused(source, content):
    write_mask(source, "a", bits(source, 1), {}, {})
    path = source.path / "masks" / "a.npy"
    whole = path.read_bytes()
    if content == "swap":  # the array of an interrupted replacement beside facts of before
        write_mask(source, "b", bits(source, 2), {}, {})
        content = (source.path / "masks" / "b.npy").read_bytes()
    elif content == "pickle":
        np.save(path, np.array([{}], object), allow_pickle=True)
        content = path.read_bytes()
    elif content == "flip":
        content = whole[:-1] + b"\1"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.npy: damaged mask .*make the mask again") as error:
        read_mask(source, "a")
    complaint(error)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"v": 1, "source": 3}', '{"v": 2, "source": "", "sha256": ""}'])
def test_damaged_facts_are_refused(source, content):
    write_mask(source, "a", bits(source, 1), {}, {})
    (source.path / "masks" / "a.json").write_text(content)
    with pytest.raises(UserError, match=r"a\.json: .*make the mask again") as error:
        read_mask(source, "a")
    complaint(error)


def test_a_stop_between_the_files_leaves_no_mask_rather_than_a_wrong_one(source, monkeypatch):
    write_mask(source, "a", bits(source, 1), {}, {})
    import data_pipeline.masks.store as store

    whole = store.write_aside

    def stops_at_facts(path, content):
        if path.suffix == ".json":
            raise KeyboardInterrupt
        whole(path, content)

    monkeypatch.setattr(store, "write_aside", stops_at_facts)
    with pytest.raises(KeyboardInterrupt):
        write_mask(source, "a", bits(source, 2), {}, {})
    with pytest.raises(UserError, match="no mask 'a'"):
        read_mask(source, "a")
