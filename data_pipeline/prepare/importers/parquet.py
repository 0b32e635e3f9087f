"""Parquet: one record a row. Only columns that some form of record knows are read, and only the row groups of a task.

Pictures may be bytes in the row (a binary column, or Hugging Face's struct of bytes and path) or paths.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError
from data_pipeline.pairs import PICKLED_EXTENSIONS
from data_pipeline.prepare.importers.pictures import Inside, Pictures
from data_pipeline.prepare.importers.record import Record
from data_pipeline.prepare.importers.shapes import CAPTION_COLUMNS, TEXT_COLUMNS, Shapes

_ROWS_AT_A_TIME = 64
_BUFFER_BYTES = 1 << 20
"""Columns are read through buffers of this size: row groups of pictures have hundreds of megabytes."""
_OTHER_COLUMNS = (
    *("id", "uid", "url", "license", "sha256", "language", "lang", "LANGUAGE", "meta", "system"),
    *("segments", "conversation", "conversations", "messages"),
    *("question", "answer", "answers", "multiple_choice_answer", "question_id"),
    *("images", "texts", "general_metadata", "text_list", "image_info"),
)


@dataclass(slots=True)
class Table:
    """One .parquet."""

    path: Path
    name: str
    """What its records are named after."""
    shapes: Shapes
    pictures: Pictures
    """Where pictures lie that are given by path."""
    _group_sizes: tuple[int, ...] = ()
    _columns: tuple[str, ...] = ()

    def files(self) -> list[Path]:
        """See Part."""
        return [self.path]

    def count(self) -> int:
        """See Part."""
        if not self._columns:
            with self._open() as file:
                groups = range(file.metadata.num_row_groups)
                self._group_sizes = tuple(file.metadata.row_group(group).num_rows for group in groups)
                self._columns = self._wanted(file.schema_arrow.names)
        return sum(self._group_sizes)

    def read(self, start: int, stop: int) -> Iterator[Record]:
        """See Part."""
        self.count()
        first = 0
        with self._open() as file:
            for group, size in enumerate(self._group_sizes):
                if first < stop and start < first + size:
                    yield from self._read_group(file, group, range(first, first + size), range(start, stop))
                first += size

    def _read_group(self, file: Any, group: int, rows: range, wanted: range) -> Iterator[Record]:
        """The wanted rows of one group."""
        import pyarrow

        at = rows.start
        batches = file.iter_batches(_ROWS_AT_A_TIME, row_groups=[group], columns=list(self._columns))
        while at < min(rows.stop, wanted.stop):
            try:
                batch = next(batches)
                skip, end = max(wanted.start - at, 0), min(wanted.stop - at, batch.num_rows)
                values = batch.slice(skip, max(end - skip, 0)).to_pylist()
            except (pyarrow.ArrowException, OSError, StopIteration, ValueError) as error:
                raise UserError(f"{self.path}: damaged Parquet file ({error}); copy it again") from error
            for number, row in enumerate(values, start=at + skip):
                yield self._record(number, row)
            at += batch.num_rows

    def _record(self, number: int, row: dict[str, Any]) -> Record:
        contents: dict[str, bytes] = {}
        row = {name: value for name, value in row.items() if value is not None}
        for name in (*self.shapes.image_columns(), "images"):
            if name in row:
                row[name] = _lifted(row[name], name, contents)
        pictures = Inside(contents, self.pictures)
        parse = partial(self.shapes.canonical, pictures=pictures)
        place, name = f"{self.path}: row {number}", f"{self.name}:{number}"
        return Record(place, name, row, parse, pictures, self.path if contents else self.path.parent)

    def _wanted(self, names: list[str]) -> tuple[str, ...]:
        """Columns to read.

        Raises:
            UserError: A column is named that is not there, none is known, or one holds pickles.
        """
        options = self.shapes.options
        for name in names:
            if name.rpartition(".")[2] in PICKLED_EXTENSIONS and "." in name:
                raise UserError(f"{self.path}: column {name!r} holds pickles, which are never opened; drop the column")
        for name in (options.text_column, options.caption_column, options.image_column):
            if name and name not in names:
                raise UserError(f"{self.path}: no column {name!r}; it has {', '.join(names)}")
        known = (*TEXT_COLUMNS, *CAPTION_COLUMNS, *self.shapes.image_columns(), *_OTHER_COLUMNS, *options.keep_columns)
        given = (options.text_column, options.caption_column, options.image_column)
        wanted = tuple(name for name in names if name in known or name in given)
        if not wanted:
            raise UserError(
                f"{self.path}: no column of a known name; it has {', '.join(names)}; name the right ones with "
                "--text-column, --caption-column, --image-column"
            )
        return wanted

    def _open(self) -> Any:
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError as error:
            raise UserError(f"{self.path}: Parquet needs the package pyarrow; pip install pyarrow") from error
        try:
            return parquet.ParquetFile(self.path, pre_buffer=False, buffer_size=_BUFFER_BYTES)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{self.path}: no readable Parquet file ({error}); copy it again") from error


def _lifted(value: Any, name: str, contents: dict[str, bytes]) -> Any:
    """A picture or list of such by names; bytes go into `contents`."""
    if isinstance(value, list):
        return [_lifted(item, f"{name}.{number}", contents) for number, item in enumerate(value)]
    path = None
    if isinstance(value, dict):
        value, path = value.get("bytes"), value.get("path")
    if isinstance(value, bytes):
        key = path if isinstance(path, str) and path not in contents and path else name
        contents[key] = value
        return key
    return path if value is None else value
