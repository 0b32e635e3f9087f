"""Broken samples: masked holes of their planned length, recorded; every other sample stays where it was."""

import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import UserError
from data_pipeline.manifest import open_source
from data_pipeline.schema import LabelHead, TokenKind
from data_pipeline.stream.assemble import combine_digests, row_digest
from data_pipeline.stream.dataset import RowDataset
from data_pipeline.stream.loader import build_loader, row_digests
from tests.support.shards import make_shards

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

NUM_ROWS = 64
BROKEN = 3
"""Number of the sample that is damaged; it lies in the first shard of its source."""


def change(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as stream:
        stream.seek(offset)
        stream.write(content)


def damage(shards, source_name: str, how: str) -> None:
    """Breaks one sample of a source: a flipped bit, a cut tar, or a picture that does not decode (its crc is right)."""
    path = Path(shards.spec.sources[source_name].path)
    source = open_source(path)
    tar, offset, size = source.shard_path(0), int(source.offset[BROKEN]), int(source.length[BROKEN])
    content = bytearray(tar.read_bytes()[offset : offset + size])
    if how == "flipped bit":
        change(tar, offset + size // 2, bytes([content[size // 2] ^ 4]))
    elif how == "flipped image id":
        place = source.image_ids_offset(BROKEN)
        change(tar, place, bytes([tar.read_bytes()[place] ^ 1]))
    elif how == "undecodable":
        at = content.index(b"IDAT")
        content[at + 4 : at + 40] = bytes(36)
        change(tar, offset, content)
        crc = np.load(path / "index" / "crc.npy")
        crc[BROKEN] = zlib.crc32(content)
        np.save(path / "index" / "crc.npy", crc)


CASES = [
    ("text", "flipped bit", "checksum"),
    ("drawings", "flipped bit", "checksum"),
    ("drawings", "flipped image id", "checksum"),
    ("questions", "flipped bit", "checksum"),
    ("questions", "undecodable", "undecodable"),
]


@pytest.mark.parametrize(("source_name", "how", "reason"), CASES)
def test_a_broken_sample_becomes_a_hole_and_moves_nothing(tmp_path, source_name, how, reason):
    shards = make_shards(tmp_path, num_samples=12)
    data = shards.open()
    whole = [RowDataset(data)[row_no] for row_no in range(NUM_ROWS)]
    damage(shards, source_name, how)
    dataset = RowDataset(shards.open())
    number = next(n for n, source in enumerate(data.plan.sources) if source.name == source_name)
    num_holes = 0
    for row_no, expected in enumerate(whole):
        row, planned = dataset[row_no], data.plan.row(row_no)
        holes = [at for at, d in enumerate(planned) if (d.source_no, d.sample_no) == (number, BROKEN)]
        assert [(hole.row, hole.step, hole.reason) for hole in row.holes] == [(row_no, row_no // 8 + 1, reason)] * len(
            holes
        )
        is_hole = np.zeros(len(row.input_ids), bool)
        for at in holes:
            is_hole[expected.cu_seqlens[at] : expected.cu_seqlens[at + 1]] = True
        assert np.array_equal(row.cu_seqlens, expected.cu_seqlens)
        assert np.array_equal(row.position_ids, expected.position_ids)
        for name in ("input_ids", "token_kind", "labels", "label_head", "label_task"):
            assert np.array_equal(getattr(row, name)[~is_hole], getattr(expected, name)[~is_hole]), name
        assert (row.input_ids[is_hole] == data.builder.ids.pad).all()
        assert (row.token_kind[is_hole] == TokenKind.pad).all()
        assert (row.label_head[is_hole] == LabelHead.none).all()
        assert not row.labels[is_hole].any()
        # Sample 3 of the questions has two pictures.
        assert len(row.pixel_values) == len(expected.pixel_values) - 2 * len(holes) * (source_name == "questions")
        num_holes += len(holes)
    assert num_holes > 1
    hole = next(hole for row_no in range(NUM_ROWS) for hole in dataset[row_no].holes)
    source = data.sources[number]
    assert (hole.source, hole.uid) == (source_name, source.uid(BROKEN))
    assert (hole.shard, hole.offset) == (str(source.shard_path(0)), int(source.offset[BROKEN]))
    assert hole.uid in hole.message and "\n" not in hole.message


def test_pictures_beside_a_hole_stay_with_their_documents(tmp_path):
    shards = make_shards(tmp_path, num_samples=12)
    sources = {**shards.spec.sources, "questions": replace(shards.spec.sources["questions"], weight=20)}
    data = shards.open(sources=sources)
    whole = [RowDataset(data)[row_no] for row_no in range(NUM_ROWS)]
    damage(shards, "questions", "undecodable")
    dataset = RowDataset(shards.open(sources=sources))
    number = next(n for n, source in enumerate(data.plan.sources) if source.name == "questions")
    compared = 0
    for row_no in range(NUM_ROWS):
        documents = [d for d in data.plan.row(row_no) if d.source_no == number]
        owners = [d.sample_no for d in documents for _ in range(1 + d.sample_no % 2)]
        kept = [at for at, owner in enumerate(owners) if owner != BROKEN]
        if 0 < len(kept) < len(owners):
            assert np.array_equal(dataset[row_no].pixel_values, whole[row_no].pixel_values[kept])
            compared += 1
    assert compared


def test_a_tar_that_ends_early_while_it_is_read_leaves_holes(tmp_path):
    shards = make_shards(tmp_path, num_samples=12)
    dataset = RowDataset(shards.open())
    tar = Path(shards.spec.sources["text"].path) / "shards" / "000001.tar"
    tar.write_bytes(tar.read_bytes()[:1024])
    holes = [hole for row_no in range(NUM_ROWS) for hole in dataset[row_no].holes]
    assert {hole.reason for hole in holes} == {"truncated"}
    assert {hole.shard for hole in holes} == {str(tar)}
    assert len({hole.uid for hole in holes}) == 6


@pytest.mark.parametrize("source_name", ["text", "drawings", "questions"])
def test_a_disk_that_fails_stops_everything(tmp_path, source_name):
    """A directory in place of the tar: it opens, and every read of it gives an error."""
    shards = make_shards(tmp_path, num_samples=12)
    dataset = RowDataset(shards.open())
    tar = Path(shards.spec.sources[source_name].path) / "shards" / "000000.tar"
    tar.unlink()
    tar.mkdir()
    with pytest.raises(UserError, match=r"000000\.tar: the shard cannot be read") as caught:
        [dataset[row_no] for row_no in range(NUM_ROWS)]
    assert "\n" not in str(caught.value)


def test_holes_are_the_same_for_any_ranks_and_workers(tmp_path):
    shards = make_shards(tmp_path, num_samples=12)
    for source_name, how in (("text", "flipped bit"), ("drawings", "flipped bit"), ("questions", "undecodable")):
        damage(shards, source_name, how)
    dataset = RowDataset(shards.open())
    rows = [[dataset[row_no] for row_no in range(8 * step, 8 * step + 8)] for step in range(6)]
    hashes = [combine_digests([row_digest(row) for row in step]) for step in rows]
    holes = [sorted((hole.row, hole.uid) for row in step for hole in row.holes) for step in rows]
    assert sum(map(len, holes)) > 4
    for dp_size, num_workers in ((1, 0), (2, 1), (4, 3)):
        data = shards.open(num_workers=num_workers)
        found = [[] for _ in rows]
        digests = [[] for _ in rows]
        for rank in range(dp_size):
            loader = build_loader(data, micro_batch_size=2, dp_rank=rank, dp_size=dp_size, num_steps=len(rows))
            for step, batches in enumerate(loader):
                found[step] += [(hole.row, hole.uid) for hole in loader.holes]
                digests[step] += row_digests(batches)
        assert [sorted(step) for step in found] == holes
        assert [combine_digests(step) for step in digests] == hashes
