"""What is known of samples, as columns that rules ask for: from the index, else from what prepare kept, else from the
stored samples themselves.

    tokens, images                        index
    caption_chars, language, scores ...   index/meta, as prepare wrote it
    width, height                         of the first picture: index/meta, else its header
    min_side, max_side, aspect            over all pictures of a sample; aspect is long side over short side

What index/meta lacks (tars of others, older sources) is looked for in one pass over the samples: picture headers,
doc.json and its `meta`, the .json beside a picture. An attribute that no sample has is an error, not a rule without
effect.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.manifest import Source
from data_pipeline.masks.facts import PICTURE_FACTS, StoredFacts, read_facts
from data_pipeline.masks.lookup import rows_of_uids
from data_pipeline.masks.passes import Progress

_INDEX = ("tokens", "images")
_SIDES = ("width", "height")


@dataclass(frozen=True, slots=True)
class Column:
    """One attribute of all samples."""

    values: np.ndarray
    """float [N], nan where unknown; with labels int [N], a place in them, 0 where unknown."""
    labels: tuple[str, ...] | None = None
    """Words, the first of them empty."""

    @property
    def known(self) -> np.ndarray:
        """bool [N]."""
        return ~np.isnan(self.values) if self.labels is None else self.values != 0


@dataclass(frozen=True, slots=True)
class Columns:
    """Attributes by name."""

    by_name: dict[str, Column]
    damaged: np.ndarray
    """bool [N]: samples or pictures that were read for their attributes and cannot be."""


def read_columns(
    source: Source,
    names: Sequence[str],
    *,
    images: Source | None = None,
    workers: int = 1,
    progress: Progress | None = None,
) -> Columns:
    """Looks up attributes.

    Args:
        source: Whose samples.
        names: Attributes.
        images: Where the pictures of drawings are, joined by uid; asked for what the drawings do not know.
        workers: Processes that read samples.
        progress: Called as samples are read.

    Raises:
        UserError: An attribute that no sample has, or a damaged file of index/meta.
    """
    damaged = np.zeros(len(source), np.bool_)
    columns = {name: column for name in names if (column := _indexed(source, name)) is not None}
    missing = [name for name in names if name not in columns]
    several = _samples_with_several_pictures(source) if set(columns) & set(PICTURE_FACTS) else np.empty(0, np.int64)
    if source.kind == "interleaved" and (missing or len(several)):
        numbers = np.arange(len(source)) if missing else several
        facts = read_facts(source, names, numbers, workers, progress)
        damaged[facts.damaged] = True
        for name in names:
            if name in missing:
                columns[name] = _stored(facts, name, len(source))
            elif name in PICTURE_FACTS:
                columns[name] = _corrected(columns[name], facts, name)
        missing = [name for name in missing if not columns[name].known.any()]
        seen = facts.names
    elif missing and images is not None:
        found = read_columns(images, missing, workers=workers, progress=progress)
        rows = rows_of_uids(source, images)
        columns |= {name: _gathered(column, rows) for name, column in found.by_name.items()}
        damaged = (rows >= 0) & found.damaged[rows]
        return Columns(columns, damaged)
    else:
        seen = set()
    if missing:
        there = sorted({*_INDEX, *_meta_names(source), *_derived(source), *seen})
        hint = ", or name the source of the pictures with --images" if source.kind == "t2i" else ""
        raise UserError(
            f"{source.path}: no sample has {missing[0]!r}; attributes there are: {', '.join(there)}; choose one of "
            f"these{hint}"
        )
    return Columns(columns, damaged)


def _samples_with_several_pictures(source: Source) -> np.ndarray:
    """index/meta knows the size of the first picture alone."""
    return np.flatnonzero(np.asarray(source.num_und_images) > 1)


def _indexed(source: Source, name: str) -> Column | None:
    """A column that needs no sample to be read."""
    if name == "tokens":
        return Column(np.asarray(source.num_text_tokens, np.float64))
    if name == "images":
        return Column(np.asarray(source.num_und_images, np.float64) + source.num_gen_images)
    if name in _meta_names(source):
        return _meta_column(source, name)
    if name in _derived(source):
        width, height = (_meta_column(source, side).values for side in _SIDES)
        return Column(PICTURE_FACTS[name](width[:, None], height[:, None]))
    return None


def _derived(source: Source) -> list[str]:
    """Attributes that follow from the sizes that prepare kept."""
    return list(PICTURE_FACTS) if set(_SIDES) <= set(_meta_names(source)) else []


def _meta_names(source: Source) -> list[str]:
    return sorted(path.stem for path in (source.path / "index" / "meta").glob("*.npy"))


def _meta_column(source: Source, name: str) -> Column:
    """A column that prepare wrote."""
    path = source.path / "index" / "meta" / f"{name}.npy"
    remedy = "copy it again, or delete the directory and run `janus-mega data prepare` once more"
    try:
        values = np.load(path, allow_pickle=False)
        labels = None
        if values.dtype.kind in "ui":
            labels = tuple(json.loads(path.with_suffix(".json").read_bytes())["names"])
            if not all(isinstance(label, str) for label in labels) or (len(values) and values.max() >= len(labels)):
                raise ValueError("its names do not fit")
    except (OSError, ValueError, EOFError, KeyError, TypeError) as error:
        raise UserError(f"{path}: missing or damaged index file ({error}); {remedy}") from error
    if values.shape != (len(source),) or (labels is None and values.dtype.kind != "f"):
        raise UserError(
            f"{path}: expected numbers [{len(source)}], found {values.dtype} {list(values.shape)}; {remedy}"
        )
    return Column(values, labels)


def _stored(facts: StoredFacts, name: str, num_samples: int) -> Column:
    """A column of what the samples say."""
    samples, found = facts.values(name)
    if found.dtype.kind == "f":
        values = np.full(num_samples, math.nan)
        values[samples] = found
        return Column(values)
    words, codes = np.unique(found, return_inverse=True)
    column = np.zeros(num_samples, np.int64)
    column[samples] = codes + 1
    return Column(column, ("", *words.tolist()))


def _corrected(column: Column, facts: StoredFacts, name: str) -> Column:
    """Puts what all pictures of a sample say in place of what is known of the first."""
    values = column.values.astype(np.float64)
    samples, found = facts.values(name)
    values[samples] = found
    return Column(values)


def _gathered(column: Column, rows: np.ndarray) -> Column:
    """The column of another source in the order of this one; row -1 is unknown."""
    values = column.values[rows]
    values[rows < 0] = math.nan if column.labels is None else 0
    return Column(values, column.labels)
