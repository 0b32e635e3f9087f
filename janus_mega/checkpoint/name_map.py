"""Conversion between two layouts of weights as rows of data: names on both sides, and a transform between them.

A table is used in both directions, so import and export cannot drift apart. A row stands for a group of tensors on
either side (three projections <-> one fused one); placeholders such as `{n}` bind the same text on both sides. Every
tensor must be claimed by exactly one row, every group must be whole, and no target may be written twice: what a table
does not know is an error, never a silent gap.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipeline.errors import UserError
from janus_mega.models.vision.image_tokenizer import with_unit_rows

_PLACEHOLDERS = {"n": r"\d+", "i": r"\d+", "j": r"\d+", "p": "weight|bias", "part": "[a-z0-9_]+"}
"""What each placeholder may stand for: numbers of layers, levels and blocks; a parameter; a submodule."""


@dataclass(frozen=True, slots=True)
class Heads:
    """What transforms must know about attention."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class Transform:
    """How the tensors of a row become those of the other side; `backward` undoes `forward` bit for bit."""

    forward: Callable[[list[Tensor], Heads], list[Tensor]]
    backward: Callable[[list[Tensor], Heads], list[Tensor]]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table: our names, their names, and what happens between."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    transform: Transform


@dataclass(frozen=True, slots=True)
class Conversion:
    """A row with its placeholders bound: which tensors become which."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    apply: Callable[[list[Tensor], Heads], list[Tensor]]


def _same(tensors: list[Tensor], heads: Heads) -> list[Tensor]:
    return tensors


def _split_qkv(tensors: list[Tensor], heads: Heads) -> list[Tensor]:
    """[(n + 2 k) * d, h], for each kv head its query heads, then k, then v -> q, k, v."""
    per_group = heads.num_heads // heads.num_kv_heads
    fused = tensors[0]
    grouped = fused.view(heads.num_kv_heads, per_group + 2, heads.head_dim, *fused.shape[1:])
    return [part.flatten(0, 2).contiguous() for part in grouped.split([per_group, 1, 1], dim=1)]


def _join_qkv(tensors: list[Tensor], heads: Heads) -> list[Tensor]:
    grouped = [
        part.view(heads.num_kv_heads, -1, heads.head_dim, *part.shape[1:]) for part in tensors
    ]  # [k, n / k or 1, d, h]
    return [torch.cat(grouped, dim=1).flatten(0, 2).contiguous()]


def _split_rows(parts: int) -> Callable[[list[Tensor], Heads], list[Tensor]]:
    return lambda tensors, heads: [part.contiguous() for part in tensors[0].chunk(parts, dim=0)]


def _join_rows(tensors: list[Tensor], heads: Heads) -> list[Tensor]:
    return [torch.cat(tensors, dim=0)]


SAME = Transform(_same, _same)
QKV = Transform(_split_qkv, _join_qkv)
"""Fused per kv head (ours) <-> three projections."""
HALVES = Transform(_split_rows(2), _join_rows)
"""Gate rows then up rows in one tensor (ours) <-> two tensors."""
JOIN_THREE = Transform(_join_rows, _split_rows(3))
"""Three tensors (ours) <-> one with their rows in order."""
BATCHED = Transform(lambda tensors, heads: [tensors[0][None]], lambda tensors, heads: [tensors[0][0]])
"""A tensor (ours) <-> the same with a leading dimension of 1."""
UNIT_ROWS = Transform(lambda tensors, heads: [with_unit_rows(tensors[0])], _same)
"""Rows of any length (ours) <-> unit rows: equal for every lookup by direction, not bit for bit."""


def row(ours: str | tuple[str, ...], theirs: str | tuple[str, ...], transform: Transform = SAME) -> Row:
    """A row of a table; a single name may be given bare."""
    return Row((ours,) if isinstance(ours, str) else ours, (theirs,) if isinstance(theirs, str) else theirs, transform)


def plan_export(rows: Sequence[Row], names: Iterable[str]) -> list[Conversion]:
    """What turns our tensors `names` into theirs; raises UserError where the table and the names do not fit."""
    return _plan([(row.ours, row.theirs, row.transform.forward) for row in rows], names)


def plan_import(rows: Sequence[Row], names: Iterable[str]) -> list[Conversion]:
    """What turns their tensors `names` into ours; raises UserError where the table and the names do not fit."""
    return _plan([(row.theirs, row.ours, row.transform.backward) for row in rows], names)


def convert(
    conversions: Iterable[Conversion], read: Callable[[str], Tensor], heads: Heads
) -> Iterator[tuple[str, Tensor]]:
    """Yields (target name, tensor), reading sources one group at a time, so that memory holds one group."""
    for conversion in conversions:
        tensors = conversion.apply([read(name) for name in conversion.sources], heads)
        yield from zip(conversion.targets, tensors, strict=True)


def _plan(
    sides: list[tuple[tuple[str, ...], tuple[str, ...], Callable[[list[Tensor], Heads], list[Tensor]]]],
    names: Iterable[str],
) -> list[Conversion]:
    patterns = [
        (number, member, _pattern(name))
        for number, (sources, _, _) in enumerate(sides)
        for member, name in enumerate(sources)
    ]
    groups: dict[tuple[int, tuple[tuple[str, str], ...]], dict[int, str]] = {}
    for name in names:
        claims = [
            (number, member, match.groupdict())
            for number, member, pattern in patterns
            if (match := pattern.fullmatch(name))
        ]
        if len(claims) != 1:
            raise UserError(
                f"tensor {name}: {len(claims)} rows of the name map claim it, there must be one; "
                "the weights are of another model or layout"
            )
        number, member, bound = claims[0]
        groups.setdefault((number, tuple(sorted(bound.items()))), {})[member] = name
    conversions = [_bind(sides[number], dict(bound), members) for (number, bound), members in groups.items()]
    targets = [target for conversion in conversions for target in conversion.targets]
    doubled = {target for target in targets if targets.count(target) > 1} if len(set(targets)) < len(targets) else ()
    if doubled:
        raise UserError(f"tensor {min(doubled)}: two rows of the name map write it; the weights hold it twice")
    return conversions


def _bind(
    side: tuple[tuple[str, ...], tuple[str, ...], Callable[[list[Tensor], Heads], list[Tensor]]],
    bound: dict[str, str],
    members: dict[int, str],
) -> Conversion:
    sources, targets, apply = side
    missing = [name.format(**bound) for number, name in enumerate(sources) if number not in members]
    if missing:
        raise UserError(
            f"tensor {missing[0]}: missing beside {next(iter(members.values()))}; the weights are not whole"
        )
    return Conversion(
        tuple(members[number] for number in range(len(sources))),
        tuple(target.format(**bound) for target in targets),
        apply,
    )


def _pattern(name: str) -> re.Pattern[str]:
    pieces = re.split(r"\{(\w+)\}", name)
    parts = [
        f"(?P<{piece}>{_PLACEHOLDERS[piece]})" if number % 2 else re.escape(piece)
        for number, piece in enumerate(pieces)
    ]
    return re.compile("".join(parts))
