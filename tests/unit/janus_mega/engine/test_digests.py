"""A digest sees every bit and every place, adds up over ranges, and the blind ones that were left aside do not."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from janus_mega.engine.digests import ROW, bits_of, digest, flip_bit

DTYPES = (torch.float32, torch.bfloat16)
SIZE = 17 * ROW + 123  # rows one by one, a block of rows, and a rest


def values_of(dtype: torch.dtype, size: int = SIZE) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(3)).to(dtype)


def plain_sum(values: Tensor) -> int:
    return int(bits_of(values).long().sum())


def sum_of_squares(values: Tensor) -> int:
    return int(values.double().square().sum().view(torch.int64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("start", [0, 1, ROW - 1, ROW, 5 * ROW + 7])
def test_digests_of_ranges_add_up(dtype: torch.dtype, start: int) -> None:
    values = values_of(dtype)
    whole = digest(values, start)
    for cuts in ([1], [ROW - start % ROW], [17, ROW, 3 * ROW + 5], [16 * ROW]):
        borders = [0, *cuts, len(values)]
        parts = [digest(values[first:last], start + first) for first, last in pairwise(borders)]
        assert torch.equal(torch.stack(parts).sum(), whole), cuts


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_of_any_element_is_seen(dtype: torch.dtype) -> None:
    values = values_of(dtype)
    clean, generator = digest(values), torch.Generator().manual_seed(5)
    for bit in range(8 * values.element_size()):
        for place in [0, SIZE - 1, *torch.randint(SIZE, (5,), generator=generator).tolist()]:
            before = bits_of(values)[place].item()
            flip_bit(values, place, bit)
            after = bits_of(values)[place].item()
            mask = (1 << 8 * values.element_size()) - 1
            assert (before ^ after) & mask == 1 << bit
            assert digest(values) != clean, (place, bit)
            flip_bit(values, place, bit)
    assert digest(values) == clean


def _swap(values: Tensor) -> None:
    values[[5, 9]] = values[[9, 5]]


def _swap_rows(values: Tensor) -> None:
    values[[5, ROW + 5]] = values[[ROW + 5, 5]]


def _swap_halves(values: Tensor) -> None:
    values.copy_(torch.cat([values[ROW : 2 * ROW], values[:ROW], values[2 * ROW :]]))


def _shift(values: Tensor) -> None:
    values.copy_(values.roll(1))


def _two_signs(values: Tensor) -> None:
    flip_bit(values, 5, 8 * values.element_size() - 1)
    flip_bit(values, 9, 8 * values.element_size() - 1)


def _all_signs(values: Tensor) -> None:
    values.neg_()


def _opposite_flips(values: Tensor) -> None:
    """One bit set in one element, the same bit cleared in another."""
    bits = bits_of(values)
    low, high = next((i, j) for i in range(100) for j in range(100) if not bits[i].item() & 4 and bits[j].item() & 4)
    flip_bit(values, low, 2)
    flip_bit(values, high, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("change", "blind"),
    [
        (_swap, plain_sum),
        (_swap_rows, plain_sum),
        (_swap_halves, plain_sum),
        (_shift, plain_sum),
        (_opposite_flips, plain_sum),
        (_two_signs, sum_of_squares),
        (_all_signs, sum_of_squares),
    ],
)
def test_swaps_and_signs_are_seen_where_sums_are_blind(dtype: torch.dtype, change, blind) -> None:  # type: ignore[no-untyped-def]
    values = values_of(dtype)
    clean, blind_clean = digest(values), blind(values)
    change(values)
    assert digest(values) != clean
    assert blind(values) == blind_clean  # so this test would fail with such a digest


def test_nothing_has_the_digest_of_nothing() -> None:
    assert digest(torch.empty(0), 3) == 0
    assert digest(torch.zeros(4)) != digest(torch.tensor([0.0, 0.0, -0.0, 0.0]))
