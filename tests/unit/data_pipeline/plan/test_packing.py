"""Packing: nothing lost, nothing over the edge, little padding where a plain method leaves much."""

import hashlib

import numpy as np
import pytest

from data_pipeline.plan.exchange import exchange, least_bins
from data_pipeline.plan.packing import Rooms, best_fit, pack


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


def methods(lengths, capacity):
    descending = np.sort(lengths)[::-1]
    longest_first = np.argsort(-lengths, kind="stable")
    packing = pack(lengths, capacity)
    return {
        "pack": (lengths, packing.bin_of, packing.num_bins),
        "best_fit": (descending, *best_fit(descending, capacity)),
        "exchange": (lengths, *exchange(lengths, longest_first, capacity)),
    }


@pytest.mark.parametrize("shape", [short, alike, captioned, mixed])
def test_every_document_has_a_place_and_no_bin_overflows(shape):
    lengths, capacity = shape(np.random.default_rng(0))
    np.random.default_rng(0).shuffle(lengths)
    for order, bin_of, num_bins in methods(lengths, capacity).values():
        load = np.bincount(bin_of, order, num_bins)
        assert len(bin_of) == len(lengths)
        assert load.max() <= capacity
        assert load.min() > 0


def test_small_cases_of_all_kinds_are_packed_whole():
    random = np.random.default_rng(4)
    for _ in range(300):
        capacity = int(random.integers(1, 80))
        longest = max(1, capacity // int(random.integers(1, 9)))
        lengths = random.integers(1, longest + 1, int(random.integers(1, 60)))
        for order, bin_of, num_bins in methods(lengths, capacity).values():
            load = np.bincount(bin_of, order, num_bins)
            assert 0 < load.min() <= load.max() <= capacity
            assert num_bins >= least_bins(np.sort(lengths), capacity)


def by_the_definition(descending, capacity):
    rooms = []
    for length in descending:
        tightest = min((room for room in rooms if room >= length), default=None)
        if tightest is None:
            rooms.append(capacity - length)
        else:
            rooms[rooms.index(tightest)] -= length
    return sorted(rooms)


def test_best_fit_is_best_fit():
    random = np.random.default_rng(5)
    for _ in range(200):
        capacity = int(random.integers(1, 120))
        longest = max(1, capacity // int(random.integers(1, 6)))
        lengths = np.sort(random.integers(1, longest + 1, int(random.integers(0, 80))))[::-1]
        bin_of, num_bins = best_fit(lengths, capacity)
        load = np.bincount(bin_of, lengths, num_bins).astype(int)
        assert sorted((capacity - load).tolist()) == by_the_definition(lengths.tolist(), capacity)


@pytest.mark.parametrize(
    ("kind", "bar"), [(short, 0.001), (alike, 0.003), (captioned, 0.003)], ids=["short", "alike", "captioned"]
)
def test_padding_is_small_where_best_fit_decreasing_is_not(kind, bar):
    random = np.random.default_rng(1)
    lengths, capacity = kind(random)
    random.shuffle(lengths)
    assert padding(pack(lengths, capacity).num_bins, lengths, capacity) <= bar
    plain = best_fit(np.sort(lengths)[::-1], capacity)[1]
    assert padding(plain, lengths, capacity) > 10 * bar


def test_gaps_that_no_packing_can_fill_cost_no_more_than_they_must():
    # Six to a bin at most, whatever one does.
    lengths = np.random.default_rng(6).integers(590, 620, 3000)
    assert least_bins(np.sort(lengths), 4096) == 500
    assert pack(lengths, 4096).num_bins == 500


def test_whole_rows_are_perfect():
    lengths = np.full(50, 256)
    assert pack(lengths, 256).num_bins == 50


@pytest.mark.parametrize("capacity", [1 << 14, 1 << 17])
def test_rows_longer_than_a_small_integer_squared(capacity):
    random = np.random.default_rng(7)
    lengths = random.integers(capacity // 8, capacity // 5, 700)
    longest_first = np.argsort(-lengths, kind="stable")
    bin_of, num_bins = exchange(lengths, longest_first, capacity)
    assert np.bincount(bin_of, lengths).max() <= capacity
    assert padding(num_bins, lengths, capacity) < 0.02


def test_nothing_packs_to_nothing():
    packing = pack(np.zeros(0, np.int64), 256)
    assert packing.num_bins == 0
    assert len(packing.bin_of) == 0


def test_pack_is_a_function_of_its_input():
    lengths = np.random.default_rng(2).integers(28, 61, 2000)
    first, second = pack(lengths, 256), pack(lengths.copy(), 256)
    assert first.bin_of.tolist() == second.bin_of.tolist()


@pytest.mark.parametrize(
    ("lengths", "capacity", "digest"),
    [
        (np.arange(2000) * 7919 % 33 + 28, 256, "1e20a32b4d7c463f"),
        (
            np.concatenate([np.arange(2000) * 7919 % 17 + 590, np.arange(400) * 104729 % 1500 + 20]),
            4096,
            "88e54b4eec9fa37f",
        ),
    ],
    ids=["short", "long"],
)
def test_pack_gives_on_every_machine_what_it_gave_here(lengths, capacity, digest):
    bin_of = pack(lengths.astype(np.int64), capacity).bin_of
    assert hashlib.sha256(bin_of.astype("<i8").tobytes()).hexdigest()[:16] == digest


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
