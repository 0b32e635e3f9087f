"""What stored samples say of themselves: sizes in the headers of their pictures, their JSON, how long their text is.

Only what is asked for is kept, as arrays, so a pass over millions of samples stays small.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from data_pipeline.errors import BrokenSample
from data_pipeline.explain.picture_header import picture_size
from data_pipeline.images import ImageError
from data_pipeline.manifest import Source
from data_pipeline.masks.passes import Progress, over_samples
from data_pipeline.masks.pictures import sample_pictures
from data_pipeline.pairs import pair_caption, parse_facts
from data_pipeline.stream.read import SampleReader

Fact = float | str

PICTURE_FACTS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "min_side": lambda width, height: np.minimum(width, height).min(-1),
    "max_side": lambda width, height: np.maximum(width, height).max(-1),
    "aspect": lambda width, height: (np.maximum(width, height) / np.minimum(width, height)).max(-1),
}
"""Attributes of all pictures of a sample: [..., pictures] widths and heights to [...]."""

_LANGUAGES = ("lang", "LANGUAGE")
_MAX_NAMES = 200
_MAX_WORD = 200
_TOO_LARGE = 1e300


@dataclass(slots=True)
class StoredFacts:
    """Facts of samples that were read."""

    found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = field(default_factory=dict)
    """By attribute: sample numbers and values (float64 or text), a pair for every run of samples."""
    damaged: list[int] = field(default_factory=list)
    """Samples that cannot be read, or with a picture that has no size."""
    names: set[str] = field(default_factory=set)
    """Attributes that any sample has, also those not asked for."""

    def values(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Sample numbers (int64) and values of an attribute: float64, or text if a single one is no number."""
        parts = self.found.get(name, [])
        if not parts:
            return np.empty(0, np.int64), np.empty(0)
        is_text = any(values.dtype.kind == "U" for _, values in parts)
        values = np.concatenate([values.astype(str) if is_text else values for _, values in parts])
        return np.concatenate([samples for samples, _ in parts]), values


def read_facts(
    source: Source,
    names: Sequence[str],
    numbers: np.ndarray,
    workers: int = 1,
    progress: Progress | None = None,
) -> StoredFacts:
    """Reads some facts of some samples of an interleaved source."""
    total = StoredFacts()
    for run in over_samples(source, numbers, partial(_facts_of_run, tuple(names)), workers, progress):
        for name, parts in run.found.items():
            total.found.setdefault(name, []).extend(parts)
        total.damaged += run.damaged
        if len(total.names) < _MAX_NAMES:
            total.names |= run.names
    return total


def _facts_of_run(names: tuple[str, ...], reader: SampleReader, numbers: list[int]) -> StoredFacts:
    run = StoredFacts()
    found: dict[str, list[tuple[int, Fact]]] = {name: [] for name in names}
    for number in numbers:
        try:
            facts = _facts_of_sample(reader.members(number))
        except (BrokenSample, ImageError, KeyError, ValueError, TypeError, RecursionError):
            run.damaged.append(number)
            continue
        run.names.update(facts)
        for name in names:
            if name in facts:
                found[name].append((number, facts[name]))
    for name, pairs in found.items():
        if pairs:
            samples, values = zip(*pairs, strict=True)
            run.found[name] = [(np.array(samples, np.int64), _array(values))]
    return run


def _array(values: Sequence[Fact]) -> np.ndarray:
    """float64, also of numbers that are written as text; else text."""
    try:
        return np.array([float(value) for value in values])
    except ValueError:
        return np.array([str(value) for value in values])


def _facts_of_sample(members: dict[str, memoryview]) -> dict[str, Fact]:
    facts: dict[str, Fact] = {}
    if "doc.json" in members:
        document = json.loads(bytes(members["doc.json"]))
        learnt = [part for part in document["seq"] if part["t"] == "text" and part["loss"]]
        if all("s" in part for part in learnt):
            facts["caption_chars"] = float(sum(len(part["s"]) for part in learnt))
        _add_said(facts, document)
        _add_said(facts, document.get("meta"))
    else:
        said = parse_facts(members["json"]) if "json" in members else {}
        _add_said(facts, said)
        _add_said(facts, said.get("meta"))
        facts["caption_chars"] = float(len(pair_caption(members.get("txt"), said).strip()))
    language = next((facts[name] for name in _LANGUAGES if name in facts), None)
    if language is not None:
        facts.setdefault("language", language)
    sizes = [picture_size(bytes(picture)) for picture in sample_pictures(members)]
    if any(min(size) < 1 for size in sizes):
        raise ImageError("a picture without pixels")
    if sizes:
        width, height = np.array(sizes, np.float64).T
        facts |= {"width": float(width[0]), "height": float(height[0])}
        facts |= {name: float(fact(width, height)) for name, fact in PICTURE_FACTS.items()}
    return facts


def _add_said(facts: dict[str, Fact], said: Any) -> None:
    """Takes the numbers and short words of a JSON object."""
    for name, value in said.items() if isinstance(said, dict) else ():
        if isinstance(value, str):
            if 0 < len(value) <= _MAX_WORD:
                facts[name] = value
        elif isinstance(value, int | float) and abs(value) < _TOO_LARGE:  # leaves out nan as well
            facts[name] = float(value)
