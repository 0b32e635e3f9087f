"""Rectangular pieces of global tensors, and the pure arithmetic of cutting and joining them.

A `Slice` is the only thing engines and checkpoints exchange: a global name, the global shape, where the piece begins
and the piece itself. Ranks, groups and files are unknown here, so resharding (saved in one layout, loaded in another)
is arithmetic over tables of boxes, tested without processes.

Optimizers own *flat* ranges of a rank's local tensor, which are not rectangles of the global one. They are cut into
rectangles here (`slices_of_range`) instead of being stored flat: a flat range of a tensor that is cut over tp
means nothing in another layout. What a local tensor holds of the global one is told by `Region` rows: one row for a
plain cut, two for the gate and up halves of a fused projection.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle of indices: from `offset`, `shape` wide, one entry per dimension."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def stop(self) -> tuple[int, ...]:
        """First index behind the box, per dimension."""
        return tuple(start + size for start, size in zip(self.offset, self.shape, strict=True))

    @property
    def numel(self) -> int:
        """Elements inside; 1 for a scalar's empty box."""
        return prod(self.shape)

    def __str__(self) -> str:
        return "[" + ", ".join(f"{a}:{b}" for a, b in zip(self.offset, self.stop, strict=True)) + "]"


@dataclass(frozen=True, slots=True)
class Slice:
    """A rectangular piece of a global tensor."""

    name: str
    """Global, layout-free name."""
    global_shape: tuple[int, ...]
    """Shape of the whole tensor."""
    offset: tuple[int, ...]
    """Where the piece begins in it."""
    tensor: Tensor
    """The piece; its shape says how far it reaches."""

    @property
    def box(self) -> Box:
        """What the piece covers."""
        return Box(self.offset, tuple(self.tensor.shape))


@dataclass(frozen=True, slots=True)
class Region:
    """One rectangle that a local tensor shares with the global tensor."""

    local_offset: tuple[int, ...]
    global_offset: tuple[int, ...]
    shape: tuple[int, ...]


def whole(shape: Sequence[int]) -> Box:
    """The box of a whole tensor."""
    return Box((0,) * len(shape), tuple(shape))


def intersect(a: Box, b: Box) -> Box | None:
    """The common box of two boxes, or None when they share no element."""
    offset = tuple(max(x, y) for x, y in zip(a.offset, b.offset, strict=True))
    stop = tuple(min(x, y) for x, y in zip(a.stop, b.stop, strict=True))
    shape = tuple(y - x for x, y in zip(offset, stop, strict=True))
    return None if any(size <= 0 for size in shape) else Box(offset, shape)


def index_of(box: Box, origin: Sequence[int] | None = None) -> tuple[slice, ...]:
    """The box as an index into a tensor whose first element lies at `origin` (default: zeros)."""
    origin = (0,) * len(box.offset) if origin is None else origin
    return tuple(slice(a - o, b - o) for a, b, o in zip(box.offset, box.stop, origin, strict=True))


def find_overlap(boxes: Iterable[Box]) -> Box | None:
    """A box that two of the boxes share, or None.

    Boxes are parted along one dimension after the other, so cuts of flat ranges cost about n log n whichever
    dimension tells them apart; only boxes that no dimension parts are compared in pairs.
    """
    pending = [[box for box in boxes if box.numel]]
    while pending:
        group = pending.pop()
        for dim in range(len(group[0].offset) if len(group) > 1 else 0):
            parts = _part(group, dim)
            if len(parts) > 1:
                pending += reversed(parts)
                break
        else:
            for a, b in combinations(group, 2):
                common = intersect(a, b)
                if common is not None:
                    return common
    return None


def _part(boxes: list[Box], dim: int) -> list[list[Box]]:
    """Groups, in order, whose ranges of one dimension do not meet."""
    parts: list[list[Box]] = []
    end = -1
    for box in sorted(boxes, key=lambda box: box.offset[dim]):
        if box.offset[dim] >= end:
            parts.append([])
        parts[-1].append(box)
        end = max(end, box.offset[dim] + box.shape[dim])
    return parts


def find_gap(boxes: Iterable[Box], target: Box) -> Box | None:
    """A part of `target` that no box covers, or None."""
    remaining = [target] if target.numel else []
    for box in sorted(boxes, key=lambda box: box.offset):
        remaining = [part for rest in remaining for part in _subtract(rest, box)]
        if not remaining:
            return None
    return remaining[0] if remaining else None


def _subtract(box: Box, hole: Box) -> list[Box]:
    """Disjoint boxes that hold what `box` has outside `hole`."""
    common = intersect(box, hole) if box.numel else None
    if common is None:
        return [box]
    parts = []
    offset, stop = list(box.offset), list(box.stop)
    for dim, (low, high) in enumerate(zip(common.offset, common.stop, strict=True)):
        for start, end in ((offset[dim], low), (high, stop[dim])):
            if end > start:
                parts.append(_box_between(_put(offset, dim, start), _put(stop, dim, end)))
        offset[dim], stop[dim] = low, high
    return parts


def _put(values: list[int], dim: int, value: int) -> list[int]:
    return [*values[:dim], value, *values[dim + 1 :]]


def _box_between(offset: Sequence[int], stop: Sequence[int]) -> Box:
    return Box(tuple(offset), tuple(b - a for a, b in zip(offset, stop, strict=True)))


def check_coverage(name: str, global_shape: Sequence[int], boxes: Sequence[Box]) -> None:
    """Raises ValueError, naming tensor and range, unless the boxes hold each element of the tensor exactly once."""
    target = whole(global_shape)
    for box in boxes:
        if len(box.offset) != len(target.shape) or any(a < 0 for a in box.offset):
            raise ValueError(f"{name}: piece {box} does not fit a tensor of shape {list(global_shape)}")
        if any(b > size for b, size in zip(box.stop, global_shape, strict=True)):
            raise ValueError(f"{name}: piece {box} reaches beyond the shape {list(global_shape)}")
    overlap = find_overlap(boxes)
    if overlap is not None:
        raise ValueError(f"{name}: elements {overlap} of shape {list(global_shape)} are given more than once")
    if sum(box.numel for box in boxes) != target.numel:
        raise ValueError(f"{name}: elements {find_gap(boxes, target)} of shape {list(global_shape)} are missing")


def group_by_name(slices: Iterable[Slice]) -> dict[str, list[Slice]]:
    """Slices by tensor name, in first-seen order.

    Raises:
        ValueError: pieces of one tensor disagree about its shape or number format.
    """
    groups: dict[str, list[Slice]] = {}
    for piece in slices:
        group = groups.setdefault(piece.name, [])
        if group and group[0].global_shape != piece.global_shape:
            raise ValueError(f"{piece.name}: pieces say shape {group[0].global_shape} and {piece.global_shape}")
        if group and group[0].tensor.dtype != piece.tensor.dtype:
            raise ValueError(f"{piece.name}: pieces have {group[0].tensor.dtype} and {piece.tensor.dtype}")
        group.append(piece)
    return groups


def assemble_box(pieces: Sequence[Slice], box: Box) -> Tensor:
    """Joins the pieces of one tensor into the given box of it, in a new tensor.

    Raises:
        ValueError: an element of the box is missing or given more than once.
    """
    name = pieces[0].name
    parts = [(piece, common) for piece in pieces if (common := intersect(piece.box, box)) is not None]
    overlap = find_overlap(common for _, common in parts)
    if overlap is not None:
        raise ValueError(f"{name}: elements {overlap} are given more than once")
    if sum(common.numel for _, common in parts) != box.numel:
        raise ValueError(f"{name}: elements {find_gap([common for _, common in parts], box)} are missing")
    out = torch.empty(box.shape, dtype=pieces[0].tensor.dtype)
    for piece, common in parts:
        out[index_of(common, box.offset)] = piece.tensor[index_of(common, piece.offset)].to(out.device)
    return out


def assemble(pieces: Sequence[Slice]) -> Tensor:
    """Joins all pieces of one tensor; raises ValueError unless they hold each element exactly once."""
    check_coverage(pieces[0].name, pieces[0].global_shape, [piece.box for piece in pieces])
    return assemble_box(pieces, whole(pieces[0].global_shape))


def assemble_all(slices: Iterable[Slice]) -> dict[str, Tensor]:
    """Whole tensors by name from the pieces of all ranks."""
    return {name: assemble(group) for name, group in group_by_name(slices).items()}


def split_range(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """Cuts the flat row-major range [start, stop) of a tensor into disjoint boxes, in flat order."""
    if start >= stop:
        return []
    if not shape:
        return [Box((), ())]
    inner = prod(shape[1:])
    first, last = start // inner, (stop - 1) // inner
    if len(shape) == 1:
        return [Box((start,), (stop - start,))]
    if first == last:
        return [_in_row(first, box) for box in split_range(shape[1:], start - first * inner, stop - first * inner)]
    boxes: list[Box] = []
    if start % inner:
        boxes += [_in_row(first, box) for box in split_range(shape[1:], start % inner, inner)]
        first += 1
    last_full = stop // inner
    if last_full > first:
        boxes.append(Box((first, *(0,) * (len(shape) - 1)), (last_full - first, *shape[1:])))
    if stop % inner:
        boxes += [_in_row(last, box) for box in split_range(shape[1:], 0, stop % inner)]
    return boxes


def _in_row(row: int, box: Box) -> Box:
    return Box((row, *box.offset), (1, *box.shape))


def slices_of_local(name: str, global_shape: Sequence[int], regions: Sequence[Region], local: Tensor) -> list[Slice]:
    """The global pieces (views) that a local tensor holds."""
    return [
        Slice(name, tuple(global_shape), r.global_offset, local[index_of(Box(r.local_offset, r.shape))])
        for r in regions
    ]


def slices_of_range(slot: Slice, regions: Sequence[Region], local_shape: Sequence[int], start: int) -> list[Slice]:
    """The global pieces (views) that a flat range of a local tensor holds.

    Args:
        slot: name and global shape; its `tensor` is the flat piece, 1-D, that begins at flat index `start`
            of the local tensor (its `offset` is ignored).
        regions: what the local tensor holds of the global one.
        local_shape: shape of the whole local tensor.
        start: flat row-major index in the local tensor.
    """
    pieces: list[Slice] = []
    position = 0
    for box in split_range(local_shape, start, start + slot.tensor.numel()):
        view = slot.tensor[position : position + box.numel].view(box.shape)
        position += box.numel
        for local_box, global_offset in _through(regions, box):
            part = view[index_of(local_box, box.offset)]
            pieces.append(Slice(slot.name, slot.global_shape, global_offset, part))
    return pieces


def _through(regions: Sequence[Region], box: Box) -> list[tuple[Box, tuple[int, ...]]]:
    """(local box, global offset) of each part of a local box that a region maps."""
    parts = []
    for region in regions:
        common = intersect(box, Box(region.local_offset, region.shape))
        if common is not None:
            shift = zip(common.offset, region.local_offset, region.global_offset, strict=True)
            parts.append((common, tuple(at - low + high for at, low, high in shift)))
    return parts


ReadBox = Callable[[str, Box], Tensor]
"""Reads a box of a named global tensor: what a checkpoint offers to whoever fills local tensors."""


def fill_local(name: str, regions: Sequence[Region], local: Tensor, read_box: ReadBox) -> None:
    """Writes into `local` (in place, cast to its format) everything its regions hold of the global tensor."""
    with torch.no_grad():
        for region in regions:
            piece = read_box(name, Box(region.global_offset, region.shape))
            local[index_of(Box(region.local_offset, region.shape))] = piece.to(local.device, local.dtype)


def fill_range(
    slot: Slice, regions: Sequence[Region], local_shape: Sequence[int], start: int, read_box: ReadBox
) -> None:
    """Writes into the flat piece `slot.tensor` what it holds of the global tensor; mirror of `slices_of_range`."""
    with torch.no_grad():
        for piece in slices_of_range(slot, regions, local_shape, start):
            piece.tensor.copy_(read_box(slot.name, piece.box))
