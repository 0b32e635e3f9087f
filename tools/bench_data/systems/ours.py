"""This project, through its public functions: prepare, plan, rows, loader, reader.

Variants of the token pass: by default rows as numpy (`RowDataset`), which is what the others' samples are compared
with, although rows are packed, labelled and checked against their crc32 besides; `loader` goes through torch's
DataLoader and collates batches of 8 rows. Decoded documents are not cached, and the plan is compiled within the
measured time.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.files import sha256_of
from data_pipeline.manifest import open_source
from data_pipeline.plan.open import OpenData, open_data
from data_pipeline.prepare.interleaved import prepare_interleaved
from data_pipeline.prepare.options import PrepareOptions
from data_pipeline.prepare.t2i import prepare_t2i
from data_pipeline.prepare.text import prepare_text
from data_pipeline.spec import DataSpec, ImageGeometry, RatioUnit, SourceSpec, Task
from data_pipeline.stream.dataset import RowDataset
from data_pipeline.stream.loader import batch_hash, build_loader
from data_pipeline.stream.read import SampleReader
from data_pipeline.text.load import load_text_tokenizer
from tools.bench_data.raw import CODEBOOK, NUM_IDS, PICTURE_SIZE
from tools.bench_data.systems.interface import ROW_TOKENS, SAMPLES_PER_SHARD, System, Tokens
from tools.bench_data.systems.pillow_way import SIZE

ROWS = 8
"""Rows of a global batch."""

_GEOMETRY = ImageGeometry(generation_size=PICTURE_SIZE, generation_tokens=NUM_IDS, codebook_size=CODEBOOK)
_PHOTOS = ImageGeometry(understanding_size=SIZE)
_OPTIONS = PrepareOptions(samples_per_shard=SAMPLES_PER_SHARD)


class LookedUpIds:
    """Stands in for an image tokenizer: the first pixel of a picture says which row of ids it has."""

    image_size = PICTURE_SIZE
    num_tokens = NUM_IDS
    codebook_size = CODEBOOK

    def __init__(self, path: Path) -> None:
        self.digest = sha256_of(path)
        self._ids = np.load(path, mmap_mode="r")

    def encode(self, images: np.ndarray) -> np.ndarray:
        """uint16 [n, 576] of uint8 [n, 3, 16, 16]."""
        pixel = images[:, :, 0, 0].astype(np.int64)
        return np.asarray(self._ids[(pixel[:, 0] << 16) + (pixel[:, 1] << 8) + pixel[:, 2]])


class _Pass:
    """One epoch, as nearly as whole windows of the plan allow; nothing is compiled yet."""

    def __init__(self, data: OpenData, variant: str) -> None:
        self.data = data
        self.variant = variant
        total = sum(int(source.lengths.sum(dtype=np.int64)) for source in data.plan.sources)
        self.num_windows = max(total // (ROW_TOKENS * data.plan.window_rows), 1)
        self.num_rows = self.num_windows * data.plan.window_rows


class Ours(System):
    """janus_mega's data side."""

    packages = ("janus-mega", "simplejpeg", "sentencepiece")

    def convert_tokens(self, raw: Path, root: Path) -> None:
        """Prepares the drawings and the texts; both are tokenized on the way."""
        tokenizer = load_text_tokenizer(raw / "tokenizer.model")
        ids = LookedUpIds(raw / "image_ids.npy")
        prepare_t2i([raw / "captions.jsonl"], root / "drawings", tokenizer, ids, options=_OPTIONS)
        prepare_text([raw / "text.jsonl"], root / "texts", tokenizer, options=_OPTIONS)

    def convert_photos(self, photos: Path, root: Path) -> None:
        """Prepares documents of a photo and its caption, after checking that every photo decodes."""
        lines = (photos / "captions.jsonl").read_text(encoding="utf-8").splitlines()
        records = [
            {"id": one["id"], "segments": [{"image": one["image"]}, {"text": one["caption"]}]}
            for one in map(json.loads, lines)
        ]
        documents = photos / "documents.jsonl"
        documents.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        tokenizer = load_text_tokenizer(photos.parent / "tokenizer.model")
        prepare_interleaved([documents], root, tokenizer, options=_OPTIONS)

    def index_bytes(self, root: Path) -> int:
        """index/ and janus.json."""
        return sum(path.stat().st_size for path in root.rglob("*") if path.is_file() and path.suffix != ".tar")

    def open_tokens(self, root: Path, variant: str) -> _Pass:
        """A plan over one epoch of both sources, mixed by samples as they lie in the peers' files."""
        return _Pass(_open(root), variant)

    def pass_over(self, opened: _Pass) -> dict[str, Any]:
        """Reads every row, compiling the plan on the way; what was in them is counted afterwards, see `count`."""
        if opened.variant == "plan":
            for number in range(opened.num_windows):
                opened.data.plan.window(number)
        elif opened.variant == "loader":
            steps = build_loader(opened.data, micro_batch_size=ROWS, num_steps=opened.num_rows // ROWS)
            for step in steps:
                assert step[0]["input_ids"].shape == (ROWS, ROW_TOKENS)
        else:
            rows = RowDataset(opened.data)
            for first in range(0, opened.num_rows, ROWS):  # as the loader asks for them
                micro_batch = rows.micro_batch(range(first, first + ROWS))
                assert micro_batch.arrays["input_ids"].shape == (ROWS, ROW_TOKENS)
        return {}

    def count(self, root: str) -> dict[str, Any]:
        """Samples, stored ids and share of padding of the rows that a pass reads."""
        opened = self.open_tokens(Path(root), "")
        added = [_added_tokens(opened.data, number) for number in range(len(opened.data.sources))]
        samples = ids = filled = 0
        for row_no in range(opened.num_rows):
            for document in opened.data.plan.row(row_no):
                length = document.stop - document.start
                samples += 1
                filled += length
                ids += length - added[document.source_no]
        return {"samples": samples, "ids": ids, "padding": 1 - filled / (opened.num_rows * ROW_TOKENS)}

    def tokens(self, opened: Any) -> Iterator[Tokens]:
        """Samples as stored, in order: for the check that all systems hold the same."""
        for name in ("drawings", "texts"):
            reader = _reader(opened / name, _GEOMETRY)
            for number in range(len(reader.source)):
                yield _ids_of(reader, number)

    def sums(self, root: Path) -> list[int]:
        """Samples, ids and the sum of all ids."""
        counted = np.array([[1, len(i) + len(t), np.sum(i, dtype=np.int64) + t.sum()] for i, t in self.tokens(root)])
        return [int(total) for total in counted.sum(axis=0)]

    def photos(self, root: Path, variant: str) -> Iterator[np.ndarray]:
        """Photos in random order, read, checked, decoded and resized."""
        reader = _reader(root, _PHOTOS)
        for number in np.random.default_rng(0).permutation(len(reader.source)).tolist():
            yield reader.read(number).images[0]

    def open_reader(self, root: Path) -> Callable[[int], Tokens]:
        """By number, drawings first, then texts; every read is checked against its crc32."""
        drawings, texts = _reader(root / "drawings", _GEOMETRY), _reader(root / "texts", _GEOMETRY)
        border = len(drawings.source)

        def read(number: int) -> Tokens:
            return _ids_of(drawings, number) if number < border else _ids_of(texts, number - border)

        return read

    def first_batch(self, root: Path) -> int:
        """Opens sources, compiles the plan, and takes the first batch of a loader."""
        step = next(iter(build_loader(_open(root), micro_batch_size=ROWS, num_steps=1)))
        return int(step[0]["input_ids"].shape[0])

    def save(self, root: Path, state: Path, num_batches: int) -> list[str]:
        """Saves the number of the step and the plan's cursor as JSON, as checkpoints do."""
        data = _open(root)
        steps = iter(build_loader(data, micro_batch_size=ROWS, num_steps=num_batches + 3))
        for _ in range(num_batches):
            next(steps)
        position = {"step": num_batches, "cursor": data.plan.cursor_at(num_batches)}
        state.write_text(json.dumps(position), encoding="utf-8")
        return [batch_hash(step) for step in steps]

    def restore(self, root: Path, state: Path) -> Iterator[str]:
        """A new loader from the saved step on."""
        position = json.loads(state.read_text(encoding="utf-8"))
        data = _open(root)
        data.plan.restore(position["cursor"])
        for step in build_loader(data, micro_batch_size=ROWS, first_step=position["step"], num_steps=3):
            yield batch_hash(step)

    def drawing_bytes(self, root: str) -> dict[str, float]:
        """Bytes on disk per drawing, index and tar headers included: in all, and without the ids of captions."""
        place = Path(root) / "drawings"
        source = open_source(place)
        size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
        captions = source.manifest.num_text_tokens * np.dtype(source.manifest.token_dtype).itemsize
        return {"all": size / len(source), "ids": (size - captions) / len(source)}

    def limits(self, root: str, photos: list[str]) -> dict[str, Any]:
        """What the machine can do at best; see `limits`."""
        from tools.bench_data import limits

        return limits.measure(Path(root), [Path(one) for one in photos])

    def encoding(self, photos: str, scratch: str, count: int) -> dict[str, Any]:
        """The image tokenizer alone and inside prepare; see `encoding`."""
        from tools.bench_data import encoding

        return encoding.measure(Path(photos), Path(scratch), count)


def _open(root: Path) -> OpenData:
    raw = root.parent / "raw"
    drawings, texts = root / "drawings", root / "texts"
    spec = DataSpec(
        sources={
            "drawings": SourceSpec(path=str(drawings), task=Task.generation, weight=len(open_source(drawings))),
            "texts": SourceSpec(path=str(texts), task=Task.text, weight=len(open_source(texts))),
        },
        text_tokenizer=str(raw / "tokenizer.model"),
        geometry=_GEOMETRY,
        ratio_unit=RatioUnit.samples,
        seq_len=ROW_TOKENS,
        cache_mib=0,
        window_rows=_window_rows(drawings, texts),
    )
    return open_data(spec, load_text_tokenizer(raw / "tokenizer.model"), global_batch_size=ROWS)


def _window_rows(*places: Path) -> int:
    """The default, or less where an epoch is shorter."""
    manifests = [open_source(place).manifest for place in places]
    stored = sum(one.num_text_tokens + one.num_gen_images * NUM_IDS for one in manifests)
    return min(DataSpec().window_rows, max(stored // ROW_TOKENS // ROWS, 1) * ROWS)


def _added_tokens(data: OpenData, number: int) -> int:
    """Tokens that a document of a source has besides its stored ids: special tokens and the dialogue around."""
    source = data.sources[number]
    stored = int(source.num_text_tokens[0]) + int(source.num_gen_images[0]) * NUM_IDS
    return int(data.builder.document_lengths(source)[0]) - stored


def _reader(path: Path, geometry: ImageGeometry) -> SampleReader:
    return SampleReader(open_source(path), geometry)


def _ids_of(reader: SampleReader, number: int) -> tuple[np.ndarray, np.ndarray]:
    sample = reader.read(number)
    if sample.image_ids is not None:
        assert sample.caption_ids is not None
        return sample.image_ids, sample.caption_ids
    text_ids = sample.segments[0].text_ids
    assert text_ids is not None
    return np.empty(0, np.int32), text_ids


SYSTEM = Ours()
