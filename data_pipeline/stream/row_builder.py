"""Planned rows to micro-batches: the hot path, a few microseconds a document.

What a document is, `dialogue.DialogueBuilder.build_document` says; text and drawings, which are most documents of most
runs, get the same positions filled without being built (`fill`). Documents with pictures and whatever does not match
its checksum take the plain way, one at a time (`documents`); it says what is wrong with a broken sample, and such a one
becomes a hole of its planned length.
"""

from collections.abc import Sequence

import numpy as np

from data_pipeline.errors import BrokenSample
from data_pipeline.plan.open import OpenData
from data_pipeline.plan.plan import PlannedDocument, PlannedRows
from data_pipeline.schema import Hole
from data_pipeline.stream.canvas import Canvas, Layout, Rows
from data_pipeline.stream.documents import DocumentReader
from data_pipeline.stream.fill import DrawingFiller, Filler, TextFiller


class RowBuilder:
    """Builds micro-batches of the rows of a plan."""

    def __init__(self, data: OpenData) -> None:
        self.documents = DocumentReader(data)
        """The plain way."""
        self._data = data
        # Ids that are stored in 32 bits, because the vocabulary is large, take as many while they are read.
        is_narrow = all(source.manifest.token_dtype == "<u2" for source in data.sources)
        token_dtype = np.dtype("<u2" if is_narrow else "<i4")
        self._layout = Layout(data.plan.seq_len, data.builder.ids.pad, token_dtype)
        self._fillers = [self._filler(number) for number in range(len(data.sources))]

    def _filler(self, source_no: int) -> Filler | None:
        """The short way for documents of a source, if there is one."""
        reader, task = self.documents.readers[source_no], self.documents.tasks[source_no]
        seq_len = self._layout.seq_len
        if np.dtype(reader.source.manifest.token_dtype).itemsize != self._layout.token_dtype.itemsize:
            return None
        if reader.source.kind == "text":
            return TextFiller(reader.files, self._data.builder, task, seq_len)
        if reader.source.kind == "t2i":
            return DrawingFiller(reader.files, self._data.builder, self.documents.choices, task, seq_len)
        return None

    def build(self, row_nos: Sequence[int]) -> Rows:
        """Reads and assembles rows.

        Raises:
            UserError: A shard is missing or cannot be read.
        """
        planned = self._data.plan.rows(row_nos)
        canvas = Canvas(planned, self._layout)
        for source_no, filler in enumerate(self._fillers):
            chosen = np.flatnonzero(planned.source_no == source_no)
            if len(chosen):
                plainly = chosen.tolist() if filler is None else filler.fill(canvas, chosen)
                for number in plainly:
                    self._fill_plainly(canvas, number)
        holes = [self._hole(row_nos, planned, number, error) for number, error in sorted(canvas.broken.items())]
        return Rows(canvas.finish(self._data.spec.geometry.understanding_size), tuple(holes))

    def _fill_plainly(self, canvas: Canvas, number: int) -> None:
        try:
            canvas.put(number, self.documents.read(_document(canvas.planned, number)))
        except BrokenSample as error:
            canvas.dig_hole(number, error)

    def _hole(self, row_nos: Sequence[int], planned: PlannedRows, number: int, error: BrokenSample) -> Hole:
        plan = self._data.plan
        row = int(row_nos[int(np.searchsorted(planned.row_start, number, "right")) - 1])
        return Hole(
            source=plan.sources[int(planned.source_no[number])].name,
            shard=error.shard,
            offset=error.offset,
            uid=error.uid,
            row=row,
            step=row // plan.global_batch_size + 1,
            reason=error.reason,
            message=str(error),
        )


def _document(planned: PlannedRows, number: int) -> PlannedDocument:
    start = int(planned.start[number])
    return PlannedDocument(
        int(planned.source_no[number]),
        int(planned.sample_no[number]),
        int(planned.epoch[number]),
        start,
        start + int(planned.length[number]),
    )
