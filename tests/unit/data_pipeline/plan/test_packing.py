"""Packing: nothing lost, nothing over the edge, little padding where a plain method leaves much."""

import numpy as np
import pytest

from data_pipeline.plan.packing import Rooms, best_fit, fill_exactly, pack


def padding(num_bins, lengths, capacity):
    return 1 - lengths.sum() / (num_bins * capacity)


def short(random):
    return np.concatenate([random.integers(28, 35, 3000), random.integers(30, 61, 2500)]), 256


def alike(random):
    return np.concatenate([np.full(3000, 30), random.choice([35, 36, 38], 2500)]), 256


def captioned(random):
    captions = 578 + np.maximum(random.lognormal(5.1, 0.35, 3000).astype(int), 10)
    return np.concatenate([captions, 582 + random.poisson(4, 3800)]), 4096


def mixed(random):
    return np.concatenate([random.integers(1, 257, 2000), random.integers(20, 60, 3000)]), 256


@pytest.mark.parametrize("shape", [short, alike, captioned, mixed])
@pytest.mark.parametrize("method", ["pack", "fill_exactly", "best_fit"])
def test_every_document_has_a_place_and_no_bin_overflows(shape, method):
    random = np.random.default_rng(0)
    lengths, capacity = shape(random)
    random.shuffle(lengths)
    if method == "pack":
        packing = pack(lengths, capacity)
        bin_of, num_bins = packing.bin_of, packing.num_bins
    else:
        bin_of, num_bins = {"fill_exactly": fill_exactly, "best_fit": best_fit}[method](lengths.tolist(), capacity)
    load = np.bincount(bin_of, lengths, num_bins)
    assert len(bin_of) == len(lengths)
    assert load.max() <= capacity
    assert load.min() > 0


@pytest.mark.parametrize(
    ("shape", "bar"), [(short, 0.001), (alike, 0.003), (captioned, 0.003)], ids=["short", "alike", "captioned"]
)
def test_padding_is_small_where_best_fit_decreasing_is_not(shape, bar):
    random = np.random.default_rng(1)
    lengths, capacity = shape(random)
    random.shuffle(lengths)
    assert padding(pack(lengths, capacity).num_bins, lengths, capacity) <= bar
    plain = best_fit(np.sort(lengths)[::-1].tolist(), capacity)[1]
    assert padding(plain, lengths, capacity) > 10 * bar


def test_whole_rows_are_perfect():
    lengths = np.full(50, 256)
    assert pack(lengths, 256).num_bins == 50


def test_nothing_packs_to_nothing():
    packing = pack(np.zeros(0, np.int64), 256)
    assert packing.num_bins == 0
    assert len(packing.bin_of) == 0


def test_pack_is_a_function_of_its_input():
    lengths = np.random.default_rng(2).integers(28, 61, 2000)
    first, second = pack(lengths, 256), pack(lengths.copy(), 256)
    assert first.bin_of.tolist() == second.bin_of.tolist()


def test_rooms_give_the_tightest_fit():
    rooms = Rooms(100)
    for bin_no, room in enumerate((50, 20, 35, 0)):
        rooms.add(bin_no, room)
    assert rooms.take(30) == 2
    assert rooms.take(21) == 0
    assert rooms.take(30) == -1
    assert rooms.take(29) == 0
    assert rooms.take(20) == 1
    assert rooms.take(5) == 2
    assert rooms.take(1) == -1
