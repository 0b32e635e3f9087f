"""Cutting and joining of global tensors: exact coverage, errors that name the place, flat ranges over uneven cuts."""

import random
import time
from itertools import combinations, pairwise

import pytest
import torch

from janus_mega.parallel.slices import (
    Box,
    Region,
    Slice,
    assemble,
    assemble_all,
    assemble_box,
    check_coverage,
    fill_local,
    fill_range,
    find_gap,
    find_overlap,
    index_of,
    intersect,
    slices_of_local,
    slices_of_range,
    split_range,
)

WHOLE = torch.arange(60.0).reshape(6, 10)


def piece(rows: slice, cols: slice) -> Slice:
    return Slice("w", (6, 10), (rows.start, cols.start), WHOLE[rows, cols])


QUARTERS = [piece(slice(a, a + 3), slice(b, b + 5)) for a in (0, 3) for b in (0, 5)]


def test_assemble_joins_a_grid() -> None:
    assert torch.equal(assemble(QUARTERS), WHOLE)
    assert torch.equal(assemble_box(QUARTERS, Box((2, 3), (3, 4))), WHOLE[2:5, 3:7])


def test_scalar_and_empty_tensors() -> None:
    assert assemble([Slice("step", (), (), torch.tensor(3.0))]).item() == 3.0
    assert assemble([Slice("none", (0, 4), (0, 0), torch.empty(0, 4))]).shape == (0, 4)


def test_missing_elements_are_named() -> None:
    with pytest.raises(ValueError, match=r"w: elements \[3:6, 5:10\] of shape \[6, 10\] are missing"):
        assemble(QUARTERS[:3])
    with pytest.raises(ValueError, match=r"w: elements \[3:5, 5:7\] are missing"):
        assemble_box(QUARTERS[:3], Box((2, 3), (3, 4)))


def test_doubled_elements_are_named() -> None:
    doubled = [*QUARTERS, piece(slice(2, 3), slice(0, 1))]
    with pytest.raises(ValueError, match=r"w: elements \[2:3, 0:1\] .* more than once"):
        assemble(doubled)


def test_doubled_and_missing_of_equal_size_is_not_taken_for_complete() -> None:
    boxes = [Box((0,), (4,)), Box((2,), (4,)), Box((6,), (2,))]
    with pytest.raises(ValueError, match="more than once"):
        check_coverage("flat", (10,), boxes)


def test_piece_beyond_the_shape_and_disagreeing_pieces() -> None:
    with pytest.raises(ValueError, match="beyond"):
        check_coverage("w", (6,), [Box((4,), (3,))])
    with pytest.raises(ValueError, match="does not fit"):
        check_coverage("w", (6, 2), [Box((4,), (2,))])
    with pytest.raises(ValueError, match="pieces say shape"):
        assemble_all([Slice("w", (4,), (0,), torch.zeros(4)), Slice("w", (5,), (4,), torch.zeros(1))])
    with pytest.raises(ValueError, match="pieces have"):
        assemble_all([Slice("w", (2,), (0,), torch.zeros(1)), Slice("w", (2,), (1,), torch.zeros(1).half())])


@pytest.mark.parametrize("shape", [(7,), (4, 5), (2, 3, 4), (1, 1, 6), (3, 1, 2)])
def test_split_range_covers_every_range_in_flat_order(shape: tuple[int, ...]) -> None:
    numbered = torch.arange(int(torch.tensor(shape).prod())).reshape(shape)
    for start in range(numbered.numel() + 1):
        for stop in range(start, numbered.numel() + 1):
            boxes = split_range(shape, start, stop)
            flat = [numbered[index_of(box)].reshape(-1) for box in boxes]
            seen = torch.cat(flat).tolist() if flat else []
            assert seen == list(range(start, stop))


def gate_up_regions(tp_rank: int, tp_size: int, ffn: int, width: int) -> list[Region]:
    """A fused gate-and-up projection: each rank holds its rows of both halves."""
    local = ffn // tp_size
    return [Region((half * local, 0), (half * ffn + tp_rank * local, 0), (local, width)) for half in (0, 1)]


def test_flat_optimizer_ranges_of_a_fused_tensor_reassemble() -> None:
    """tp 2 x dp 3 with ranges that end in the middle of a row and cross the seam between gate and up."""
    ffn, width = 6, 5
    full = torch.randn(2 * ffn, width)
    pieces: list[Slice] = []
    for tp_rank in range(2):
        regions = gate_up_regions(tp_rank, 2, ffn, width)
        local = torch.cat([full[r.global_offset[0] : r.global_offset[0] + 3] for r in regions])
        for start, stop in ((0, 7), (7, 18), (18, 30)):
            slot = Slice("fc1", (2 * ffn, width), (), local.flatten()[start:stop])
            pieces += slices_of_range(slot, regions, local.shape, start)
    assert torch.equal(assemble(pieces), full)

    def read_box(name: str, box: Box) -> torch.Tensor:
        assert name == "fc1"
        return assemble_box(pieces, box)

    regions = gate_up_regions(1, 3, ffn, width)  # another layout reads what tp 2 wrote
    flat = torch.zeros(9)
    fill_range(Slice("fc1", (2 * ffn, width), (), flat), regions, (4, width), 4, read_box)
    expected = torch.cat([full[2:4], full[8:10]]).flatten()[4:13]
    assert torch.equal(flat, expected)
    filled = torch.zeros(4, width)
    fill_local("fc1", regions, filled, read_box)
    assert torch.equal(filled.flatten()[4:13], expected)
    again = slices_of_local("fc1", (2 * ffn, width), regions, filled)
    assert [piece.offset for piece in again] == [(2, 0), (8, 0)]


def test_gap_of_many_bands_is_found() -> None:
    boxes = [Box((start, 0), (1, 4)) for start in range(200) if start != 150]
    assert find_gap(boxes, Box((0, 0), (200, 4))) == Box((150, 0), (1, 4))


def test_overlap_is_what_comparing_all_pairs_finds() -> None:
    chooser, answers = random.Random(0), []
    for _ in range(3000):
        shape = [chooser.choice((1, 4, 9)) for _ in range(chooser.randrange(4))]
        boxes = []
        for _ in range(chooser.randrange(7)):
            offset = tuple(chooser.randrange(size) for size in shape)
            boxes.append(
                Box(offset, tuple(chooser.randint(0, min(3, b - a)) for a, b in zip(offset, shape, strict=True)))
            )
        common = [found for a, b in combinations(boxes, 2) if (found := intersect(a, b)) is not None]
        found = find_overlap(boxes)
        assert found in common if common else found is None, boxes
        answers.append(found is None)
    assert 500 < sum(answers) < 2500


@pytest.mark.parametrize("shape", [(1, 576, 1024), (2, 576, 1024), (576, 1, 1024), (4, 8, 18432)])
def test_many_pieces_of_a_flat_cut_are_checked_quickly(shape: tuple[int, ...]) -> None:
    size, parts = torch.Size(shape).numel(), 2560
    cuts = [size * number // parts for number in range(parts + 1)]
    boxes = [box for a, b in pairwise(cuts) for box in split_range(shape, a, b)]
    began = time.process_time()
    check_coverage("w", shape, boxes)
    assert time.process_time() - began < 1.5  # comparing pairs takes many times as long where the first dimension is 1
    with pytest.raises(ValueError, match="more than once"):
        check_coverage("w", shape, [*boxes, boxes[-1]])
