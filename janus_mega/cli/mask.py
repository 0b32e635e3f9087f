"""`janus-mega data mask`: what a run leaves out of its sources, without touching a shard."""

from contextlib import ExitStack
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_pipeline.errors import UserError

if TYPE_CHECKING:
    from data_pipeline.manifest import Source
    from data_pipeline.masks.build import Mask
    from data_pipeline.masks.dedup import DedupOptions
    from data_pipeline.masks.passes import Progress as OnProgress
    from data_pipeline.masks.rules import Rule

mask_app = typer.Typer(rich_markup_mode=None)


class Duplicate(Enum):
    """What makes two samples duplicates."""

    exact = "exact"
    picture = "picture"
    near = "near"


_BOUNDS = (
    ("min_side", ">="),
    ("max_side", "<="),
    ("aspect", "<="),
    ("caption_chars", ">="),
    ("caption_chars", "<="),
    ("tokens", ">="),
    ("tokens", "<="),
    ("images", ">="),
    ("images", "<="),
)
"""Attribute and sign of the options that have their own name, in the order of the command's parameters."""


@mask_app.command()
def mask(
    directories: Annotated[
        list[Path], typer.Argument(metavar="DIRECTORY...", help="Sources; of duplicates the first one stays.")
    ],
    name: Annotated[str, typer.Option(help="Name of the mask, for `masks` of a source in a run's YAML.")] = "",
    min_side: Annotated[float | None, typer.Option(help="Shortest side of every picture, pixels.")] = None,
    max_side: Annotated[float | None, typer.Option(help="Longest side of every picture, pixels.")] = None,
    max_aspect: Annotated[float | None, typer.Option(help="Long side over short side of every picture.")] = None,
    min_chars: Annotated[float | None, typer.Option(help="Characters of the caption.")] = None,
    max_chars: Annotated[float | None, typer.Option(help="Characters of the caption.")] = None,
    min_tokens: Annotated[float | None, typer.Option(help="Text tokens of the sample.")] = None,
    max_tokens: Annotated[float | None, typer.Option(help="Text tokens of the sample.")] = None,
    min_images: Annotated[float | None, typer.Option(help="Pictures of the sample.")] = None,
    max_images: Annotated[float | None, typer.Option(help="Pictures of the sample.")] = None,
    language: Annotated[list[str] | None, typer.Option(help="Keep this language; may be repeated.")] = None,
    keep_if: Annotated[list[str] | None, typer.Option(help="Keep what has, such as 'aesthetic>=5'.")] = None,
    drop_if: Annotated[list[str] | None, typer.Option(help="Leave out what has, such as 'nsfw>0.5'.")] = None,
    keep_unknown: Annotated[
        bool, typer.Option("--keep-unknown", help="--keep-if and --language keep samples that say nothing.")
    ] = False,
    uids: Annotated[
        list[Path] | None, typer.Option(help="List of uids or ids: .npy, .txt, .jsonl, .jsonl.gz, .parquet, a folder.")
    ] = None,
    keep: Annotated[bool | None, typer.Option("--keep/--drop", help="What becomes of what --uids lists.")] = None,
    dedup: Annotated[Duplicate | None, typer.Option(help="Leave out duplicates: see docs/formats.md.")] = None,
    distance: Annotated[int | None, typer.Option(help="near: bits of 64 that may differ, 0 to 10.")] = None,
    images: Annotated[Path | None, typer.Option(help="Source of the pictures of drawings, joined by uid.")] = None,
    given: Annotated[
        list[str] | None, typer.Option(help="Mask whose samples are no reason to call another a duplicate.")
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes that read pictures.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the table and write nothing.")] = False,
    remove: Annotated[str, typer.Option(help="Delete the mask of this name and do nothing else.")] = "",
    show: Annotated[bool, typer.Option("--list", help="Tell what masks there are and do nothing else.")] = False,
) -> None:
    """Leave samples out of sources by filters, lists of uids or duplicates; shards are not touched."""
    from data_pipeline.manifest import open_source
    from data_pipeline.masks.build import Criteria, make_masks

    sources = [open_source(path) for path in directories]
    if remove or show:
        return _remove_and_list(sources, remove)
    _check_options(bool(name) or dry_run, uids, keep)
    bounds = (min_side, max_side, max_aspect, min_chars, max_chars, min_tokens, max_tokens, min_images, max_images)
    joined = open_source(images) if images is not None else None
    criteria = Criteria(
        rules=_bounds(bounds) + _rules(keep_if or [], drop_if or [], language or [], keep_unknown),
        uid_lists=tuple(uids or ()),
        keep_listed=bool(keep),
        dedup=_dedup(dedup, distance, joined, workers),
        given=tuple(given or ()),
        images=joined,
        workers=workers,
    )
    with ExitStack() as bars:
        masks = make_masks(sources, criteria, lambda source: _bar(bars, source))
    for made in masks:
        for line in _mask_lines(made, name, None if dry_run else made.write(name)):
            print(line)


def _check_options(has_name: bool, uids: list[Path] | None, keep: bool | None) -> None:
    if not has_name:
        raise UserError("data mask: the mask needs a --name; give one, or look first with --dry-run")
    if uids and keep is None:
        raise UserError("data mask: --uids needs --keep (all else goes) or --drop (what is listed goes); add one")
    if keep is not None and not uids:
        raise UserError("data mask: --keep and --drop are about what --uids lists; add --uids FILE")


def _bounds(values: "tuple[float | None, ...]") -> "tuple[Rule, ...]":
    """Rules of the options that have their own name; a sample without pictures or caption is not judged by them."""
    from data_pipeline.masks.rules import Rule

    given = [(name, sign, value) for (name, sign), value in zip(_BOUNDS, values, strict=True) if value is not None]
    return tuple(Rule(name, sign, (f"{value:.15g}",), keeps_unknown=True) for name, sign, value in given)


def _rules(keep_if: list[str], drop_if: list[str], languages: list[str], keep_unknown: bool) -> "tuple[Rule, ...]":
    from data_pipeline.masks.rules import Rule, parse_rule

    rules = [parse_rule(text, keeps_unknown=keep_unknown) for text in keep_if]
    rules += [parse_rule(text, keeps_unknown=True, negated=True) for text in drop_if]
    rules += [Rule("language", "==", tuple(languages), keep_unknown)] if languages else []
    return tuple(rules)


def _dedup(
    duplicate: Duplicate | None, distance: int | None, images: "Source | None", workers: int
) -> "DedupOptions | None":
    from data_pipeline.masks.dedup import DEFAULT_DISTANCE, Dedup, DedupOptions
    from data_pipeline.masks.near import MAX_DISTANCE

    if distance is not None and (duplicate is not Duplicate.near or not 0 <= distance <= MAX_DISTANCE):
        raise UserError(f"data mask: --distance {distance} must be 0 to {MAX_DISTANCE}, with --dedup near; correct it")
    if duplicate is None:
        return None
    bits = DEFAULT_DISTANCE if distance is None else distance
    return DedupOptions(mode=Dedup[duplicate.value], distance=bits, images=images, workers=workers)


def _bar(bars: ExitStack, source: "Source") -> "OnProgress":
    """A bar for one pass; the one before it ends."""
    from janus_mega.observe.progress import Progress

    bars.pop_all().close()
    return bars.enter_context(Progress(f"read {source.path}", len(source))).reach


def _mask_lines(mask: "Mask", name: str, digest: str | None) -> list[str]:
    """A table of what goes and what stays."""
    source, num_samples = mask.source, len(mask.source)
    kept = ~mask.left_out
    num_kept = int(kept.sum())
    images = source.num_gen_images if source.kind == "t2i" else source.num_und_images
    rows = [*mask.reasons.items(), ("left out", num_samples - num_kept), ("left", num_kept)]
    width = max(len(reason) for reason, _ in rows)
    title = f"{source.path}: {num_samples:,} samples"
    lines = [f"{title}, mask {name!r} ({digest})" if digest else f"{title}, nothing is written"]
    lines += [f"  {reason:{width}}  {count:>14,}  {100 * count / num_samples:6.2f} %" for reason, count in rows]
    tokens, pictures = int(source.num_text_tokens[kept].sum()), int(images[kept].sum())
    lines.append(f"  with {tokens:,} text tokens and {pictures:,} images")
    return lines + [f"  note: {count:,} {note}" for note, count in mask.notes.items()]


def _remove_and_list(sources: "list[Source]", remove: str) -> None:
    """Deletes a mask if one is named, then tells what masks there are."""
    from data_pipeline.masks.store import list_masks, mask_facts, remove_mask

    for source in sources:
        if remove:
            remove_mask(source, remove)
        names = list_masks(source)
        print(f"{source.path}: {len(names)} mask{'' if len(names) == 1 else 's'}")
        for name in names:
            try:
                facts = mask_facts(source, name)
            except UserError as error:
                print(f"  {name}: {error}")
                continue
            told = ", ".join(f"{reason} {count:,}" for reason, count in facts["reasons"].items())
            print(f"  {name}: leaves out {facts['num_left_out']:,} of {facts['num_samples']:,} ({told})")
