"""Several criteria to one mask per source: rules, then lists of uids, then duplicates among what is left.

Duplicates come last so that what a duplicate is kept for is itself kept. Every criterion counts under its own reason,
so one sample may count under several.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.files import sha256_of
from data_pipeline.manifest import Source
from data_pipeline.masks.attributes import read_columns
from data_pipeline.masks.dedup import Dedup, DedupOptions, find_duplicates
from data_pipeline.masks.passes import Progress
from data_pipeline.masks.rules import Rule, broken_by
from data_pipeline.masks.store import mask_digest, read_masks, write_mask
from data_pipeline.masks.uid_lists import listed_samples

ProgressOf = Callable[[Source], Progress | None]
"""Gives what is told of a pass over a source."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Criteria:
    """What a mask is made by; at least one thing."""

    rules: tuple[Rule, ...] = ()
    """What holds for the samples that stay."""
    uid_lists: tuple[Path, ...] = ()
    """Files or directories that name samples."""
    keep_listed: bool = False
    """Whether what is listed stays and all else goes, or the other way round."""
    dedup: DedupOptions | None = None
    """Also leave out duplicates."""
    given: tuple[str, ...] = ()
    """Masks of the sources whose samples count as left out already; they are not made part of this one."""
    images: Source | None = None
    """Pictures of drawings, joined by uid, for rules about pictures."""
    workers: int = 1
    """Processes that read samples."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mask:
    """What a source loses, not yet written."""

    source: Source
    left_out: np.ndarray
    """bool [N]."""
    reasons: dict[str, int]
    """Samples left out, by reason."""
    notes: dict[str, int] = field(default_factory=dict)
    """What could not be judged, and how much of the lists was found."""
    settings: dict[str, Any]
    """What it was made by, ready for JSON."""

    def write(self, name: str) -> str:
        """Writes it; returns its digest.

        Raises:
            UserError: As `write_mask`.
        """
        return write_mask(self.source, name, self.left_out, self.reasons, self.settings)


def make_masks(
    sources: Sequence[Source], criteria: Criteria, progress_of: ProgressOf = lambda source: None
) -> list[Mask]:
    """Judges the samples of sources; nothing is written but hashes that are kept for the next time.

    Args:
        sources: In order of precedence: of duplicates, the first one stays.
        criteria: What to leave out.
        progress_of: Asked before every pass over stored samples.

    Raises:
        UserError: No criterion, one that cannot be applied, or a mask that would leave nothing of a source.
    """
    if not (criteria.rules or criteria.uid_lists or criteria.dedup):
        raise UserError("a mask needs a criterion: a filter, --uids or --dedup; name at least one")
    paths = [source.path.resolve() for source in sources]
    if len(set(paths)) < len(paths):
        raise UserError(f"{', '.join(map(str, paths))}: a source is given twice; name each once")
    masks = [_by_rules_and_lists(source, criteria, progress_of) for source in sources]
    if criteria.dedup is not None:
        out = [mask.left_out | read_masks(mask.source, list(criteria.given)) for mask in masks]
        found = find_duplicates(sources, out, criteria.dedup, progress_of)
        reason = {Dedup.exact: "exact duplicate", Dedup.picture: "same picture", Dedup.near: "near duplicate"}
        for mask, duplicates in zip(masks, found, strict=True):
            mask.reasons[reason[criteria.dedup.mode]] = int(np.count_nonzero(duplicates.left_out))
            mask.notes.update(duplicates.notes)
            mask.left_out[duplicates.left_out] = True
    for mask in masks:
        mask.settings.update(_settings(mask.source, sources, criteria))
        if mask.left_out.all():
            told = ", ".join(f"{count} by '{reason}'" for reason, count in mask.reasons.items() if count)
            raise UserError(
                f"{mask.source.path}: nothing would be left of its {len(mask.source)} samples ({told}); loosen the "
                "criteria, or take the source out of the run"
            )
    return masks


def _by_rules_and_lists(source: Source, criteria: Criteria, progress_of: ProgressOf) -> Mask:
    """A mask by all criteria but duplicates."""
    left_out = np.zeros(len(source), np.bool_)
    reasons: dict[str, int] = {}
    notes: dict[str, int] = {}

    def leave_out(reason: str, samples: np.ndarray) -> None:
        reasons[reason] = reasons.get(reason, 0) + int(np.count_nonzero(samples))
        left_out[samples] = True

    if criteria.rules:
        columns = read_columns(
            source,
            list(dict.fromkeys(rule.name for rule in criteria.rules)),
            images=criteria.images,
            workers=criteria.workers,
            progress=progress_of(source),
        )
        for rule in criteria.rules:
            column = columns.by_name[rule.name]
            leave_out(rule.opposite, broken_by(rule, column))
            if not rule.keeps_unknown:
                leave_out(f"{rule.name} unknown", ~column.known & ~columns.damaged)
        if columns.damaged.any():
            leave_out("damaged", columns.damaged)
    if criteria.uid_lists:
        named, num_found, num_listed = listed_samples(source, criteria.uid_lists)
        notes |= {"ids listed": num_listed, "ids found here": num_found}
        leave_out("not listed" if criteria.keep_listed else "listed", ~named if criteria.keep_listed else named)
    return Mask(source=source, left_out=left_out, reasons=reasons, notes=notes, settings={})


def _settings(source: Source, sources: Sequence[Source], criteria: Criteria) -> dict[str, Any]:
    """What a mask depends on; files and other sources by digest, so that bytes repeat wherever they lie."""
    settings: dict[str, Any] = {}
    if criteria.rules:
        settings["keep"] = [f"{rule}{' or unknown' if rule.keeps_unknown else ''}" for rule in criteria.rules]
    if criteria.uid_lists:
        settings["listed"] = "kept" if criteria.keep_listed else "dropped"
        settings["lists"] = [
            {"name": path.name, "sha256": sha256_of(path)} if path.is_file() else {"name": path.name}
            for path in criteria.uid_lists
        ]
    if criteria.given:
        settings["given"] = {name: mask_digest(source, name) for name in criteria.given}
    if criteria.images is not None:
        settings["images"] = criteria.images.digest
    if criteria.dedup is not None:
        settings["dedup"] = criteria.dedup.mode.value
        settings["among"] = [other.digest for other in sources]
        if criteria.dedup.mode is Dedup.near:
            settings["distance"] = criteria.dedup.distance
    return settings
