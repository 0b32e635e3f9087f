"""Offline encoding: the image tokenizer's forward pass alone beside `prepare_t2i`, on the same photos and machine.

The tokenizer is untrained and narrower than the published one (32 channels instead of 128, same depth and grid): a
slower tokenizer hides whatever prepare adds, so the ratio here is lower than it would be at full width.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from tools.bench_data.clock import Stopwatch

_BATCH = 8


def measure(photos: Path, scratch: Path, count: int) -> dict[str, Any]:
    """Pictures per second of both, by processor time, and bytes on disk per picture."""
    from data_pipeline.images import decode_image, generation_view
    from data_pipeline.prepare.options import PrepareOptions
    from data_pipeline.prepare.t2i import prepare_t2i
    from data_pipeline.text.load import load_text_tokenizer

    tokenizer = _tokenizer()
    lines = (photos / "captions.jsonl").read_text(encoding="utf-8").splitlines()
    lines = [lines[number % len(lines)] for number in range(count)]
    contents = [(photos / json.loads(line)["image"]).read_bytes() for line in lines]
    pictures = np.stack([generation_view(decode_image(content), tokenizer.image_size) for content in contents])
    tokenizer.encode(pictures[:_BATCH])
    watch = Stopwatch()
    for start in range(0, count, _BATCH):
        tokenizer.encode(pictures[start : start + _BATCH])
    bare = watch.read()

    out = scratch / "encoded"
    shutil.rmtree(out, ignore_errors=True)
    records = photos / "to_encode.jsonl"
    records.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    text_tokenizer = load_text_tokenizer(photos.parent / "tokenizer.model")
    options = PrepareOptions(encode_batch_size=_BATCH)
    watch = Stopwatch()
    prepare_t2i([records], out, text_tokenizer, tokenizer, options=options)
    inside = watch.read()
    ids = np.dtype("<u2").itemsize * tokenizer.num_tokens
    return {"bare": count / bare["cpu_s"], "prepare": count / inside["cpu_s"], "id_bytes": ids}


def _tokenizer() -> Any:
    import torch

    from janus_mega.config.schema import ImageTokenizerConfig
    from janus_mega.models.vision.image_tokenizer import FrozenImageTokenizer
    from janus_mega.models.vision.vq import VqModel

    config = ImageTokenizerConfig(base_channels=32)
    torch.manual_seed(0)
    return FrozenImageTokenizer(VqModel(config), config, batch_size=_BATCH)
