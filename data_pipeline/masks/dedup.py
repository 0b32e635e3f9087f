"""Duplicates within a source and across sources: of all that are alike the first stays, in the order sources are given.

    exact     the same text and the same pictures, byte for byte (drawings: the same image ids and the same caption)
    picture   the same pictures, whatever is said about them (drawings: the same image ids, or pictures by `images`)
    near      pictures that look the same: other sizes, compression, brightness

`picture` and `near` compare samples by all their pictures in order; samples without pictures are like nothing. The
captions of one drawing stay or go together. Samples that are already left out are never what a duplicate is kept for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.manifest import Source
from data_pipeline.masks.classes import classes_of_rows, classes_of_runs, later_of_class
from data_pipeline.masks.contents import drawing_contents, sample_contents
from data_pipeline.masks.lookup import rows_of_uids
from data_pipeline.masks.near import near_groups
from data_pipeline.masks.passes import Progress
from data_pipeline.masks.pictures import COMPARABLE, DAMAGED, FLAT, PICTURE_DTYPE, UNDECODABLE, hashed_pictures

DEFAULT_DISTANCE = 4


class Dedup(Enum):
    """What makes two samples duplicates."""

    exact = "exact"
    picture = "picture"
    near = "near"


@dataclass(frozen=True, kw_only=True, slots=True)
class DedupOptions:
    """How duplicates are looked for."""

    mode: Dedup
    """What makes two samples duplicates."""
    distance: int = DEFAULT_DISTANCE
    """near: bits of 64 in which hashes may differ."""
    images: Source | None = None
    """Pictures of drawings, joined by uid."""
    workers: int = 1
    """Processes that read and hash."""


@dataclass(frozen=True, slots=True)
class Duplicates:
    """What was found in one source."""

    left_out: np.ndarray
    """bool [N]: samples of which an earlier one is kept."""
    notes: dict[str, int] = field(default_factory=dict)
    """Pictures and samples that could not be compared, by reason."""


def find_duplicates(
    sources: Sequence[Source],
    left_out: Sequence[np.ndarray],
    options: DedupOptions,
    progress: Callable[[Source], Progress | None] = lambda source: None,
) -> list[Duplicates]:
    """Finds duplicates across sources.

    Args:
        sources: In order of precedence.
        left_out: bool [N] per source: samples that are left out already.
        options: What is compared.
        progress: Gives what is told of the pass over a source.

    Raises:
        UserError: Sources that cannot be compared this way.
    """
    if options.mode is Dedup.exact:
        found = [sample_contents(source, sources, options.workers, progress(source)) for source in sources]
        units = [np.arange(len(source)) for source in sources]
        classes = classes_of_rows(np.concatenate([part.words for part in found]))
        classes[~np.concatenate([part.comparable for part in found])] = -1
        notes = [_counted({"damaged": part.num_damaged}) for part in found]
    else:
        _check_comparable(sources, options)
        units = [_units(source) for source in sources]
        tables = [
            _picture_table(source, unit, options, progress(source)) for source, unit in zip(sources, units, strict=True)
        ]
        classes = _classes_of_units(tables, units, options)
        notes = [_picture_notes(table, unit) for table, unit in zip(tables, units, strict=True)]
    eligible = np.concatenate([_units_with(~out, unit) for out, unit in zip(left_out, units, strict=True)])
    later = later_of_class(classes, eligible)
    ends = np.cumsum([_num_units(unit) for unit in units])
    parts = np.split(later, ends[:-1])
    return [
        Duplicates(part[unit] & ~out, note) for part, unit, out, note in zip(parts, units, left_out, notes, strict=True)
    ]


def _check_comparable(sources: Sequence[Source], options: DedupOptions) -> None:
    kinds = {source.kind for source in sources}
    by_ids = [source for source in sources if source.kind == "t2i" and options.images is None]
    if "text" in kinds:
        path = next(source.path for source in sources if source.kind == "text")
        raise UserError(f"{path}: texts have no pictures; find their duplicates with --dedup exact")
    if by_ids and (options.mode is Dedup.near or len(kinds) > 1):
        raise UserError(
            f"{by_ids[0].path}: drawings hold ids, not pictures; name the source of their pictures with --images, or "
            "compare drawings alone with --dedup picture"
        )
    if options.images is not None and options.images.kind != "interleaved":
        raise UserError(
            f"{options.images.path}: --images needs a source of pictures, this one is {options.images.kind}"
        )


def _units(source: Source) -> np.ndarray:
    """int64 [N]: the unit of each sample; the captions of one image are one unit, else every sample is its own."""
    if source.caption_number is None:
        return np.arange(len(source))
    begins = np.asarray(source.caption_number) == 0
    return np.cumsum(begins) - 1


def _num_units(unit: np.ndarray) -> int:
    return int(unit[-1]) + 1 if len(unit) else 0


def _units_with(samples: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """bool [units]: those that have one of the samples."""
    with_one = np.zeros(_num_units(unit), np.bool_)
    with_one[unit[samples]] = True
    return with_one


def _picture_table(source: Source, unit: np.ndarray, options: DedupOptions, progress: Progress | None) -> np.ndarray:
    """PICTURE_DTYPE [P] with `sample` the unit that a picture belongs to, ascending."""
    looks = options.mode is Dedup.near
    if source.kind == "interleaved":
        return hashed_pictures(source, looks=looks, workers=options.workers, progress=progress)
    first = np.flatnonzero(np.concatenate([[True], unit[1:] != unit[:-1]]))  # the first sample of each unit
    if options.images is None:
        found = drawing_contents(source, first, options.workers, progress)
        table = np.zeros(len(first), PICTURE_DTYPE)
        table["sample"], table["sha"] = np.arange(len(first)), found.words
        table["state"] = np.where(found.comparable, COMPARABLE, DAMAGED)
        return table
    pictures = hashed_pictures(options.images, looks=looks, workers=options.workers, progress=progress)
    rows = rows_of_uids(source, options.images)[first]
    owners = np.flatnonzero(rows >= 0)
    if not len(owners):
        raise UserError(
            f"{options.images.path}: has none of the uids of {source.path}, such as {source.uid(0)}; name the source "
            "that was prepared from the same pictures"
        )
    counts = np.bincount(pictures["sample"], minlength=len(options.images))
    starts = (np.cumsum(counts) - counts)[rows[owners]]
    counts = counts[rows[owners]]
    before = np.cumsum(counts) - counts
    taken = pictures[np.repeat(starts - before, counts) + np.arange(counts.sum())]
    taken["sample"] = np.repeat(owners, counts)
    return taken


def _classes_of_units(tables: list[np.ndarray], units: list[np.ndarray], options: DedupOptions) -> np.ndarray:
    """int64 [units of all sources]: equal where all pictures are alike in order, -1 without pictures."""
    num_units = [_num_units(unit) for unit in units]
    starts = np.cumsum([0, *num_units])
    table = np.concatenate(tables)
    owners = np.concatenate([part["sample"] + start for part, start in zip(tables, starts[:-1], strict=True)])
    classes = classes_of_rows(table["sha"])
    damaged = np.flatnonzero(table["state"] == DAMAGED)
    classes[damaged] = len(table) + damaged  # each like nothing else
    if options.mode is Dedup.near:
        comparable = np.flatnonzero(table["state"] == COMPARABLE)
        # Numbers beyond those of byte classes: what is compared by its look is not compared by its bytes.
        classes[comparable] = 2 * len(table) + near_groups(table["look"][comparable], options.distance)
    return classes_of_runs(classes, owners, int(starts[-1]))


def _picture_notes(table: np.ndarray, unit: np.ndarray) -> dict[str, int]:
    num_with_pictures = len(np.unique(table["sample"]))
    return _counted(
        {
            "without pictures": _num_units(unit) - num_with_pictures,
            "pictures too flat, compared by their bytes": int(np.count_nonzero(table["state"] == FLAT)),
            "pictures that do not decode, compared by their bytes": int(
                np.count_nonzero(table["state"] == UNDECODABLE)
            ),
            "damaged": int(np.count_nonzero(table["state"] == DAMAGED)),
        }
    )


def _counted(notes: dict[str, int]) -> dict[str, int]:
    return {note: count for note, count in notes.items() if count}
