"""What a directory of shards holds, told from its manifest and index; only a few samples are read, as examples.

`inspect_source` gives plain values, ready for JSON; `inspection_lines` is the same for people.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.explain.blame import samples_of
from data_pipeline.explain.member_checks import JSONS, TEXTS, last_extension, split_name
from data_pipeline.explain.tar_walk import Entry, walk_tar
from data_pipeline.manifest import DRAWING_COLUMNS, SAMPLE_COLUMNS, Source, open_source
from data_pipeline.masks.store import list_masks, mask_facts
from data_pipeline.npy import open_npy
from data_pipeline.spec import ImageGeometry
from data_pipeline.stream.read import SampleReader

_BAR_WIDTH = 40


def inspect_source(path: str | Path, num_examples: int = 3, uid: str = "") -> dict[str, Any]:
    """Counts, histograms, schema, masks and some samples of a source; ready for JSON.

    Args:
        path: The directory.
        num_examples: Samples to show: the first ones.
        uid: Show the samples with this uid instead.

    Raises:
        UserError: The directory is missing, unfinished or damaged, or no sample has the uid.
    """
    source = open_source(path)
    chosen = list(range(min(num_examples, source.num_samples)))
    if uid:
        chosen = samples_of([source], uid)[0].tolist()
        if not chosen:
            raise UserError(f"{path}: no sample has uid {uid}; another source may have it")
    manifest = source.manifest
    tokens = np.asarray(source.num_text_tokens)
    images = np.asarray(source.num_und_images if source.kind != "t2i" else source.num_gen_images)
    return {
        "path": str(path),
        "schema": manifest.schema,
        "kind": source.kind,
        "digest": source.digest,
        "num_samples": source.num_samples,
        "num_shards": len(manifest.shards),
        "shard_bytes": sum(entry.bytes for entry in manifest.shards),
        "index_bytes": sum(file.stat().st_size for file in (source.path / "index").rglob("*.npy")),
        "text_tokens": {
            "total": manifest.num_text_tokens,
            **{
                name: float(value)
                for name, value in zip(("p10", "p50", "p90"), np.percentile(tokens, [10, 50, 90]), strict=True)
            },
            "min": int(tokens.min()),
            "max": int(tokens.max()),
            "histogram": _histogram(tokens),
        },
        "images": {
            "understood": manifest.num_und_images,
            "drawn": manifest.num_gen_images,
            "per_sample": {str(n): int(count) for n, count in enumerate(np.bincount(images)) if count},
            **_captions(source),
        },
        "duplicate_uids": count_duplicates(source),
        "masks": _masks(source),
        "meta": _meta_columns(source),
        "text_tokenizer": manifest.text_tokenizer,
        "image_tokenizer": json.loads(manifest.to_json())["image_tokenizer"],
        "template": manifest.template,
        "rejects": dict(manifest.rejects),
        "settings": dict(manifest.settings),
        "members": _members(source),
        "index": {**SAMPLE_COLUMNS, "uid": "<u8"} | (DRAWING_COLUMNS if source.kind == "t2i" else {}),
        "examples": [_example(source, i) for i in chosen],
    }


def count_duplicates(source: Source) -> int:
    """Samples whose uid an earlier sample has; captions of one image count as one sample."""
    first = slice(None) if source.caption_number is None else np.asarray(source.caption_number) == 0
    # One 128-bit value per sample, so that a sort brings equal ones together without two keys.
    words = np.ascontiguousarray(source.uids[first]).view([("high", "<u8"), ("low", "<u8")]).ravel()
    order = np.lexsort((words["low"], words["high"]))
    return int(np.count_nonzero(words[order][1:] == words[order][:-1]))


def _captions(source: Source) -> dict[str, Any]:
    """How many captions images have, and how many crops are stored of each."""
    entry = source.manifest.image_tokenizer
    if source.caption_number is None or entry is None:
        return {}
    begins = np.flatnonzero(np.asarray(source.caption_number) == 0)
    captions = np.diff(np.append(begins, source.num_samples))
    return {
        "distinct": len(begins),
        "captions_per_image": {str(n): int(count) for n, count in enumerate(np.bincount(captions)) if count},
        "crops_per_image": entry.num_variants,
    }


def _masks(source: Source) -> dict[str, Any]:
    """Masks beside the source; one that does not fit it says so."""
    masks: dict[str, Any] = {}
    for name in list_masks(source):
        try:
            facts = mask_facts(source, name)
            masks[name] = {"left_out": facts["num_left_out"], "reasons": facts["reasons"], "sha256": facts["sha256"]}
        except UserError as error:
            masks[name] = {"unusable": str(error)}
    return masks


def _meta_columns(source: Source) -> dict[str, Any]:
    """Facts of samples that prepare kept: how many have one, and their range."""
    columns: dict[str, Any] = {}
    for path in sorted((source.path / "index" / "meta").glob("*.npy")):
        try:
            values = open_npy(path)
        except (OSError, ValueError, EOFError) as error:
            columns[path.stem] = {"unusable": str(error)}
            continue
        if values.dtype.kind == "f":
            known = values[np.isfinite(values)]
            columns[path.stem] = {"known": len(known)}
            if len(known):
                low, middle, high = (float(value) for value in np.percentile(known, [0, 50, 100]))
                columns[path.stem] |= {"min": low, "median": middle, "max": high}
        else:
            columns[path.stem] = {"known": int(np.count_nonzero(values)), "values": len(np.unique(values[values > 0]))}
    return columns


def inspection_lines(found: dict[str, Any]) -> list[str]:
    """The same for people: lines of a plain table."""
    tokens, images = found["text_tokens"], found["images"]
    rows = [
        ("kind", f"{found['kind']} ({found['schema']})"),
        ("digest", found["digest"]),
        (
            "samples",
            f"{found['num_samples']:,} in {found['num_shards']:,} shards, {found['shard_bytes'] / 2**20:,.1f} MiB",
        ),
        ("index", f"{found['index_bytes']:,} bytes, {found['index_bytes'] / found['num_samples']:.1f} per sample"),
        (
            "text tokens",
            f"{tokens['total']:,}; per sample {tokens['min']} to {tokens['max']}, "
            f"10/50/90 % at {tokens['p10']:.0f}/{tokens['p50']:.0f}/{tokens['p90']:.0f}",
        ),
        ("images", f"{images['understood']:,} understood, {images['drawn']:,} drawn"),
        ("text tokenizer", f"sha256 {found['text_tokenizer']}"),
    ]
    if found["image_tokenizer"]:
        entry = found["image_tokenizer"]
        sizes = f"{entry['num_tokens']} of {entry['codebook_size']} codes at {entry['image_size']} px"
        rows.append(("image tokenizer", f"{sizes}, sha256 {entry['digest']}"))
    rows += _more_rows(found)
    if found["template"]:
        rows.append(("template", found["template"]))
    rejects = ", ".join(f"{reason} {count:,}" for reason, count in found["rejects"].items())
    rows.append(("left out", rejects or "nothing"))
    lines = [f"{name:<16}{value}" for name, value in rows]
    lines += ["", "text tokens per sample"]
    most = max(count for *_, count in tokens["histogram"])
    for first, last, count in tokens["histogram"]:
        bar = "#" * max(1, round(_BAR_WIDTH * count / most)) if count else ""
        lines.append(f"{f'{first} - {last}':>16}  {count:>10,}  {bar}")
    lines += ["", "members of the first sample or record"]
    lines += [f"  .{name:<14}{size:>10,} bytes" for name, size in found["members"].items()]
    return [*lines, "", *(f"example: {json.dumps(example, ensure_ascii=False)}" for example in found["examples"])]


def _more_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Images, captions, uids, facts and masks."""
    images = found["images"]
    rows = [("", "per sample: " + ", ".join(f"{n} in {count:,}" for n, count in images["per_sample"].items()))]
    if "distinct" in images:
        captions = ", ".join(f"{n} of {count:,}" for n, count in images["captions_per_image"].items())
        crops = f"crops of each: {images['crops_per_image']}"
        rows.append(("", f"{images['distinct']:,} distinct, captions: {captions}; {crops}"))
    rows.append(("repeated uids", f"{found['duplicate_uids']:,}"))
    for name, column in found["meta"].items():
        told = f"{column['known']:,} known" if "known" in column else column["unusable"]
        if "min" in column:
            told += f", {column['min']:g} to {column['max']:g}, half below {column['median']:g}"
        elif "values" in column:
            told += f", {column['values']} different"
        rows.append((f"fact {name}", told))
    for name, mask in found["masks"].items():
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in mask.get("reasons", {}).items())
        told = f"leaves out {mask['left_out']:,} ({reasons or 'no reason given'})" if "left_out" in mask else ""
        rows.append((f"mask {name}", told or mask["unusable"]))
    return rows


def _histogram(tokens: np.ndarray) -> list[tuple[int, int, int]]:
    """(first, last, samples) in bins that double: 0, 1, 2-3, 4-7, ..."""
    bins = np.frexp(tokens.astype(np.float64))[1]  # 0 for 0, k + 1 for 2^k ... 2^(k+1) - 1
    counts = np.bincount(bins)
    first_bin = int(bins.min())
    return [((1 << k) >> 1, max((1 << k) - 1, 0), int(counts[k])) for k in range(first_bin, len(counts))]


def _members(source: Source) -> dict[str, int]:
    """Names (after the key) and bytes of the members that make the first WebDataset sample."""
    members: dict[str, int] = {}
    first_key = None
    path = source.shard_path(0)
    with path.open("rb") as tar:
        for entry in walk_tar(tar, path.stat().st_size):
            cut = split_name(entry.name) if isinstance(entry, Entry) and entry.is_file else None
            if cut is None or not isinstance(entry, Entry):
                continue
            first_key = first_key or cut[0]
            if cut[0] != first_key:
                break
            members[cut[1]] = entry.size
    return members


def _example(source: Source, i: int) -> dict[str, Any]:
    """A sample in short; pictures are named, not decoded."""
    reader = SampleReader(source, ImageGeometry())
    shard, _ = source.place_of(i)
    place = {"sample": i, "shard": source.manifest.shards[shard].name, "offset": int(source.offset[i])}
    if source.kind == "interleaved" and source.manifest.layout == "records":
        document = json.loads(bytes(reader.members(i)["doc.json"]))
        return {"uid": source.uid(i), **place, "id": document.get("id"), "seq": document["seq"]}
    if source.manifest.layout == "pairs":
        members = reader.members(i)
        texts = {
            name: bytes(content[:2000]).decode("utf-8", "replace")
            for name, content in members.items()
            if last_extension(name) in TEXTS | JSONS
        }
        return {"uid": source.uid(i), **place, "members": {name: len(members[name]) for name in members}, **texts}
    sample = reader.read(i)
    if sample.image_ids is not None and sample.caption_ids is not None:
        return {
            "uid": sample.uid,
            **place,
            "caption_ids": sample.caption_ids[:16].tolist(),
            "image_ids": sample.image_ids[:16].tolist(),
        }
    ids = sample.segments[0].text_ids
    return {"uid": sample.uid, **place, "text_ids": [] if ids is None else ids[:32].tolist()}
