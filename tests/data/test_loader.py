"""The loader: the same global batches for any ranks, workers and restarts."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_pipeline.errors import UserError
from data_pipeline.schema import BATCH_KEYS
from data_pipeline.spec import Exhausted
from data_pipeline.stream.assemble import combine_digests
from data_pipeline.stream.dataset import RowDataset
from data_pipeline.stream.loader import batch_hash, build_loader, row_digests
from tests.support.shards import make_shards

# Three workers on two cores are slow, not wrong.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def hashes(data, *, first_step, num_steps, dp_size=1, micro_batch_size=1):
    """Hash of every global batch as the ranks would find it together."""
    ranks = [
        [
            row_digests(step)
            for step in build_loader(
                data,
                micro_batch_size=micro_batch_size,
                dp_rank=rank,
                dp_size=dp_size,
                first_step=first_step,
                num_steps=num_steps,
            )
        ]
        for rank in range(dp_size)
    ]
    return [combine_digests([digest for step in steps for digest in step]) for steps in zip(*ranks, strict=True)]


@pytest.fixture(scope="module")
def expected(shards):
    """Hash of each of the first steps, without any loader."""
    dataset = RowDataset(shards.open())
    return [dataset.step_hash(step) for step in range(24)]


@pytest.mark.parametrize("num_workers", [0, 1, 3])
@pytest.mark.parametrize("dp_size", [1, 2, 4, 8])
def test_global_batches_depend_on_neither_ranks_nor_workers(shards, expected, dp_size, num_workers):
    data = shards.open(num_workers=num_workers)
    assert hashes(data, first_step=0, num_steps=6, dp_size=dp_size) == expected[:6]


@pytest.mark.parametrize("case", range(12))
def test_a_restart_at_any_step_goes_on_with_the_same_batches(shards, expected, case):
    choose = random.Random(case)
    first, dp_size = choose.randrange(20), choose.choice([1, 2, 4, 8])
    micro_batch_size = choose.choice([size for size in (1, 2, 4, 8) if 8 % (dp_size * size) == 0])
    data = shards.open(num_workers=choose.choice([0, 0, 2]), cache_mib=choose.choice([0, 256]))
    if choose.random() < 0.5:
        data.plan.restore(shards.open().plan.cursor_at(first))
    layout = {"dp_size": dp_size, "micro_batch_size": micro_batch_size}
    assert hashes(data, first_step=first, num_steps=3, **layout) == expected[first : first + 3]


def test_a_loader_may_be_left_early_and_begun_again(shards, expected):
    loader = build_loader(shards.open(num_workers=1), micro_batch_size=4, num_steps=5)
    assert len(loader) == 5
    first = next(iter(loader))
    assert batch_hash(first) == expected[0]
    assert [batch_hash(step) for step in loader] == expected[:5]


def test_a_step_is_a_list_of_micro_batches(shards):
    steps = list(build_loader(shards.open(), micro_batch_size=2, dp_rank=1, dp_size=2, num_steps=3))
    assert [len(step) for step in steps] == [2, 2, 2]
    for batch in (batch for step in steps for batch in step):
        assert tuple(batch) == BATCH_KEYS
        assert batch["input_ids"].shape == (2, 192)
        assert batch["cu_seqlens"][-1] == 2 * 192


def test_ranks_share_the_rows_of_a_step_without_overlap(shards):
    data = shards.open()
    parts = [
        [d for step in build_loader(data, micro_batch_size=1, dp_rank=rank, dp_size=4, num_steps=2) for d in
         row_digests(step)]
        for rank in range(4)
    ]  # fmt: skip
    assert len({digest for part in parts for digest in part}) == 16


def test_the_batch_hash_tells_batches_apart(shards):
    one, two = list(build_loader(shards.open(), micro_batch_size=8, num_steps=2))
    assert batch_hash(one) != batch_hash(two)
    changed = {**one[0], "labels": one[0]["labels"].clone()}
    changed["labels"][3, 7] += 1
    assert batch_hash([changed]) != batch_hash(one)


def test_loading_leaves_the_random_generator_of_the_process_alone(shards):
    before = torch.get_rng_state()
    list(build_loader(shards.open(), micro_batch_size=8, num_steps=2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("dp_rank", "dp_size", "micro_batch_size"), [(2, 2, 1), (0, 3, 1), (0, 2, 8), (-1, 2, 1)])
def test_impossible_layouts_are_refused(shards, dp_rank, dp_size, micro_batch_size):
    with pytest.raises(ValueError, match="dp_rank|global_batch_size"):
        build_loader(shards.open(), micro_batch_size=micro_batch_size, dp_rank=dp_rank, dp_size=dp_size, num_steps=1)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_missing_shard_stops_the_loader_with_one_line(tmp_path, num_workers):
    shards = make_shards(tmp_path, num_samples=8)
    data = shards.open(num_workers=num_workers)
    (Path(shards.spec.sources["text"].path) / "shards" / "000001.tar").unlink()
    with pytest.raises(UserError, match=r"000001\.tar: the shard cannot be opened \(No such file") as caught:
        list(build_loader(data, micro_batch_size=1, num_steps=20))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_loader_ends_where_the_plan_ends(shards, num_workers):
    sources = {
        **shards.spec.sources,
        "questions": replace(shards.spec.sources["questions"], max_epochs=3, on_exhausted=Exhausted.stop),
    }
    data = shards.open(sources=sources, num_workers=num_workers)
    end = data.plan.ends_at_step(1000)
    assert 4 <= end < 40
    found = hashes(data, first_step=0, num_steps=40, dp_size=2)
    assert found == [RowDataset(data).step_hash(step) for step in range(end)]
    for first_step in (end, end + 8):
        assert hashes(data, first_step=first_step, num_steps=5) == []
