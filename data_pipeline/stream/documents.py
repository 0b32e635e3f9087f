"""The plain way to a planned document: read its sample, build it, cut its piece out.

Takes tens of microseconds a document and says exactly what is wrong with a broken one. Documents with pictures are kept
in memory where a source is small enough to be held whole: they come back every epoch, and decoding is most of their
cost. Text and drawings are not worth keeping, reading them is as quick.
"""

from typing import Any

import numpy as np

from data_pipeline.plan.open import OpenData
from data_pipeline.plan.plan import PlannedDocument
from data_pipeline.schema import Document, TaskId
from data_pipeline.stream.assemble import cut_document
from data_pipeline.stream.choices import Choices
from data_pipeline.stream.read import SampleReader
from data_pipeline.stream.shard_files import open_limit

_DOCUMENT_OVERHEAD_BYTES = 1500
"""Python objects and array headers of one document in the cache."""
_BYTES_PER_TOKEN = 10


class DocumentReader:
    """Builds documents of a plan one at a time."""

    def __init__(self, data: OpenData) -> None:
        self.choices = Choices(data.spec)
        self.readers = [SampleReader(source, data.spec.geometry, data.builder.tokenizer) for source in data.sources]
        """One per source of the plan."""
        for reader in self.readers:
            reader.files.limit = open_limit(len(self.readers))
        self.tasks = [TaskId[source.task.name] for source in data.plan.sources]
        self.cache: dict[tuple[int, int], Document] = {}
        self._cached_sources = _small_sources(data)
        self._builder = data.builder

    def __getstate__(self) -> dict[str, Any]:
        """The cache is left out: a worker fills its own."""
        return {**self.__dict__, "cache": {}}

    def read(self, planned: PlannedDocument) -> Document:
        """The document, or the piece of one, that a plan asks for.

        Raises:
            BrokenSample: It cannot be had, or is not as long as planned.
            UserError: Its shard is missing or cannot be read.
        """
        document = cut_document(self._whole(planned), planned.start, planned.stop)
        if len(document.input_ids) != planned.stop - planned.start:
            raise self.readers[planned.source_no].broken(
                planned.sample_no,
                "mismatch",
                f"its document has {len(document.input_ids)} tokens from {planned.start} on, the index promises "
                f"{planned.stop - planned.start}",
            )
        return document

    def _whole(self, planned: PlannedDocument) -> Document:
        key = (planned.source_no, planned.sample_no)
        document = self.cache.get(key)
        if document is None:
            reader = self.readers[planned.source_no]
            who = (reader.source, np.array([planned.sample_no]), np.array([planned.epoch]))
            sample = reader.read(planned.sample_no, int(self.choices.variant(*who)[0]))
            drop = bool(self.choices.drops_prompt(*who)[0])
            document = self._builder.build_document(sample, self.tasks[planned.source_no], drop)
            if planned.source_no in self._cached_sources:
                self.cache[key] = document
        return document


def _small_sources(data: OpenData) -> frozenset[int]:
    """Sources with pictures whose documents together fit into the cache, smallest first."""
    side = data.spec.geometry.understanding_size
    sizes = []
    for number, source in enumerate(data.plan.sources):
        images = int(source.num_images.sum(dtype="int64")) * 3 * side * side
        tokens = int(source.lengths.sum(dtype="int64")) * _BYTES_PER_TOKEN
        if data.sources[number].kind == "interleaved":
            sizes.append((images + tokens + len(source.lengths) * _DOCUMENT_OVERHEAD_BYTES, number))
    held, room = set(), data.spec.cache_mib << 20
    for size, number in sorted(sizes):
        if size <= room:
            held.add(number)
            room -= size
    return frozenset(held)
