"""`verify` against real shards: silent on whole ones, and every planted damage is named with its place."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import UserError
from data_pipeline.explain.verify import verify_source
from data_pipeline.manifest import open_source
from data_pipeline.masks.store import write_mask
from data_pipeline.prepare.shard import npy_bytes

SOURCES = ["text", "questions", "drawings"]
IN_HEADERS = {source: ["off", "len", "ntok"] + ["uid"] * (source != "questions") for source in SOURCES}
"""Arrays of the index that the headers repeat; those of documents hold no uid."""


@pytest.fixture(params=SOURCES)
def directory(request, shards, tmp_path):
    """A copy to damage."""
    return shutil.copytree(Path(shards.spec.sources[request.param].path), tmp_path / request.param)


def problems(directory, **digests):
    """(file, place, problem) of everything found."""
    return [(p.file, p.place, p.problem) for p in verify_source(directory, **digests).problems]


def flip(path, at, mask=0x10):
    content = bytearray(path.read_bytes())
    content[at] ^= mask
    path.write_bytes(content)


def test_whole_shards_have_no_problem(directory, shards):
    seen = []
    found = verify_source(
        directory, text_tokenizer=shards.tokenizer.digest, progress=lambda done, total: seen.append((done, total))
    )
    source = open_source(directory)
    assert found.problems == []
    assert (found.num_shards, found.num_samples) == (2, len(source))
    assert found.num_bytes == sum(entry.bytes for entry in source.manifest.shards)
    assert len(seen) == 2 and seen[-1] == (found.num_bytes, found.num_bytes)


def test_a_flipped_byte_is_found_by_hash_and_by_sample(directory):
    source = open_source(directory)
    shard, _ = source.place_of(7)
    flip(source.shard_path(shard), int(source.offset[7]))
    found = problems(directory)
    assert any("sha256 is not" in problem for _, _, problem in found)
    assert any(place == f"sample 7 ({source.uid(7)})" for _, place, _ in found)


def test_all_problems_are_listed_not_only_the_first(directory):
    source = open_source(directory)
    flip(source.shard_path(0), int(source.offset[3]))
    tar = source.shard_path(1)
    tar.write_bytes(tar.read_bytes()[:1500])
    flip(directory / "index" / "nund.npy", -1, 3)
    files = {file for file, _, _ in problems(directory)}
    assert {"shards/000000.tar", "shards/000001.tar", "index/nund.npy"} <= files


def test_a_missing_shard_does_not_hide_the_others(directory):
    source = open_source(directory)
    source.shard_path(0).unlink()
    flip(source.shard_path(1), int(source.offset[-1]))
    found = problems(directory)
    assert ("shards/000000.tar", "", "cannot be read (No such file or directory)") in found
    assert any(place.startswith(f"sample {len(source) - 1} ") for _, place, _ in found)


@pytest.mark.parametrize(
    ("directory", "name"), [(source, name) for source in SOURCES for name in IN_HEADERS[source]], indirect=["directory"]
)
def test_an_index_that_disagrees_with_the_headers_is_found_without_hashes(directory, name):
    path = directory / "index" / f"{name}.npy"
    array = np.load(path)
    array[5] += np.array(1, array.dtype)
    path.write_bytes(npy_bytes(array))
    manifest = json.loads((directory / "janus.json").read_text())
    manifest["index"] = {}
    (directory / "janus.json").write_text(json.dumps(manifest))
    found = problems(directory)
    assert any(file == f"index/{name}.npy" and place == "sample 5" for file, place, _ in found), found


def test_places_of_image_ids_are_compared(shards, tmp_path):
    directory = shutil.copytree(Path(shards.spec.sources["drawings"].path), tmp_path / "drawings")
    path = directory / "index" / "img.npy"
    array = np.load(path)
    array[2] += 2
    path.write_bytes(npy_bytes(array))
    found = problems(directory)
    assert any(file == "index/img.npy" and place == "sample 2" for file, place, _ in found)


@pytest.mark.parametrize("name", ["off", "crc", "ptr"])
def test_a_damaged_index_file_leaves_the_shards_checked(directory, name):
    (directory / "index" / f"{name}.npy").write_bytes(b"nothing")
    flip(directory / "shards" / "000000.tar", 600)
    found = problems(directory)
    files = [file for file, _, _ in found]
    assert f"index/{name}.npy" in files and "index" in files and "shards/000000.tar" in files


def test_other_tokenizers_are_named_with_both_digests(directory, shards):
    found = problems(directory, text_tokenizer="ab" * 32)
    assert [(file, place) for file, place, _ in found] == [("janus.json", "text_tokenizer")]
    assert shards.tokenizer.digest in found[0][2] and "ab" * 32 in found[0][2]
    found = problems(directory, image_tokenizer="cd" * 32)
    assert [place for _, place, _ in found] == ["image_tokenizer"]


def test_a_mask_of_another_manifest_is_a_problem(directory):
    source = open_source(directory)
    write_mask(source, "some", np.zeros(len(source), bool), {}, {})
    assert problems(directory) == []
    flip(directory / "masks" / "some.npy", -1, 1)
    assert [file for file, _, _ in problems(directory)] == ["masks/some.npy"]


def test_nothing_to_compare_with_is_bad_input(tmp_path):
    with pytest.raises(UserError, match=r"janus\.json: cannot be read .*data doctor"):
        verify_source(tmp_path)
