"""Pictures as they came, found by the uid of a drawing in shards of documents that hold the same names."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.explain.vq_check import first_picture
from data_pipeline.images import ImageError, decode_image
from data_pipeline.manifest import MANIFEST_NAME, Source, open_source
from data_pipeline.masks.lookup import UidIndex
from data_pipeline.spec import ImageGeometry
from data_pipeline.stream.read import SampleReader
from data_pipeline.uid import uid_words

MAX_SAMPLES = 5_000_000
"""Larger sources are not sorted by uid for a page."""


class Originals:
    """Looks pictures up in sources of documents."""

    def __init__(self, sources: Iterable[Source]) -> None:
        """Sources of other kinds, and very large ones, are left out."""
        self._sources = [s for s in sources if s.kind == "interleaved" and len(s) <= MAX_SAMPLES]
        self._indices = [UidIndex(source.uids) for source in self._sources]

    def find(self, uid: str) -> np.ndarray | None:
        """uint8 [3, height, width] of the first document of that uid with a single picture; None where none has one."""
        words = uid_words([uid])
        for source, index in zip(self._sources, self._indices, strict=True):
            for sample in index.find(words)[1].tolist():
                # With several pictures in a document its uid does not say which one was drawn.
                if int(source.num_und_images[sample]) != 1:
                    continue
                try:
                    content = first_picture(SampleReader(source, ImageGeometry()), sample)
                    return None if content is None else decode_image(content).transpose(2, 0, 1)
                except (UserError, ImageError):
                    continue
        return None


def open_originals(paths: Iterable[str | Path], others: Iterable[Source] = ()) -> Originals:
    """Sources of documents by their directories, and some that are open already.

    Raises:
        UserError: A directory holds no shards of documents.
    """
    sources = list(others)
    for path in paths:
        if not (Path(path) / MANIFEST_NAME).is_file():
            raise UserError(f"{path}: holds no {MANIFEST_NAME}; give a directory of shards of documents")
        source = open_source(path)
        if source.kind != "interleaved":
            raise UserError(f"{path}: is of kind {source.kind} and holds no pictures; give shards of documents")
        sources.append(source)
    return Originals(sources)
