"""Files in and out of `janus-mega generate`: pictures to look at, pictures that were drawn."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.errors import UserError
from data_pipeline.images import ImageError, decode_image, understanding_view
from janus_mega.infer.model import InferenceModel
from janus_mega.observe.progress import Progress


def draw_captions(
    model: InferenceModel,
    captions: Sequence[str],
    out: Path,
    *,
    guidance_scale: float,
    temperature: float,
    seed: int,
) -> Iterator[Path]:
    """Draws one picture per caption and yields where it was written."""
    with Progress("drawing", len(captions)) as progress:
        _, pictures = model.draw(
            captions, guidance_scale=guidance_scale, temperature=temperature, seed=seed, on_done=progress.advance
        )
    out.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(pictures):
        path = out / f"{number:04d}.png"
        Image.fromarray(picture.transpose(1, 2, 0)).save(path)
        yield path


def write_answer(
    model: InferenceModel,
    question: str | None,
    beginning: str | None,
    images: Sequence[Path],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> str:
    """Returns the answer to a question about pictures, or the continuation of pictures and a text."""
    size = model.trained.model.understanding.image_size
    pictures = [_read_picture(path, size) for path in images]
    if question is not None:
        prompt = model.question(question, pictures)
    else:
        prompt = model.beginning([*pictures, beginning or ""])
    return model.generate_text([prompt], max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)[0]


def _read_picture(path: Path, size: int) -> np.ndarray:
    try:
        return understanding_view(decode_image(path.read_bytes()), size)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the path of a picture") from error
    except ImageError as error:
        raise UserError(f"{path}: {error}; give a JPEG, PNG or WebP picture") from error
