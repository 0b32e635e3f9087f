"""Damaged tars, members, pictures, indexes and manifests: no crash, no silent loss, bounded memory and time.

`JANUS_FUZZ_CASES` says how many cases run in all (10,000 take some minutes), a few hundred do in every test run. A case
is named by its number: the same number is the same damage. What is promised:

* a sample of indexed shards comes back bit-equal, or as a BrokenSample, or opening its source is refused;
* a tar without an index whose structure is damaged is reported by the doctor (content under whole headers only a
  checksum can see, so there the promise is the index's);
* a picture is decoded or refused; nothing else is ever raised.
"""

import os
import resource
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import BrokenSample, UserError
from data_pipeline.explain.doctor import examine
from data_pipeline.explain.member_checks import CheckOptions
from data_pipeline.explain.picture_header import picture_size
from data_pipeline.explain.tar_walk import Entry, walk_tar
from data_pipeline.explain.verify import verify_source
from data_pipeline.images import ImageError, decode_image
from data_pipeline.manifest import open_source
from data_pipeline.prepare.foreign import index_tars
from data_pipeline.prepare.shard import npy_bytes
from data_pipeline.stream.dataset import RowDataset
from data_pipeline.stream.read import SampleReader
from data_pipeline.tar_scan import scan_tar
from tests.support.damage import damage_picture, damage_tar
from tests.support.raw import picture, picture_bytes, train_tokenizer
from tests.support.shards import GEOMETRY, make_shards
from tests.support.tars import tar_of

CASES = int(os.environ.get("JANUS_FUZZ_CASES", "500"))
SHARES = {"shards": 0.30, "rows": 0.05, "tars": 0.25, "pairs": 0.1, "pictures": 0.25, "index": 0.05}
ROW_FIELDS = ("input_ids", "token_kind", "position_ids", "labels", "label_head", "label_task")
MAX_CASE_S = 5.0
MAX_GROWTH_MIB = 700
"""A picture just below the limit of 64 million pixels takes 192 MB decoded, and its conversion as much again."""

pytestmark = pytest.mark.timeout(3600)


def cases(kind):
    return range(round(CASES * SHARES[kind]))


@pytest.fixture(autouse=True)
def bounded_memory():
    """The peak of the process grows by no more than one large picture may take."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown_mib < MAX_GROWTH_MIB


class Clock:
    """Every case in its time."""

    def __init__(self):
        self.slowest_s = 0.0

    def __call__(self, run, *arguments):
        start = time.process_time()
        result = run(*arguments)
        self.slowest_s = max(self.slowest_s, time.process_time() - start)
        assert self.slowest_s < MAX_CASE_S, arguments
        return result


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Shards of all three kinds, and tars of pairs with their index."""
    root = tmp_path_factory.mktemp("whole")
    make_shards(root, num_samples=12)
    pictures = [picture_bytes(picture("red", 24 + n, 20, n), ("jpeg", "png", "webp")[n % 3]) for n in range(6)]
    members = []
    for number, content in enumerate(pictures):
        members.append((f"{number:03d}.{('jpg', 'png', 'webp')[number % 3]}", content))
        members.append((f"{number:03d}.txt", f"a caption of picture {number}".encode()))
    (root / "pairs").mkdir()
    (root / "pairs" / "0.tar").write_bytes(tar_of(*members))
    return root


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def one_line(error):
    """What is told to people is one line, and of a known kind."""
    if isinstance(error, BrokenSample):
        assert error.reason in ("checksum", "truncated", "undecodable", "mismatch")
    assert "\n" not in str(error)


def values(sample):
    """Everything of a sample that must come back, comparable."""
    arrays = [sample.caption_ids, sample.image_ids, *sample.images, *(segment.text_ids for segment in sample.segments)]
    return sample.uid, [(segment.image, segment.has_loss) for segment in sample.segments], [
        None if array is None else (array.shape, array.tobytes()) for array in arrays
    ]  # fmt: skip


def read_whole(directory, tokenizer=None):
    source = open_source(directory)
    reader = SampleReader(source, GEOMETRY, tokenizer)
    return [values(reader.read(i)) for i in range(len(source))]


def compare(directory, expected, tokenizer=None):
    """Reads a damaged directory; returns (refused, broken samples, samples whose content is silently wrong)."""
    try:
        source = open_source(directory)
        reader = SampleReader(source, GEOMETRY, tokenizer)
        num_samples = len(source)
    except UserError as error:
        one_line(error)
        return True, 0, []
    broken, wrong = 0, []
    for i in range(num_samples):
        try:
            found = values(reader.read(i))
        except BrokenSample as error:
            one_line(error)
            broken += 1
            continue
        if i >= len(expected) or found != expected[i]:
            wrong.append(i)
    reader.close()
    return False, broken, wrong


# ---- shards with an index --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["text", "questions", "drawings"])
def test_samples_of_damaged_shards_come_back_equal_or_reported(whole, tmp_path, kind):
    directory = shutil.copytree(whole / kind, tmp_path / kind)
    expected, clock, reported = read_whole(directory), Clock(), 0
    tar = directory / "shards" / "000000.tar"
    content = tar.read_bytes()
    numbers = [number for number in cases("shards") if number % 3 == ["text", "questions", "drawings"].index(kind)]
    for number in numbers:
        damaged = damage_tar(content, np.random.default_rng([1, number]))
        # The size is known to the manifest; damage of the same size has to be found when it is read.
        tar.write_bytes(damaged.content[: len(content)].ljust(len(content), b"\0") if number % 2 else damaged.content)
        refused, broken, wrong = clock(compare, directory, expected)
        assert not wrong, (number, damaged.how, wrong)
        reported += refused or broken > 0
        clock(examine, [tar])
        if number % 7 == 0 and tar.read_bytes() != content:
            assert clock(verify_source, directory).problems, (number, damaged.how)
    assert reported > 0.3 * len(numbers)


def documents_of(rows, planned):
    """Everything of each document of some rows, comparable; its planned place tells which it is."""
    found = []
    for number in range(len(planned.source_no)):
        at = int(np.searchsorted(planned.row_start, number, "right")) - 1
        first = int(planned.row_start[at])
        start = int(planned.length[first:number].sum())
        here = slice(start, start + int(planned.length[number]))
        found.append([rows[at][name][here].tobytes() for name in ROW_FIELDS])
    return found


def test_rows_of_damaged_shards_are_equal_or_have_holes(tmp_path):
    """The same promise for the road of training, which reads many samples at once."""
    shards = make_shards(tmp_path, num_samples=12)
    data, clock = shards.open(), Clock()
    planned = data.plan.rows(range(8))
    expected = documents_of(fields_of(RowDataset(data)), planned)
    images = sum(len(row["pixel_values"]) for row in fields_of(RowDataset(data)))
    assert images
    num_holes = 0
    for number in cases("rows"):
        tar = tmp_path / ("text", "questions", "drawings")[number % 3] / "shards" / f"00000{number % 2}.tar"
        content = tar.read_bytes()
        damaged = damage_tar(content, np.random.default_rng([6, number]))
        tar.write_bytes(damaged.content[: len(content)].ljust(len(content), b"\0"))
        rows = clock(fields_of, RowDataset(shards.open()))
        tar.write_bytes(content)
        for at, (found, wanted) in enumerate(zip(documents_of(rows, planned), expected, strict=True)):
            source, sample = data.sources[int(planned.source_no[at])], int(planned.sample_no[at])
            row = int(np.searchsorted(planned.row_start, at, "right")) - 1
            if source.uid(sample) in {hole.uid for hole in rows[row]["holes"]}:
                num_holes += 1
            else:
                assert found == wanted, (number, damaged.how, at)
    assert num_holes


@pytest.mark.parametrize("name", ["off", "len", "img", "crc"])
@pytest.mark.parametrize("bit", [0, 31, 62, 63])
def test_index_entries_that_point_nowhere_are_holes(tmp_path, name, bit):
    shards = make_shards(tmp_path, num_samples=12)
    planned = shards.open().plan.rows(range(8))
    expected = documents_of(fields_of(RowDataset(shards.open())), planned)
    for kind in ("text", "questions", "drawings") if name != "img" else ("drawings",):
        path = tmp_path / kind / "index" / f"{name}.npy"
        array = np.load(path)
        array[3] ^= np.array(1 << min(bit, 8 * array.itemsize - 1), array.dtype)
        path.write_bytes(npy_bytes(array))
    data = shards.open()
    rows = fields_of(RowDataset(data))
    for at, (found, wanted) in enumerate(zip(documents_of(rows, planned), expected, strict=True)):
        uid = data.sources[int(planned.source_no[at])].uid(int(planned.sample_no[at]))
        row = int(np.searchsorted(planned.row_start, at, "right")) - 1
        assert found == wanted or uid in {hole.uid for hole in rows[row]["holes"]}
    assert any(row["holes"] for row in rows)


def fields_of(dataset):
    """The first rows, as dicts."""
    names = (*ROW_FIELDS, "pixel_values", "holes")
    return [{name: getattr(row, name) for name in names} for row in map(dataset.__getitem__, range(8))]


# ---- anybody's tars --------------------------------------------------------------------------------------------------


def members_of(path):
    with path.open("rb") as stream:
        found = [item for item in walk_tar(stream, path.stat().st_size) if isinstance(item, Entry)]
        contents = []
        for entry in found:
            stream.seek(entry.data)
            contents.append((entry.name, stream.read(entry.size)))
    return contents


def test_damaged_tars_are_examined_and_structural_damage_is_reported(whole, tmp_path):
    path = tmp_path / "0.tar"
    content = (whole / "pairs" / "0.tar").read_bytes()
    path.write_bytes(content)
    expected, clock = members_of(path), Clock()
    for number in cases("tars"):
        damaged = damage_tar(content, np.random.default_rng([2, number]))
        path.write_bytes(damaged.content)
        report = clock(examine, [path], CheckOptions(decode=number % 4 == 0, max_member_bytes=1 << 24))
        lost = [name for (name, data), found in _pair_up(expected, clock(members_of, path)) if found != data]
        if lost and damaged.is_structural:
            assert report.findings.counts, (number, damaged.how, lost)
        try:
            for member in clock(lambda: list(scan_tar(path))):
                assert 0 <= member.data <= member.end <= len(damaged.content)
        except UserError as error:
            one_line(error)


def _pair_up(expected, found):
    by_name = {}
    for name, content in found:
        by_name.setdefault(name, content)
    return [((name, content), by_name.get(name)) for name, content in expected]


def test_pairs_of_damaged_tars_come_back_equal_or_reported(whole, tmp_path, tokenizer):
    """Tars that were damaged after they were indexed, and tars that are damaged when they are."""
    shutil.copytree(whole / "pairs", tmp_path / "tars")
    path = tmp_path / "tars" / "0.tar"
    content = path.read_bytes()
    index_tars([path], tmp_path / "index", tokenizer)
    expected, clock = read_whole(tmp_path / "index", tokenizer), Clock()
    for number in cases("pairs"):
        damaged = damage_tar(content, np.random.default_rng([3, number]))
        path.write_bytes(damaged.content[: len(content)].ljust(len(content), b"\0") if number % 2 else damaged.content)
        _, _, wrong = clock(compare, tmp_path / "index", expected, tokenizer)
        assert not wrong, (number, damaged.how, wrong)
        path.write_bytes(damaged.content)
        fresh = tmp_path / "fresh"
        try:
            clock(index_tars, [path], fresh, tokenizer)
        except UserError as error:
            one_line(error)
        else:
            _, _, wrong = clock(compare, fresh, expected, tokenizer)
            assert not (wrong and damaged.is_structural), (number, damaged.how, wrong)
            lost = len(expected) - open_source(fresh).num_samples
            assert not (lost > 0 and damaged.is_structural), (number, damaged.how, "samples are missing from the index")
        shutil.rmtree(fresh, ignore_errors=True)
        path.write_bytes(content)


# ---- pictures --------------------------------------------------------------------------------------------------------


def decode_or_refuse(content):
    try:
        pixels = decode_image(content)
    except ImageError:
        return False
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.size
    return True


def measure_or_refuse(content):
    try:
        width, height = picture_size(content)
    except ImageError:
        return
    assert width >= 0 and height >= 0


def test_damaged_pictures_are_decoded_or_refused():
    kinds = ("jpeg", "png", "webp")
    whole = [picture_bytes(picture("blue", 40, 30, number), kind) for number, kind in enumerate(kinds)]
    clock, decoded, numbers = Clock(), 0, cases("pictures")
    for number in numbers:
        content = damage_picture(whole[number % 3], np.random.default_rng([4, number]))
        decoded += clock(decode_or_refuse, content)
        clock(measure_or_refuse, content)
    assert 0 < decoded < len(numbers)


# ---- index and manifest ----------------------------------------------------------------------------------------------


def test_damaged_indexes_and_manifests_are_refused_or_reported(whole, tmp_path):
    clock = Clock()
    for number in cases("index"):
        random = np.random.default_rng([5, number])
        kind = ("text", "questions", "drawings")[number % 3]
        directory = shutil.copytree(whole / kind, tmp_path / str(number))
        expected = read_whole(directory)
        files = [directory / "janus.json", *sorted((directory / "index").glob("*.npy"))]
        file = files[int(random.integers(len(files)))]
        content = bytearray(file.read_bytes())
        if number % 4 == 0:
            content = content[: int(random.integers(0, len(content)))]
        else:
            for place in random.integers(0, len(content), random.integers(1, 6)):
                content[place] ^= 1 << int(random.integers(0, 8))
        file.write_bytes(content)
        _, _, wrong = clock(compare, directory, expected)
        if wrong:  # only what is said about a sample may differ: `verify` is who reads the index's own hashes
            assert file.name in ("uid.npy", "janus.json"), (number, file.name)
        if file.name != "janus.json":
            assert clock(verify_source, directory).problems, (number, file.name)
        else:
            try:
                clock(verify_source, directory)
            except UserError as error:
                one_line(error)
        shutil.rmtree(directory)


def test_the_index_of_a_whole_tar_is_whole(whole, tmp_path, tokenizer):
    """The damage above is seen against this: nothing is reported where nothing is wrong."""
    index_tars([whole / "pairs" / "0.tar"], tmp_path / "index", tokenizer)
    assert len(read_whole(tmp_path / "index", tokenizer)) == 6
    assert not examine([whole / "pairs" / "0.tar"], CheckOptions(decode=True)).findings.num_harmful - 1
    assert Path(whole / "pairs" / "0.tar").stat().st_size % 512 == 0
