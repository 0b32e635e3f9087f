"""A map-style dataset of packed rows: row numbers in, rows out, nothing remembered that would change a row.

Any process gives the same row for the same number, so workers, ranks and restarts cannot matter. Rows are built a
micro-batch at a time (`micro_batch`), which shares work between them; one row alone is a micro-batch of one.
Torch-free: a row can be looked at where torch is not installed.
"""

from collections.abc import Sequence

import numpy as np

from data_pipeline.plan.open import OpenData
from data_pipeline.plan.plan import PlannedDocument
from data_pipeline.schema import PackedRow
from data_pipeline.stream.assemble import combine_digests, row_digest
from data_pipeline.stream.canvas import Rows
from data_pipeline.stream.row_builder import RowBuilder


class RowDataset:
    """Rows of a plan, read and assembled on demand."""

    def __init__(self, data: OpenData) -> None:
        self.data = data
        self.builder = RowBuilder(data)

    def micro_batch(self, row_nos: Sequence[int]) -> Rows:
        """Reads and assembles some rows; broken samples are holes in them.

        Raises:
            UserError: A shard is missing or cannot be read.
        """
        return self.builder.build(row_nos)

    def __getitem__(self, row_no: int) -> PackedRow:
        """Reads and assembles a row.

        Raises:
            UserError: As `micro_batch`.
        """
        rows = self.micro_batch([row_no])
        whole = ("cu_seqlens", "pixel_values")
        fields = {key: array if key in whole else array[0] for key, array in rows.arrays.items()}
        return PackedRow(**fields, holes=rows.holes)

    def step_hash(self, step: int) -> str:
        """Hash of a global batch; the same that the ranks of a run find together."""
        rows = range(step * self.data.plan.global_batch_size, (step + 1) * self.data.plan.global_batch_size)
        return combine_digests([row_digest(self[row_no]) for row_no in rows])

    def drops_prompt(self, planned: PlannedDocument) -> bool:
        """Whether guidance dropout takes the prompt: decided by (seed, uid, epoch) alone."""
        source = self.data.sources[planned.source_no]
        choices = self.builder.documents.choices
        return bool(choices.drops_prompt(source, np.array([planned.sample_no]), np.array([planned.epoch]))[0])
