"""What the doctor says of members that do not decode, and its report as a whole."""

import gzip
import shutil
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import UserError
from data_pipeline.explain.doctor import examine
from data_pipeline.explain.findings import EXPLANATIONS, Findings
from data_pipeline.explain.member_checks import CheckOptions
from tests.support.shards import make_shards
from tests.support.tars import JPG, by_webdataset, codes, only, pairs, picture, tar_of

pytestmark = [
    # webdataset leaves its files to the garbage collector
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
# ---- content ---------------------------------------------------------------------------------------------------------


def bomb():
    content = bytearray(picture("png"))
    content[16:24] = (40_000).to_bytes(4, "big") * 2
    return bytes(content)


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("a.jpg", b"<html>404 not found</html>", "undecodable"),
        ("a.jpg", JPG[:40], "undecodable"),
        ("a.jpg", JPG[: len(JPG) // 2], "undecodable"),
        ("a.png", picture("png")[:-20], "undecodable"),
        ("a.webp", picture("webp")[:-9], "undecodable"),
        ("a.png", bomb(), "pixel_bomb"),
        ("a.jpg", picture("png"), "wrong_extension"),
        ("a.gif", b"GIF89a", "unsupported_picture"),
        ("a.json", b"{", "undecodable"),
        ("a.json", b"[" * 100_000, "undecodable"),
        ("a.txt", b"\xff\xfe", "undecodable"),
        ("a.npy", b"\x93NUMPY\x01\x00", "undecodable"),
        ("a.npy", b"no array at all!", "undecodable"),
    ],
)
def test_content_that_does_not_decode(write, name, content, code):
    (finding,) = only(write(tar_of((name, content))), code)
    assert finding.member == name


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_sizes_are_read_from_headers(kind):
    from data_pipeline.explain.picture_header import picture_size

    for size in ((24, 16), (300, 7)):
        assert picture_size(picture(kind, size)) == size


def test_a_damaged_middle_is_found_by_decoding_only(write):
    content = bytearray(picture("png", (64, 64)))
    content[len(content) // 2] ^= 0xFF
    path = write(tar_of(("a.png", bytes(content))))
    assert not codes(path)
    only(path, "undecodable", decode=True)


def test_large_members_are_not_read(write):
    (finding,) = only(write(tar_of(("a.jpg", JPG))), "oversized_member", max_member_bytes=100)
    assert str(len(JPG)) in finding.detail


# ---- the report ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", bytes(10_240)])
def test_a_tar_without_members(write, content):
    path = write(content)
    samples = by_webdataset(path)
    assert bool(samples) == (content == b""), "0 bytes raise, end blocks alone give nothing"
    only(path, "empty_tar")


def test_what_is_no_tar_is_damage_from_its_first_byte(write):
    path = write(b"hello, this is no tar" * 100)
    assert isinstance(by_webdataset(path)[0], tarfile.ReadError)
    (finding,) = only(path, "damaged_header")
    assert finding.at == 0 and "no member is found" in finding.detail


def test_a_compressed_tar_is_named(write):
    path = write(gzip.compress(tar_of(*pairs("000", "001"))), "shard.tar.gz")
    assert len(by_webdataset(path)) == 2
    only(path, "compressed")


def test_findings_are_capped_and_counted(write):
    path = write(tar_of(*[(f"{k}.jpg", b"") for k in range(30)]))
    findings = examine([path], CheckOptions(limit=4)).findings
    assert len(findings.kept) == 4 and findings.counts["empty_member"] == 30 and findings.num_left_out == 26


def test_every_kind_of_finding_is_explained():
    for code, explanation in EXPLANATIONS.items():
        assert explanation.title and explanation.webdataset and explanation.fix, code
    with pytest.raises(AssertionError):
        Findings().add("unheard of", "", "", 0)


@pytest.mark.parametrize("given", ["nowhere.tar", "."])
def test_no_tar_is_bad_input(tmp_path, given):
    with pytest.raises(UserError, match="give tars"):
        examine([tmp_path / given])


def test_two_sources_may_show_the_same_images(tmp_path):
    """Ids and pictures of one image are joined by uid; within one source a uid stands for one sample."""
    shards = make_shards(tmp_path)
    first = Path(shards.spec.sources["text"].path)
    twin = shutil.copytree(first, tmp_path / "twin")
    assert not examine([first, twin]).findings.num_harmful
    shutil.copy(first / "shards" / "000000.tar", first / "shards" / "copy.tar")
    assert examine([first]).findings.counts["duplicate_uid"] == 30


def test_memory_does_not_grow_with_the_tar(write):
    """48 MiB of members, half of them behind a damaged header, pass through a few hundred kilobytes."""
    big = bytes(np.random.default_rng(0).integers(1, 256, 2 << 20, dtype=np.uint8))
    content = bytearray(tar_of(*[(f"{k:02d}.bin", big) for k in range(24)]))
    at = 12 * (len(big) + 512)
    content[at : at + 3] = b"xyz"
    path = write(content)
    del content
    examine([path])
    tracemalloc.start()
    report = examine([path])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert report.num_members == 23 and "damaged_header" in report.findings.counts
    assert peak < 8 << 20


def test_progress_is_told_within_a_shard(write):
    path = write(tar_of(*[(f"{k:04d}.txt", b"x") for k in range(2500)]))
    seen = []
    report = examine([path], progress=lambda done, total: seen.append((done, total)))
    assert report.num_members == report.num_samples == 2500
    assert [done for done, _ in seen] == [1024 * 1000, 1024 * 2000, path.stat().st_size]
