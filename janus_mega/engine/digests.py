"""A number for a range of values that changes with any bit of them and with their places.

It is a sum over elements, each element's bits times an odd number of its place, modulo 2^64. As a sum it can be told in
parts: ranks that own ranges of a tensor add up to what a rank that holds all of it computes, so nobody needs another
one's values. An odd factor makes every change of a single element visible for certain; two changes cancel with a
chance of about 2^-32 or less. This finds accidents, it does not resist an adversary.
"""

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

ROW = 1 << 16
"""Places that have factors of their own; further rows of places multiply them by an odd number of the row."""
_ROWS_AT_A_TIME = {"cpu": 16}
_ROWS_ELSEWHERE = 64
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits_of(values: Tensor) -> Tensor:
    """The same memory as integers of the same width."""
    return values.detach().view(_BITS[values.element_size()])


def digest(values: Tensor, start: int = 0) -> Tensor:
    """The digest of a range of a flattened tensor, int64 on its device; a few MiB of memory beside it.

    Args:
        values: 1-D.
        start: place of its first element in the whole tensor. Digests of ranges that make up the whole add up to its.
    """
    bits = bits_of(values)
    factors = _factors(values.device)
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    for first, last in _blocks(start, start + values.numel(), _ROWS_AT_A_TIME.get(values.device.type, _ROWS_ELSEWHERE)):
        part = bits[first - start : last - start].long()
        row, place = divmod(first, ROW)
        if last <= (row + 1) * ROW:
            total += (part * factors[place : place + last - first]).sum() * _odd(torch.full_like(total, row))
        else:
            rows = torch.arange(row, last // ROW, device=values.device)
            total += (part.view(-1, ROW).mul_(factors).sum(1) * _odd(rows)).sum()
    return total


def _blocks(start: int, stop: int, rows_at_a_time: int) -> Iterator[tuple[int, int]]:
    """Cuts a range into parts of one row and blocks of whole rows."""
    while start < stop:
        row_end = (start // ROW + 1) * ROW
        if start % ROW or stop < row_end:
            last = min(row_end, stop)
        else:
            last = min(start + rows_at_a_time * ROW, stop // ROW * ROW)
        yield start, last
        start = last


@cache
def _factors(device: torch.device) -> Tensor:
    return _odd(torch.arange(1 << 32, (1 << 32) + ROW, device=device))


def _odd(numbers: Tensor) -> Tensor:
    """Odd numbers that look random (the finish of splitmix64)."""
    mixed = (numbers + 1) * -0x61C8864680B583EB
    mixed = (mixed ^ (mixed >> 30 & (1 << 34) - 1)) * -0x40A7B892E31B1A47
    mixed = (mixed ^ (mixed >> 27 & (1 << 37) - 1)) * -0x6B2FB644ECCEEE15
    return (mixed ^ (mixed >> 31 & (1 << 33) - 1)) | 1


def flip_bit(values: Tensor, place: int, bit: int) -> None:
    """Flips one bit of one element, in place: what a cosmic ray would do. For rehearsals.

    Args:
        values: contiguous, of any shape.
        place: of the element, flattened.
        bit: 0 is the lowest; the highest is the sign.
    """
    bits = bits_of(values).view(-1)
    width = 8 * values.element_size()
    mask = 1 << bit
    bits[place] ^= mask - (1 << width) if bit == width - 1 else mask
