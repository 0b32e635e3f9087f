"""What a directory of shards holds, told from its manifest and index; only a few samples are read, as examples."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.manifest import SAMPLE_COLUMNS, Source, open_source
from data_pipeline.spec import ImageGeometry
from data_pipeline.stream.read import SampleReader
from data_pipeline.tar_scan import scan_tar

_BAR_WIDTH = 40


def inspect_source(path: str | Path, num_examples: int = 3) -> dict[str, Any]:
    """Counts, histogram of text lengths, schema and first samples of a source; ready for JSON.

    Raises:
        UserError: The directory is missing, unfinished or damaged.
    """
    source = open_source(path)
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
        "index_bytes": sum(file.stat().st_size for file in (source.path / "index").glob("*.npy")),
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
        },
        "text_tokenizer": manifest.text_tokenizer,
        "image_tokenizer": json.loads(manifest.to_json())["image_tokenizer"],
        "template": manifest.template,
        "rejects": dict(manifest.rejects),
        "settings": dict(manifest.settings),
        "members": _members(source),
        "index": dict(SAMPLE_COLUMNS),
        "examples": [_example(source, i) for i in range(min(num_examples, source.num_samples))],
    }


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
    for member in scan_tar(source.shard_path(0)):
        key, name = member.name.split(".", 1)
        first_key = first_key or key
        if key != first_key:
            break
        members[name] = member.size
    return members


def _example(source: Source, i: int) -> dict[str, Any]:
    """A sample in short; pictures are named, not decoded."""
    reader = SampleReader(source, ImageGeometry())
    if source.kind == "interleaved":
        document = json.loads(bytes(reader.members(i)["doc.json"]))
        return {"uid": source.uid(i), "id": document.get("id"), "seq": document["seq"]}
    sample = reader.read(i)
    if sample.image_ids is not None and sample.caption_ids is not None:
        return {
            "uid": sample.uid,
            "caption_ids": sample.caption_ids[:16].tolist(),
            "image_ids": sample.image_ids[:16].tolist(),
        }
    ids = sample.segments[0].text_ids
    return {"uid": sample.uid, "text_ids": [] if ids is None else ids[:32].tolist()}
