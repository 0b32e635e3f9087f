"""What two checkpoints have different: where they stand, which tensors they hold, and by how much values differ."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from janus_mega.checkpoint.reader import EMA_PREFIX, OPTIMIZER_PREFIX, RNG_PREFIX, CheckpointReader

Progress = Callable[[int, int], None]
"""(tensors compared, tensors in all)."""


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """One tensor of two checkpoints."""

    name: str
    relative: float
    """Norm of the difference over the norm of the first; 0 only where all bits agree."""
    largest: float
    """Largest difference of an element."""
    num_different: int
    """Elements that differ."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two checkpoints."""

    state: dict[str, tuple[object, object]]
    """Fields of the state that differ: both values."""
    only_first: tuple[str, ...]
    """Tensors that the second lacks, or has in another shape."""
    only_second: tuple[str, ...]
    """Tensors that the first lacks, or has in another shape."""
    different: tuple[TensorDifference, ...]
    """Tensors of both whose values differ, the most different first."""
    num_equal: int
    """Tensors that are equal bit for bit."""

    @property
    def are_equal(self) -> bool:
        """Whether nothing differs."""
        return not (self.state or self.only_first or self.only_second or self.different)


def compare(
    first: CheckpointReader, second: CheckpointReader, *, weights_only: bool = False, progress: Progress | None = None
) -> Comparison:
    """Compares tensor by tensor; holds two tensors at a time. Layouts that wrote them do not matter.

    Args:
        first: one checkpoint.
        second: another.
        weights_only: leave optimizer and random generators out.
        progress: told of tensors as they are done.

    Raises:
        UserError: a file is damaged.
    """
    ours, theirs = _shapes(first, weights_only), _shapes(second, weights_only)
    common = [name for name in ours if theirs.get(name) == ours[name]]
    different = []
    for done, name in enumerate(common, start=1):
        one, other = first.read(name), second.read(name)
        if not torch.equal(one, other):
            different.append(_difference(name, one.double(), other.double()))
        if progress is not None:
            progress(done, len(common))
    return Comparison(
        state=dict(_state_differences(first, second)),
        only_first=tuple(sorted(ours.keys() - set(common))),
        only_second=tuple(sorted(theirs.keys() - set(common))),
        different=tuple(sorted(different, key=lambda tensor: (-tensor.relative, tensor.name))),
        num_equal=len(common) - len(different),
    )


def _shapes(reader: CheckpointReader, weights_only: bool) -> dict[str, tuple[int, ...]]:
    names = reader.weight_names if weights_only else reader.names
    return {name: reader.shape(name) for name in names}


def _difference(name: str, one: torch.Tensor, other: torch.Tensor) -> TensorDifference:
    apart = (one - other).abs()
    norm = float(one.norm())
    relative = float(apart.norm()) / norm if norm else float("inf")
    return TensorDifference(name, relative, float(apart.max()), int((apart != 0).sum()))


def _state_differences(
    first: CheckpointReader, second: CheckpointReader
) -> Iterator[tuple[str, tuple[object, object]]]:
    one, other = first.read_state(), second.read_state()
    for name in ("step", "consumed_rows", "plan_digest", "data_cursor", "counters"):
        values = _without_clock(getattr(one, name)), _without_clock(getattr(other, name))
        if values[0] != values[1]:
            yield name, values


def _without_clock(value: object) -> object:
    """Wall time differs between equal runs."""
    return {name: count for name, count in value.items() if name != "seconds"} if isinstance(value, dict) else value


def part_of(name: str) -> str:
    """What a tensor belongs to: weights, their average, a moment of the optimizer, or random generators."""
    if name.startswith(EMA_PREFIX):
        return "averaged weights"
    if name.startswith(RNG_PREFIX):
        return "random generators"
    if name.startswith(OPTIMIZER_PREFIX):
        return name.split("/", 1)[0]
    return "weights"
