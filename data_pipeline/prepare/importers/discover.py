"""From the paths a user gives to the readers of their formats."""

from collections.abc import Iterable
from pathlib import Path

from data_pipeline.errors import UserError
from data_pipeline.prepare.importers.lines import Lines, WholeFile
from data_pipeline.prepare.importers.pictures import Beside
from data_pipeline.prepare.importers.record import Chained, Part
from data_pipeline.prepare.importers.shapes import Shapes
from data_pipeline.prepare.importing import ImportOptions

_DOCUMENT_SUFFIXES = (".txt", ".md")
_SUFFIXES = (".jsonl", *_DOCUMENT_SUFFIXES)


def open_inputs(inputs: Iterable[str | Path], options: ImportOptions) -> Chained:
    """The records of the inputs.

    Raises:
        UserError: An input is missing, a directory holds none, or a file has another suffix.
    """
    return Chained([_part(path, options) for given in inputs for path in _files(Path(given))])


def _part(path: Path, options: ImportOptions) -> Part:
    if path.suffix in _DOCUMENT_SUFFIXES:
        return WholeFile(path)
    return Lines(path, Shapes(options), Beside(path.parent))


def _files(given: Path) -> list[Path]:
    if given.is_dir():
        found = sorted(path for path in given.rglob("*") if path.suffix in _SUFFIXES and path.is_file())
        if not found:
            raise UserError(
                f"{given}: no .jsonl, .txt or .md file below this directory; give files or another directory"
            )
        return found
    if not given.is_file():
        raise UserError(f"{given}: no such file or directory; check the path of the raw input")
    if given.suffix not in _SUFFIXES:
        raise UserError(
            f"{given}: inputs are .jsonl (one record a line) or .txt and .md (one document a file); rename it"
        )
    return [given]
