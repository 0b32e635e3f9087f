"""Digests of what samples hold: text, pictures, image ids. Two samples of one digest are the same to a model.

Texts and drawings are first compared by the crc32 and lengths of the index, which costs no read: only samples that
agree there with another are read and hashed.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.errors import BrokenSample
from data_pipeline.manifest import Source
from data_pipeline.masks.classes import classes_of_rows
from data_pipeline.masks.passes import Progress, over_samples
from data_pipeline.masks.pictures import sample_pictures
from data_pipeline.pairs import pair_caption, parse_facts
from data_pipeline.stream.read import SampleReader

_Words = tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class Contents:
    """Digests of samples."""

    words: np.ndarray
    """uint64 [n, 2]: half of a sha256, 0 where nothing is compared."""
    comparable: np.ndarray
    """bool [n]: False where the sample is damaged, or known to be like no other."""
    num_damaged: int


def sample_contents(
    source: Source, among: Sequence[Source], workers: int = 1, progress: Progress | None = None
) -> Contents:
    """Digests of whole samples: their text and their pictures.

    Args:
        source: Whose samples.
        among: All sources that will be compared, this one among them.
        workers: Processes.
        progress: Called as samples are done.
    """
    numbers = np.arange(len(source))
    if source.kind != "interleaved":
        numbers = _possible_duplicates(source, among)
    part = _contents(source, numbers, _hash_samples, workers, progress)
    words, comparable = np.zeros((len(source), 2), np.uint64), np.zeros(len(source), np.bool_)
    words[numbers], comparable[numbers] = part.words, part.comparable
    return Contents(words, comparable, part.num_damaged)


def drawing_contents(
    source: Source, numbers: np.ndarray, workers: int = 1, progress: Progress | None = None
) -> Contents:
    """Digests of the image ids of some drawings."""
    return _contents(source, numbers, _hash_drawings, workers, progress)


def _possible_duplicates(source: Source, among: Sequence[Source]) -> np.ndarray:
    """Samples whose crc32 and number of tokens another sample of the kind has too."""
    sources = [other for other in among if other.kind == source.kind]
    columns = [np.stack([other.crc, other.num_text_tokens], axis=1, dtype=np.int64) for other in sources]
    classes = classes_of_rows(np.concatenate(columns))
    start = 0
    for other in sources:
        if other is source:
            break
        start += len(other)
    return np.flatnonzero(np.bincount(classes)[classes[start : start + len(source)]] > 1)


def _contents(
    source: Source,
    numbers: np.ndarray,
    work: Callable[[SampleReader, list[int]], list[_Words]],
    workers: int,
    progress: Progress | None,
) -> Contents:
    found = [words for run in over_samples(source, numbers, work, workers, progress) for words in run]
    comparable = np.array([words is not None for words in found], np.bool_)
    words = np.array([words or (0, 0) for words in found], np.uint64).reshape(-1, 2)
    return Contents(words, comparable, int(np.count_nonzero(~comparable)))


def _hash_samples(reader: SampleReader, numbers: list[int]) -> list[_Words]:
    hashed = _hash_document if reader.source.kind == "interleaved" else _hash_ids
    return [_words_of(hashed, reader, number) for number in numbers]


def _hash_drawings(reader: SampleReader, numbers: list[int]) -> list[_Words]:
    return [_words_of(_hash_image_ids, reader, number) for number in numbers]


def _words_of(hashed: Callable[[SampleReader, int], bytes], reader: SampleReader, number: int) -> _Words:
    """Half a digest as two words, or None for a sample that cannot be read."""
    try:
        digest = hashed(reader, number)
    except (BrokenSample, KeyError, ValueError, TypeError):
        return None
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:16], "big")


def _hash_document(reader: SampleReader, number: int) -> bytes:
    """Over the segments of a document, or the texts beside a picture: what it is called is no part of it."""
    members = reader.members(number)
    digest = hashlib.sha256()
    if "doc.json" in members:
        for part in json.loads(bytes(members["doc.json"]))["seq"]:
            said = "image" if part["t"] == "image" else [part["n"], part["loss"], part.get("s", "")]
            digest.update(json.dumps(said).encode())
        digest.update(members["tok.npy"])
    else:
        facts = parse_facts(members["json"]) if "json" in members else {}
        digest.update(pair_caption(members.get("txt"), facts).encode())
    for picture in sample_pictures(members):
        digest.update(hashlib.sha256(picture).digest())
    return digest.digest()


def _hash_ids(reader: SampleReader, number: int) -> bytes:
    """Over the ids of a text, or of a drawing and its caption."""
    digest = hashlib.sha256(reader.source.manifest.text_tokenizer.encode())
    if reader.source.kind == "t2i":
        digest.update(_hash_image_ids(reader, number))
    sample = reader.read(number)
    for ids in (*(segment.text_ids for segment in sample.segments), sample.caption_ids):
        if ids is not None:
            digest.update(ids.tobytes())
    return digest.digest()


def _hash_image_ids(reader: SampleReader, number: int) -> bytes:
    """Over all crops of a drawing."""
    images = reader.source.manifest.image_tokenizer
    assert images is not None
    digest = hashlib.sha256(images.digest.encode())
    for variant in range(images.num_variants):
        ids = reader.read(number, variant).image_ids
        assert ids is not None
        digest.update(ids.tobytes())
    return digest.digest()
