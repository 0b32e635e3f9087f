"""From the paths a user gives to the readers of their formats."""

from collections.abc import Iterable
from pathlib import Path

from data_pipeline.errors import UserError
from data_pipeline.pairs import PICKLED_EXTENSIONS
from data_pipeline.prepare.importers.array import Array, array_name
from data_pipeline.prepare.importers.folder import PICTURE_SUFFIXES, Folder
from data_pipeline.prepare.importers.lines import Lines, WholeFile
from data_pipeline.prepare.importers.parquet import Table
from data_pipeline.prepare.importers.pictures import Beside
from data_pipeline.prepare.importers.record import Chained, Part
from data_pipeline.prepare.importers.shapes import Shapes
from data_pipeline.prepare.importers.store import NameTable, open_store, pictures_beside
from data_pipeline.prepare.importers.tars import PairTar
from data_pipeline.prepare.importers.vqa_pair import QuestionsAndAnswers
from data_pipeline.prepare.importing import Format, ImportOptions
from data_pipeline.prepare.meta import check_columns

_KINDS = {".jsonl": "lines", ".json": "json", ".parquet": "parquet", ".tar": "tar", ".txt": "text", ".md": "text"}
_OF_FORMAT = {
    Format.jsonl: ("lines", "json"),
    Format.text: ("text", "lines", "json", "parquet"),
    Format.parquet: ("parquet",),
    Format.img2dataset: ("tar",),
    Format.obelics: ("parquet", "lines"),
    Format.mmc4: ("lines",),
    Format.llava: ("json", "lines", "parquet"),
    Format.vqa: ("json", "lines", "parquet"),
}
"""Which files a named format takes; `auto` takes all."""


def open_inputs(inputs: Iterable[str | Path], options: ImportOptions) -> Chained:
    """The records of the inputs.

    Raises:
        UserError: An input is missing, a directory holds none or several kinds, or a file is of no known format.
    """
    check_columns(options.keep_columns)
    store = open_store(options.images) if options.images else None
    files: list[Path] = []
    parts: list[Part] = []
    answers: list[Path] = []
    for given in inputs:
        path = _checked_input(given)
        if path.is_dir() and _is_folder(path, options.format):
            parts.append(Folder(path, options.class_names))
            continue
        files = _files_below(path, options.format) if path.is_dir() else [_checked_file(path, options.format)]
        for file in files:
            name = array_name(file, ("questions", "annotations")) if _may_be_vqa(file, options.format) else ""
            if name == "annotations":
                answers.append(file)
            elif name == "questions":
                parts.append(QuestionsAndAnswers(file, (), pictures_beside(file.parent, store)))
            else:
                parts.append(_part(file, path, options, store))
    questions = [part for part in parts if isinstance(part, QuestionsAndAnswers)]
    if answers and not questions:
        raise UserError(f"{answers[0]}: it has annotations only; give the file with their questions too")
    for part in questions:
        part.annotations = tuple(answers)
        if not answers:
            raise UserError(f"{part.path}: it has questions only; give the file with their annotations too")
    return Chained(parts)


def _part(path: Path, given: Path, options: ImportOptions, store: tuple[tuple[Beside, ...], NameTable] | None) -> Part:
    """The reader of one file; its records are named after its path below the directory that was given."""
    name = path.relative_to(given).as_posix() if path != given else path.name
    kind = _KINDS[path.suffix]
    shapes = Shapes(options)
    if kind == "text":
        return WholeFile(path, name)
    if kind == "tar":
        return PairTar(path, options.keep_columns)
    pictures = pictures_beside(path.parent, store)
    if kind == "parquet":
        return Table(path, name, shapes, pictures)
    if kind == "json" and options.format is not Format.jsonl and _begins_array(path):
        return Array(path, name, shapes, pictures)
    return Lines(path, name, shapes, pictures)


def _checked_input(given: str | Path) -> Path:
    """The path, if it is one.

    Raises:
        UserError: A shell command, a URL, or nothing there.
    """
    text = str(given)
    if text.startswith("pipe:"):
        raise UserError(f"{text}: shell commands are never run; give files or directories")
    if "://" in text:
        raise UserError(f"{text}: inputs are read from disk; download it first (img2dataset for lists of URLs)")
    path = Path(given)
    if not path.exists():
        raise UserError(f"{path}: no such file or directory; check the path of the raw input")
    return path


def _checked_file(path: Path, form: Format) -> Path:
    if path.suffix.lstrip(".") in PICKLED_EXTENSIONS:
        raise UserError(f"{path}: pickles are never opened; write the data as .jsonl or .parquet")
    kind = _KINDS.get(path.suffix)
    if kind is None:
        raise UserError(
            f"{path}: inputs are .jsonl (one record a line), .json, .parquet, .tar, .txt and .md (one document a file) "
            "or directories; rename or convert it"
        )
    if kind not in _OF_FORMAT.get(form, _KINDS.values()):
        raise UserError(f"{path}: no file of format {form.value}; give another --format, or none")
    return path


def _is_folder(path: Path, form: Format) -> bool:
    """Whether a directory is read as pictures with captions beside them."""
    if form is Format.folder:
        return True
    if form is not Format.auto:
        return False
    files = _visible_files(path)
    has_records = any(_KINDS.get(file.suffix, "text") != "text" for file in files)
    return not has_records and any(file.suffix.lower() in PICTURE_SUFFIXES for file in files)


def _files_below(path: Path, form: Format) -> list[Path]:
    """The files of records below a directory, sorted by path.

    Raises:
        UserError: There are none, or of kinds that are not read together.
    """
    allowed = _OF_FORMAT.get(form, tuple(_KINDS.values()))
    files = _visible_files(path)
    tars = {file.with_suffix("") for file in files if file.suffix == ".tar"}
    pictures = {file.with_suffix("") for file in files if file.suffix.lower() in PICTURE_SUFFIXES}
    by_kind: dict[str, list[Path]] = {}
    for file in files:
        of_tar = file.with_name(file.stem.removesuffix("_stats")) in tars and file.suffix in (".parquet", ".json")
        is_caption = file.suffix == ".txt" and file.with_suffix("") in pictures
        kind = _KINDS.get(file.suffix)
        if kind in allowed and not of_tar and not is_caption:
            by_kind.setdefault(str(kind), []).append(file)
    tables = [kind for kind in ("tar", "parquet") if kind in by_kind]
    others = [kind for kind in ("lines", "json") if kind in by_kind]
    if len(tables) + bool(others and tables) > 1:
        examples = ", ".join(by_kind[kind][0].name for kind in (*tables, *others))
        raise UserError(
            f"{path}: it holds {examples}, which are not read together; give the files, or say which with --format"
        )
    if tables:
        return by_kind[tables[0]]
    found = sorted(file for kind in ("lines", "json", "text") for file in by_kind.get(kind, ()))
    if not found:
        wanted = (
            "no file of that format" if form is not Format.auto else "no .jsonl, .json, .parquet, .tar, .txt or .md"
        )
        raise UserError(f"{path}: {wanted} below this directory; give files or another directory")
    return found


def _visible_files(path: Path) -> list[Path]:
    """Files below a directory that are not hidden, sorted."""
    found = (file for file in path.rglob("*") if not any(p.startswith(".") for p in file.relative_to(path).parts))
    return sorted(file for file in found if file.is_file())


def _may_be_vqa(path: Path, form: Format) -> bool:
    return path.suffix == ".json" and form in (Format.auto, Format.vqa) and not _begins_array(path)


def _begins_array(path: Path) -> bool:
    """Whether the first character of a JSON file opens an array."""
    with path.open("rb") as stream:
        return stream.read(4_096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
