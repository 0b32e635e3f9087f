"""How much of an image tokenizer's own speed is left when pictures are prepared: both are measured in one run.

The bare tokenizer encodes crops that lie ready in memory, in the same batches; prepare reads, decodes and crops the
same pictures, tokenizes captions, writes and hashes the shards besides. Bare passes stand before and after the prepare
pass, so a machine that slows down meanwhile does not flatter either.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data_pipeline.images import decode_image, generation_view
from data_pipeline.prepare.encoding import ImageTokenizer
from data_pipeline.prepare.options import PrepareOptions
from data_pipeline.prepare.records import open_records
from data_pipeline.prepare.t2i import prepare_t2i
from data_pipeline.text.interface import TextTokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodingSpeed:
    """Pictures per second, and what they take on disk."""

    num_images: int
    bare_s: float
    """The tokenizer alone, wall clock, mean of the passes before and after."""
    prepare_s: float
    """Everything, wall clock."""
    bare_cpu_s: float
    """Processor time of all threads."""
    prepare_cpu_s: float
    shard_bytes: int
    index_bytes: int

    @property
    def ratio(self) -> float:
        """Images per second of prepare over those of the bare tokenizer, by the wall clock."""
        return self.bare_s / self.prepare_s

    @property
    def cpu_ratio(self) -> float:
        """The same by processor time, which other programs on the machine disturb less."""
        return self.bare_cpu_s / self.prepare_cpu_s

    @property
    def bytes_per_image(self) -> float:
        """Of the shards, captions included."""
        return self.shard_bytes / self.num_images

    def lines(self) -> list[str]:
        """The figures as text."""
        count = self.num_images
        return [
            f"{count} images: {count / self.prepare_s:.2f} images/s prepared, {count / self.bare_s:.2f} by the bare "
            f"tokenizer: {self.ratio:.3f} by the wall clock, {self.cpu_ratio:.3f} by processor time",
            f"{self.bytes_per_image:.0f} bytes an image in the shards, {self.index_bytes / count:.0f} in the index",
        ]


def measure_encoding(
    inputs: list[Path],
    out: Path,
    text_tokenizer: TextTokenizer,
    image_tokenizer: ImageTokenizer,
    options: PrepareOptions | None = None,
) -> EncodingSpeed:
    """Prepares captioned pictures in this process and compares with the tokenizer alone.

    Args:
        inputs: As `prepare_t2i` takes them; every record must be usable, with one picture each.
        out: Directory to write, which must not exist.
        text_tokenizer: Of the captions.
        image_tokenizer: What is measured; it is warmed up first.
        options: Of prepare; one crop, one process.
    """
    options = replace(options or PrepareOptions(), workers=1, jobs=1, job=0, crops=1)
    source = open_records(inputs, options.importing)
    crops = np.stack(
        [
            generation_view(decode_image(record.picture(record.fields()["image"])), image_tokenizer.image_size)
            for record in source.read(0, source.count())
        ]
    )
    image_tokenizer.encode(crops[: options.encode_batch_size])

    def bare() -> None:
        for start in range(0, len(crops), options.encode_batch_size):
            image_tokenizer.encode(crops[start : start + options.encode_batch_size])

    before = _seconds(bare)
    prepared = _seconds(lambda: prepare_t2i(inputs, out, text_tokenizer, image_tokenizer, options=options))
    after = _seconds(bare)
    return EncodingSpeed(
        num_images=len(crops),
        bare_s=(before[0] + after[0]) / 2,
        prepare_s=prepared[0],
        bare_cpu_s=(before[1] + after[1]) / 2,
        prepare_cpu_s=prepared[1],
        shard_bytes=_bytes_below(out / "shards"),
        index_bytes=_bytes_below(out / "index"),
    )


def _seconds(call: Callable[[], object]) -> tuple[float, float]:
    """Wall clock and processor time of a call."""
    wall_s, cpu = time.perf_counter(), os.times()
    call()
    now = os.times()
    return time.perf_counter() - wall_s, (now.user - cpu.user) + (now.system - cpu.system)


def _bytes_below(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
