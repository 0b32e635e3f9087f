"""A map-style dataset of packed rows: row number in, `PackedRow` out, nothing remembered that would change a row.

Any process gives the same row for the same number, so workers, ranks and restarts cannot matter. What is kept is only
a cache of decoded documents for sources small enough to be held whole: they come back every epoch, and decoding is
most of the cost of a row. Torch-free: a row can be looked at where torch is not installed.
"""

from typing import Any

from data_pipeline.plan.open import OpenData
from data_pipeline.plan.order import unit_interval
from data_pipeline.plan.plan import PlannedDocument
from data_pipeline.schema import Document, PackedRow, TaskId
from data_pipeline.spec import Task
from data_pipeline.stream.assemble import combine_digests, cut_document, pack, row_digest
from data_pipeline.stream.read import SampleReader

_DOCUMENT_OVERHEAD_BYTES = 1500
"""Python objects and array headers of one document in the cache."""
_BYTES_PER_TOKEN = 10


class RowDataset:
    """Rows of a plan, read and assembled on demand."""

    def __init__(self, data: OpenData) -> None:
        self.data = data
        self._readers = [SampleReader(source, data.spec.geometry) for source in data.sources]
        self._tasks = [TaskId[source.task.name] for source in data.plan.sources]
        self._cached_sources = _small_sources(data)
        self._cache: dict[tuple[int, int, bool], Document] = {}

    def __getstate__(self) -> dict[str, Any]:
        """The cache is left out: a worker fills its own."""
        return {**self.__dict__, "_cache": {}}

    def __getitem__(self, row_no: int) -> PackedRow:
        """Reads and assembles a row.

        Raises:
            UserError: A shard cannot be read or is damaged.
        """
        spec = self.data.spec
        return pack(
            [self._document(planned) for planned in self.data.plan.row(row_no)],
            spec.seq_len,
            pad_id=self.data.builder.ids.pad,
            understanding_size=spec.geometry.understanding_size,
        )

    def step_hash(self, step: int) -> str:
        """Hash of a global batch; the same that the ranks of a run find together."""
        rows = range(step * self.data.plan.global_batch_size, (step + 1) * self.data.plan.global_batch_size)
        return combine_digests([row_digest(self[row_no]) for row_no in rows])

    def drops_prompt(self, planned: PlannedDocument) -> bool:
        """Whether guidance dropout takes the prompt: decided by (seed, uid, epoch) alone."""
        rate = self.data.spec.guidance_dropout
        if rate <= 0 or self._tasks[planned.source_no] is not TaskId.generation:
            return False
        uid = self.data.sources[planned.source_no].uid(planned.sample_no)
        return unit_interval("guidance", self.data.spec.seed, uid, planned.epoch) < rate

    def _document(self, planned: PlannedDocument) -> Document:
        """The document, or the piece of one, that a plan asks for."""
        drop = self.drops_prompt(planned)
        key = (planned.source_no, planned.sample_no, drop)
        document = self._cache.get(key)
        if document is None:
            sample = self._readers[planned.source_no].read(planned.sample_no)
            document = self.data.builder.build_document(sample, self._tasks[planned.source_no], drop)
            if planned.source_no in self._cached_sources:
                self._cache[key] = document
        return cut_document(document, planned.start, planned.stop)


def _small_sources(data: OpenData) -> frozenset[int]:
    """Sources whose documents together fit into the cache, smallest first."""
    side = data.spec.geometry.understanding_size
    sizes = []
    for number, source in enumerate(data.plan.sources):
        images = int(source.num_images.sum(dtype="int64")) * 3 * side * side
        tokens = int(source.lengths.sum(dtype="int64")) * _BYTES_PER_TOKEN
        # A drawing may be kept with and without its prompt.
        versions = 2 if source.task is Task.generation and data.spec.guidance_dropout > 0 else 1
        sizes.append((versions * (images + tokens + len(source.lengths) * _DOCUMENT_OVERHEAD_BYTES), number))
    held, room = set(), data.spec.cache_mib << 20
    for size, number in sorted(sizes):
        if size <= room:
            held.add(number)
            room -= size
    return frozenset(held)
