"""Rows built the plain way: one `build_document` after the other, packed by hand. What the hot path must equal."""

from data_pipeline.plan.open import OpenData
from data_pipeline.schema import PackedRow
from data_pipeline.stream.assemble import pack
from data_pipeline.stream.documents import DocumentReader


def plain_row(data: OpenData, row_no: int) -> PackedRow:
    """A row of a plan over whole shards."""
    reader = DocumentReader(data)
    return pack(
        [reader.read(planned) for planned in data.plan.row(row_no)],
        data.plan.seq_len,
        pad_id=data.builder.ids.pad,
        understanding_size=data.spec.geometry.understanding_size,
    )
