"""What two plans have different, in words; and what a plan was made of, on disk.

A digest says that two plans differ and nothing else, so the identity it is the hash of is kept beside a run
(`plan.json`): the next start can then say which source, which field and both values.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError
from data_pipeline.files import write_aside
from data_pipeline.plan.identity import digest_of
from data_pipeline.plan.plan import Plan

IDENTITY_FILE = "plan.json"
"""In a run directory: the identity of the plan that its data came from."""

_DIGEST_SHOWN = 12


def save_identity(plan: Plan, path: Path) -> None:
    """Writes what a plan was made of, whole or not at all."""
    content = {"digest": plan.digest, "identity": plan.identity}
    write_aside(path, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())


def load_identity(path: Path) -> dict[str, Any]:
    """Reads what `save_identity` wrote; a run directory stands for the file in it.

    Raises:
        UserError: There is no such file, or its content is not what its digest says.
    """
    path = path / IDENTITY_FILE if path.is_dir() else path
    try:
        content = json.loads(path.read_bytes())
        identity, digest = content["identity"], content["digest"]
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); give the YAML of a run, a {IDENTITY_FILE} or a run directory"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no saved plan ({error}); give the {IDENTITY_FILE} of a run directory") from error
    if not isinstance(identity, dict) or digest_of(identity) != digest:
        raise UserError(f"{path}: damaged, its content has another digest than it says; take the copy of a checkpoint")
    return identity


def difference(ours: dict[str, Any], theirs: dict[str, Any], names: tuple[str, str] = ("here", "there")) -> list[str]:
    """Names what differs between two identities, one line each; empty if nothing does.

    Args:
        ours: The first identity.
        theirs: The second one.
        names: What to call them.
    """
    lines = [
        line
        for key in sorted((ours.keys() | theirs.keys()) - {"sources"})
        for line in _value_lines(_SPELLED.get(key, key), ours.get(key), theirs.get(key), names)
    ]
    here, there = ({source["name"]: source for source in side.get("sources", [])} for side in (ours, theirs))
    for name in sorted(here.keys() | there.keys()):
        if name not in here or name not in there:
            lines.append(f"source {name}: only {names[0] if name in here else names[1]}")
        else:
            lines += [f"source {name}: {line}" for line in _source_lines(here[name], there[name], names)]
    return lines


_SPELLED = {"plan_version": "version of the planner", "schema_version": "version of rows"}
_OF_SHARDS = ("digest", "samples", "lengths", "images", "can_cut", "caption_numbers")
_OF_MASKS = ("masks", "left_out", "samples_left_out")


def _source_lines(ours: dict[str, Any], theirs: dict[str, Any], names: tuple[str, str]) -> Iterator[str]:
    for key in sorted((ours.keys() | theirs.keys()) - {"name", *_OF_SHARDS, *_OF_MASKS}):
        if key == "schedule":
            yield from _value_lines(key, _points(ours.get(key)), _points(theirs.get(key)), names)
        else:
            yield from _value_lines(key, ours.get(key), theirs.get(key), names)
    yield from _shard_lines(ours, theirs, names)
    yield from _mask_lines(ours, theirs, names)


def _shard_lines(ours: dict[str, Any], theirs: dict[str, Any], names: tuple[str, str]) -> Iterator[str]:
    """What is stored, in one line where that says all: with other shards everything derived from them differs too."""
    if ours.get("digest") != theirs.get("digest"):
        told = (
            f"{side.get('samples', 0):,} samples of manifest {str(side.get('digest'))[:_DIGEST_SHOWN]} {name}"
            for side, name in zip((ours, theirs), names, strict=True)
        )
        yield f"other shards, {', '.join(told)}"
        return
    for key in _OF_SHARDS[1:]:
        yield from _value_lines(_SPELLED_OF_SHARDS.get(key, key), ours.get(key), theirs.get(key), names)


_SPELLED_OF_SHARDS = {
    "lengths": "tokens of its documents (tokenizer, template or geometry)",
    "images": "images of its documents",
    "caption_numbers": "captions of its images",
    "can_cut": "whether long documents are cut",
}


def _mask_lines(ours: dict[str, Any], theirs: dict[str, Any], names: tuple[str, str]) -> Iterator[str]:
    here, there = ours.get("masks", {}), theirs.get("masks", {})
    found = False
    for mask in sorted(here.keys() | there.keys()):
        if mask not in here or mask not in there:
            found = True
            yield f"mask {mask!r} only {names[0] if mask in here else names[1]}{_left_out(ours, theirs, names)}"
        elif here[mask] != there[mask]:
            found = True
            yield f"mask {mask!r} was made anew{_left_out(ours, theirs, names)}"
    if not found and ours.get("left_out") != theirs.get("left_out"):
        yield f"other samples are left out{_left_out(ours, theirs, names)}"


def _left_out(ours: dict[str, Any], theirs: dict[str, Any], names: tuple[str, str]) -> str:
    counts = (
        f"{side.get('samples_left_out', 0):,} left out {name}" for side, name in zip((ours, theirs), names, strict=True)
    )
    return f" ({', '.join(counts)})"


def _points(schedule: Sequence[dict[str, Any]] | None) -> str:
    points = (f"{point['weight']:g} from {point['at']:,.0f} ({point['shape']})" for point in schedule or ())
    return ", ".join(points) or "none"


def _value_lines(key: str, ours: Any, theirs: Any, names: tuple[str, str]) -> Iterator[str]:
    """One line for two values that differ; a line for each entry of dicts."""
    if ours == theirs:
        return
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for entry in sorted(ours.keys() | theirs.keys()):
            yield from _value_lines(f"{key}.{entry}", ours.get(entry), theirs.get(entry), names)
        return
    yield f"{key} {_shown(ours)} {names[0]}, {_shown(theirs)} {names[1]}"


def _shown(value: Any) -> str:
    """A value as read by people: hashes short, numbers plain."""
    if isinstance(value, str):
        return value[:_DIGEST_SHOWN] if len(value) == 64 else value
    return f"{value:g}" if isinstance(value, float) else str(value)
