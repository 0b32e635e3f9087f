"""What the doctor finds in tars of others, and that stock webdataset really does with them what is said."""

import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from webdataset.tariterators import base_plus_ext

from data_pipeline.explain.doctor import examine
from data_pipeline.explain.member_checks import split_name
from tests.support.shards import make_shards
from tests.support.tars import CAPTION, JPG, by_webdataset, codes, only, pairs, picture, shape, tar_of

pytestmark = [
    # webdataset leaves its files to the garbage collector
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
WHOLE = tar_of(*pairs("000", "001", "002", "003"))


def headers():
    with tarfile.open(fileobj=io.BytesIO(WHOLE)) as tar:
        return {member.name: member.offset for member in tar}


# ---- whole tars ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_nothing_is_found_in_a_whole_tar_of_any_format(write, form):
    long = "a/" * 60 + "a_long_name_" * 7
    path = write(tar_of(("a/", "5", ""), *pairs("000", "001", long, "ünï"), form=form))
    report = examine([path])
    assert not report.findings.kept
    assert (report.num_members, report.num_samples) == (9, 4)
    assert len(by_webdataset(path)) == 4


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_are_read_whole(write, form):
    path = write(tar_of(("x" * 300 + ".jpg", b"no picture"), form=form))
    (finding,) = only(path, "undecodable")
    assert finding.member == "x" * 300 + ".jpg" and finding.at == 0


def test_names_are_cut_as_webdataset_cuts_them():
    random = np.random.default_rng(3)
    letters = list("ab./_") + ["__", "JPG"]
    for _ in range(20_000):
        name = "".join(random.choice(letters, random.integers(1, 9)))
        key, extension = base_plus_ext(name)
        reserved = webdataset.tariterators.re.match(r"__[^/]*__($|/)", name)
        expected = None if key is None or reserved else (key, extension.lower())
        assert split_name(name) == expected, name


def test_our_own_shards_are_whole(tmp_path):
    shards = make_shards(tmp_path)
    for source in shards.spec.sources.values():
        report = examine([Path(source.path)])
        assert not report.findings.num_harmful, report.findings.kept


# ---- what webdataset swallows: the claim, then the finding -----------------------------------------------------------


def test_a_tar_cut_between_two_members_is_a_shard_that_ends_early(write):
    path = write(WHOLE[: headers()["001.txt"]])
    assert shape(by_webdataset(path)) == [("000", ["jpg", "txt"]), ("001", ["jpg"])]
    found = examine([path]).findings.kept
    assert {finding.code for finding in found} == {"missing_end", "missing_member"}
    assert next(f for f in found if f.code == "missing_end").at == headers()["001.txt"]


def test_a_tar_cut_in_a_header_is_a_shard_that_ends_early(write):
    at = headers()["001.txt"]
    path = write(WHOLE[: at + 100])
    assert shape(by_webdataset(path)) == [("000", ["jpg", "txt"]), ("001", ["jpg"])]
    assert {"truncated", "missing_member"} == codes(path)


def test_a_tar_cut_in_content_raises_or_drops_the_rest(write):
    at = headers()["002.jpg"]
    path = write(WHOLE[: at + 512 + 30])
    *samples, error = shape(by_webdataset(path))
    assert samples == [("000", ["jpg", "txt"])] and isinstance(error, tarfile.ReadError)
    quiet = shape(by_webdataset(path, handler=webdataset.ignore_and_continue))
    assert quiet == [("000", ["jpg", "txt"]), ("001", ["jpg", "txt"])]
    (finding,) = only(path, "truncated")
    assert (finding.member, finding.at) == ("002.jpg", at)


def test_a_damaged_header_ends_a_shard_for_webdataset_and_the_walk_goes_on(write):
    content = bytearray(WHOLE)
    at = headers()["001.txt"]
    content[at + 3] ^= 1
    path = write(content)
    assert shape(by_webdataset(path)) == [("000", ["jpg", "txt"]), ("001", ["jpg"])]
    report = examine([path])
    damage = next(f for f in report.findings.kept if f.code == "damaged_header")
    assert damage.at == at and f"byte {headers()['002.jpg']}" in damage.detail
    assert report.num_samples == 4 and report.num_members == 7


@pytest.mark.parametrize("shift", [1, 77, 511])
def test_members_are_found_again_behind_a_splice_at_any_byte(write, shift):
    at = headers()["001.jpg"]
    path = write(WHOLE[: at + 600] + WHOLE[at + 600 + shift :])
    report = examine([path])
    assert report.num_members >= 6 and "damaged_header" in report.findings.counts


def test_joined_tars_lose_all_but_the_first(write):
    path = write(WHOLE + tar_of(*pairs("100", "101")))
    assert [key for key, _ in by_webdataset(path)] == ["000", "001", "002", "003"]
    (finding,) = only(path, "data_after_end")
    assert f"begins at byte {len(WHOLE)}" in finding.detail
    assert examine([path]).num_samples == 6


def test_interleaved_keys_become_fragments(write):
    path = write(tar_of(("a.jpg", JPG), ("b.jpg", JPG), ("a.txt", CAPTION), ("b.txt", CAPTION)))
    assert shape(by_webdataset(path)) == [("a", ["jpg"]), ("b", ["jpg"]), ("a", ["txt"]), ("b", ["txt"])]
    found = only(path, "interleaved_key")
    assert [finding.member for finding in found] == ["a.txt", "b.txt"]


def test_dotted_keys_are_joined_into_one_sample(write):
    path = write(tar_of(*pairs("0.25", "0.50", "0.75", "1")))
    assert shape(by_webdataset(path))[0] == (
        "0", ["25.jpg", "25.txt", "50.jpg", "50.txt", "75.jpg", "75.txt"],
    )  # fmt: skip
    found = [f for f in examine([path]).findings.kept if f.code == "dotted_key"]
    assert {finding.member for finding in found} == {f"0.{n}.{e}" for n in (25, 50, 75) for e in ("jpg", "txt")}


def test_a_convention_of_two_part_extensions_is_no_dotted_key(write):
    members = [(f"{k:03d}.{e}", c) for k in range(5) for e, c in (("left.jpg", JPG), ("0.png", picture("png")))]
    assert not codes(write(tar_of(*members)))


def test_two_samples_of_one_key(write):
    path = write(tar_of(*pairs("a", "b", "a")))
    assert [key for key, _ in by_webdataset(path)] == ["a", "b", "a"]
    only(path, "duplicate_key")


@pytest.mark.parametrize("again", ["a.jpg", "a.JPG"])
def test_a_member_that_is_there_twice(write, again):
    path = write(tar_of(("a.jpg", JPG), (again, JPG), ("b.jpg", JPG)))
    assert isinstance(by_webdataset(path)[0], ValueError)
    (finding,) = only(path, "duplicate_member")
    assert finding.member == again


def test_one_uid_in_two_shards(write):
    uid = b'{"uid": "00112233445566778899aabbccddeeff"}'
    first = write(tar_of(("a.jpg", JPG), ("a.json", uid)), "first.tar")
    write(tar_of(("b.jpg", JPG), ("b.json", b'{"uid": "x"}'), ("c.jpg", JPG), ("c.json", uid)), "second.tar")
    (finding,) = only(first.parent, "duplicate_uid")
    assert finding.shard.endswith("second.tar") and "first.tar" in finding.detail
    assert finding.at == 512 + (-(-len(JPG) // 512)) * 512 + 512 * 2
    both = [by_webdataset(first.parent / name) for name in ("first.tar", "second.tar")]
    assert len(both[0]) == 1 and len(both[1]) == 2


def test_a_key_that_every_shard_uses_is_odd_where_there_are_no_uids(write):
    first = write(tar_of(*pairs("a")), "first.tar")
    write(tar_of(*pairs("a")), "second.tar")
    assert examine([first.parent]).findings.num_harmful == 0
    only(first.parent, "repeated_key")


@pytest.mark.parametrize(
    ("kind", "code"), [("1", "link"), ("2", "link"), ("3", "special_member"), ("6", "special_member")]
)
def test_links_and_devices_leave_samples_incomplete(write, kind, code):
    path = write(tar_of(*pairs("a", "b", "c"), ("d.jpg", kind, "a.jpg"), ("d.txt", CAPTION)))
    assert shape(by_webdataset(path))[-1] == ("d", ["txt"])
    found = examine([path]).findings.kept
    assert {finding.code for finding in found} == {code, "missing_member"}
    assert next(finding for finding in found if finding.code == code).member == "d.jpg"


def test_a_picture_without_a_caption(write):
    path = write(tar_of(*pairs("a", "b", "c"), ("d.jpg", JPG)))
    assert shape(by_webdataset(path))[-1] == ("d", ["jpg"])
    (finding,) = only(path, "missing_member")
    assert finding.member == "d.jpg" and finding.detail == "no text"


@pytest.mark.parametrize("name", ["b", ".b.jpg", "__meta__/b.jpg"])
def test_names_that_are_skipped(write, name):
    path = write(tar_of(*pairs("a"), (name, JPG), *pairs("c")))
    assert [key for key, _ in by_webdataset(path)] == ["a", "c"]
    (finding,) = only(path, "skipped_name")
    assert finding.member == name


def test_a_resource_fork_in_a_directory_becomes_a_sample(write):
    path = write(tar_of(("d/a.jpg", JPG), ("d/._a.jpg", b"x"), ("d/a.txt", CAPTION)))
    assert shape(by_webdataset(path)) == [("d/a", ["jpg"]), ("d/", ["_a.jpg"]), ("d/a", ["txt"])]
    assert {"resource_fork", "interleaved_key"} <= codes(path)
    only(write(tar_of(*pairs("a"), ("._a.jpg", b"x"))), "resource_fork")


@pytest.mark.parametrize("name", ["/etc/a.jpg", "../a.jpg", "b/../../a.jpg", "C:\\a.jpg", "b\\a.jpg", "a\x07.jpg"])
def test_names_that_lead_elsewhere(write, name):
    path = write(tar_of((name, JPG)))
    assert len(by_webdataset(path)) == 1, "taken as a key as it is"
    (finding,) = [f for f in examine([path]).findings.kept if f.code == "unsafe_name"]
    assert finding.member == name


def test_pickles(write):
    class Runs:
        def __reduce__(self):
            return (list, ("ran",))

    path = write(tar_of(("a.pyd", pickle.dumps(Runs()))))
    dataset = webdataset.WebDataset(str(path), shardshuffle=False).decode()
    assert next(iter(dataset))["pyd"] == list("ran"), "decode runs what a pickle says"
    only(path, "pickle")
    objects = io.BytesIO()
    np.save(objects, np.array([{}], object), allow_pickle=True)
    only(write(tar_of(("a.npy", objects.getvalue()))), "pickle")


def test_empty_members_and_empty_captions(write):
    path = write(tar_of(("a.jpg", JPG), ("a.txt", b""), ("b.jpg", JPG), ("b.txt", b" \n")))
    assert [fields["txt"] for _, fields in by_webdataset(path)] == [b"", b" \n"]
    assert codes(path) == {"empty_member", "empty_text"}


def test_several_extensions_for_one_thing(write):
    path = write(tar_of(*pairs("a", "b"), ("c.png", picture("png")), ("c.txt", CAPTION)))
    samples = webdataset.WebDataset(str(path), shardshuffle=False).to_tuple(
        "jpg", "txt", handler=webdataset.ignore_and_continue
    )
    assert len(list(samples)) == 2, "the png is dropped"
    (finding,) = only(path, "mixed_extensions")
    assert finding.member == "c.png" and finding.detail == "pictures: .jpg 2, .png 1"
