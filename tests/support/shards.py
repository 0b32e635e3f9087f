"""Three small sources of shards in the real format, with a tokenizer trained on their texts."""

import io
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.dialogue import answer_text, caption_text, prompt_segments, question_pieces
from data_pipeline.manifest import ImageTokenizerEntry
from data_pipeline.plan.open import OpenData, open_data
from data_pipeline.prepare.directory import Facts, ShardDirectory
from data_pipeline.prepare.shard import FlatIds, ImageIds, ShardWriter, npy_bytes
from data_pipeline.spec import DataSpec, ImageGeometry, SourceSpec, Task, Template
from data_pipeline.text.interface import TextTokenizer
from data_pipeline.text.train import train_sentencepiece
from data_pipeline.uid import uid_text

GEOMETRY = ImageGeometry(
    understanding_size=16, understanding_tokens=16, generation_size=16, generation_tokens=16, codebook_size=256
)
SENTENCE = "the row of a step holds what every rank reads and no rank reads it twice in one epoch of the data"
WORDS = SENTENCE.split()
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@dataclass(frozen=True)
class TinyShards:
    """Where the sources are, and what opens them."""

    spec: DataSpec
    tokenizer: TextTokenizer

    def open(self, *, global_batch_size: int = 8, **changes) -> OpenData:
        return open_data(replace(self.spec, **changes), self.tokenizer, global_batch_size=global_batch_size)


def make_shards(root: Path, num_samples: int = 60, token_dtype: str = "<u2", num_variants: int = 1) -> TinyShards:
    """Writes text, question-answer and drawing shards (two tars each) below `root`.

    Text ids are stored as for a small or (<u4) a large vocabulary, each drawing as so many crops.
    """
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(WORDS, random.integers(3, 60))) for _ in range(num_samples)]
    texts[0] = " ".join(random.choice(WORDS, 900))
    (root / "text.txt").write_text("\n".join([*texts, *NUMBERS]), encoding="utf-8")
    tokenizer = train_sentencepiece([root / "text.txt"], 340, root / "text.model")
    _write_texts(root / "text", tokenizer, texts, token_dtype)
    _write_questions(root / "questions", tokenizer, random, num_samples, token_dtype)
    _write_drawings(root / "drawings", tokenizer, random, num_samples, token_dtype, num_variants)
    spec = DataSpec(
        sources={
            "text": SourceSpec(path=str(root / "text"), task=Task.text, weight=3),
            "questions": SourceSpec(path=str(root / "questions"), task=Task.understanding, weight=2),
            "drawings": SourceSpec(path=str(root / "drawings"), task=Task.generation, weight=5),
        },
        text_tokenizer=str(root / "text.model"),
        geometry=GEOMETRY,
        seq_len=192,
        window_rows=32,
        guidance_dropout=0.3,
    )
    return TinyShards(spec, tokenizer)


def _halves(path: Path, kind: str, tokenizer: TextTokenizer, num_samples: int, **facts):
    """Yields (writer, sample numbers) for the two shards of a source, then finishes the directory."""
    directory = ShardDirectory(path, {"written by": "a test"})
    for task, numbers in enumerate(np.array_split(np.arange(num_samples), 2)):
        writer = ShardWriter(directory.shard_path(task))
        yield writer, numbers.tolist()
        directory.commit(task, writer)
    directory.finish(2, Facts(kind=kind, text_tokenizer=tokenizer.digest, **facts))


def _write_texts(path: Path, tokenizer: TextTokenizer, texts: list[str], token_dtype: str) -> None:
    facts = {"token_dtype": token_dtype, "record_size": len(texts)}
    for writer, numbers in _halves(path, "text", tokenizer, len(texts), **facts):
        ids = FlatIds(token_dtype)
        for number in numbers:
            ids.append(tokenizer.encode(texts[number]))
        writer.add_record([uid_text(f"text {number}") for number in numbers], {}, ids)


def _write_drawings(
    path: Path, tokenizer: TextTokenizer, random: np.random.Generator, num_samples: int, token_dtype: str, crops: int
) -> None:
    entry = ImageTokenizerEntry(digest="0" * 64, image_size=16, num_tokens=16, codebook_size=256, num_variants=crops)
    facts = {"image_tokenizer": entry, "token_dtype": token_dtype, "record_size": num_samples}
    for writer, numbers in _halves(path, "t2i", tokenizer, num_samples, **facts):
        ids, rows = FlatIds(token_dtype), random.integers(0, 256, (len(numbers), crops * 16)).astype("<u2")
        for number in numbers:
            ids.append(tokenizer.encode(caption_text(f"the {NUMBERS[number % 10]}")))
        images = [ImageIds(row.tobytes(), at * row.nbytes, 0) for at, row in enumerate(rows)]
        uids = [uid_text(f"drawing {number}") for number in numbers]
        writer.add_record(uids, {"vq.npy": npy_bytes(rows)}, ids, images)


def _write_questions(
    path: Path, tokenizer: TextTokenizer, random: np.random.Generator, num_samples: int, token_dtype: str
) -> None:
    template = Template.deepseek
    facts = {"template": template.value, "token_dtype": token_dtype}
    for writer, numbers in _halves(path, "interleaved", tokenizer, num_samples, **facts):
        for number in numbers:
            num_images = 1 + number % 2
            pieces = question_pieces(template, "what does it hold", num_images)
            segments = prompt_segments(tokenizer, pieces)
            answer = tokenizer.encode(answer_text(" and ".join(random.choice(NUMBERS, num_images))))
            sequence, ids, members = [], [], {}
            for segment in segments:
                if segment.text_ids is None:
                    members[f"{segment.image}.png"] = _png(random)
                    sequence.append({"t": "image", "name": f"{segment.image}.png"})
                else:
                    sequence.append({"t": "text", "n": len(segment.text_ids), "loss": False})
                    ids += segment.text_ids.tolist()
            sequence.append({"t": "text", "n": len(answer), "loss": True})
            ids += answer
            members = {
                "doc.json": json.dumps({"seq": sequence}).encode(),
                "tok.npy": npy_bytes(np.array(ids, token_dtype)),
                **members,
            }
            writer.add_sample(uid_text(f"question {number}"), members, len(ids), num_images)


def _png(random: np.random.Generator) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(stream, "png")
    return stream.getvalue()
