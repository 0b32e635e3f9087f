"""What is known of a sample besides its content: size of its picture, length of its caption, language, scores.

Masks choose by it, so numbers and the language are columns of the index, one value a sample:

    index/meta/<name>.npy       f4 [N], not a number where nothing is known
    index/meta/language.npy     u2 [N], place of the language in language.json; 0 where nothing is known
    index/meta/language.json    {"v": 1, "names": ["", "de", "en", ...]}

A column that no sample has is not written. Texts (url, license, sha256) stay with the sample, in doc.json or meta.json.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.files import write_aside
from data_pipeline.prepare.asides import aside_of
from data_pipeline.prepare.join import ColumnFile

Meta = Mapping[str, float | str]
"""Facts of one sample: numbers become columns, so does `language`; other texts do not."""

LANGUAGE = "language"
META_DIR = "meta"
"""Below index/."""

_LANGUAGE_NAMES = (LANGUAGE, "lang", "LANGUAGE")
_TEXTS = ("url", "license", "sha256")
_COLUMN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_MAX_LANGUAGE_BYTES = 32


def sample_meta(
    fields: Mapping[str, Any],
    keep: Sequence[str] = (),
    *,
    size: tuple[int, int] | None = None,
    caption: str | None = None,
    picture: bytes | None = None,
) -> dict[str, float | str]:
    """The facts of a sample.

    Args:
        fields: Of its record; a mapping "meta" in them goes before the rest.
        keep: Names of further numbers to keep; what is no number is not kept.
        size: Width and height of its first picture as it came.
        caption: Its caption, if it has one.
        picture: The file of its first picture, for the sha256.
    """
    meta: dict[str, float | str] = {}
    if size is not None:
        meta |= {"width": float(size[0]), "height": float(size[1])}
    if caption is not None:
        meta["caption_chars"] = float(len(caption.strip()))
    for name in keep:
        number = _number(_fact(fields, name))
        if number is not None:
            meta[name] = number
    language = next((value for name in _LANGUAGE_NAMES if (value := _fact(fields, name))), None)
    if isinstance(language, str) and len(language.encode(errors="replace")) <= _MAX_LANGUAGE_BYTES:
        meta[LANGUAGE] = language
    for name in _TEXTS:
        value = _fact(fields, name)
        if isinstance(value, str) and value.isprintable():
            meta[name] = value
    if picture is not None:
        meta["sha256"] = hashlib.sha256(picture).hexdigest()
    return meta


def check_columns(names: Sequence[str]) -> None:
    """Refuses names that could not be a file.

    Raises:
        UserError: Names the first such.
    """
    for name in names:
        if not _COLUMN.fullmatch(name) or name == LANGUAGE:
            raise UserError(
                f"prepare: --keep {name!r} must be the name of a numeric column, of letters, digits, '_', '.' and '-' "
                "(the language is kept anyway); rename the column"
            )


def meta_member(metas: Sequence[Meta]) -> bytes:
    """meta.json of a block record: the facts of its samples by name, null where nothing is known."""
    names = sorted({name for meta in metas for name in meta})
    columns = {name: [meta.get(name) for meta in metas] for name in names}
    return json.dumps({"v": 1, "n": len(metas), "columns": columns}, ensure_ascii=False).encode()


def meta_table(metas: Sequence[Meta]) -> np.ndarray:
    """The columns of one shard: a structured array [samples] of f4, and S32 for the language."""
    numbers = sorted({name for meta in metas for name, value in meta.items() if not isinstance(value, str)})
    has_language = any(LANGUAGE in meta for meta in metas)
    dtype = [(name, "<f4") for name in numbers] + ([(LANGUAGE, f"S{_MAX_LANGUAGE_BYTES}")] if has_language else [])
    table = np.zeros(len(metas), dtype)
    for name in numbers:
        table[name] = [meta.get(name, math.nan) for meta in metas]
    if has_language:
        table[LANGUAGE] = [str(meta.get(LANGUAGE, "")).encode() for meta in metas]
    return table


def join_meta(parts: Sequence[Path], num_samples: Sequence[int], index: Path) -> dict[str, str]:
    """Writes the columns of all shards below index/meta/, one part in memory at a time.

    Args:
        parts: One .npy a shard, of `meta_table`.
        num_samples: Samples of each.
        index: The directory of the index.

    Returns:
        sha256 of every file, by its name below index/.

    Raises:
        FileNotFoundError: A part is gone.
    """
    names, languages = _survey(parts)
    if not names:
        return {}
    folder = index / META_DIR
    folder.mkdir(exist_ok=True)
    codes = {language: code for code, language in enumerate([b"", *sorted(languages)])}
    digests: dict[str, str] = {}
    with ExitStack() as stack:
        files = {
            name: stack.enter_context(ColumnFile(folder / f"{name}.npy", np.dtype(_dtype(name)), (sum(num_samples),)))
            for name in names
        }
        for path, count in zip(parts, num_samples, strict=True):
            table = np.load(path, allow_pickle=False)
            for name, file in files.items():
                file.append(_column(table, name, count, codes))
        digests = {f"{META_DIR}/{name}.npy": file.finish() for name, file in files.items()}
    if LANGUAGE in names:
        content = json.dumps({"v": 1, "names": [language.decode() for language in codes]}, ensure_ascii=False).encode()
        path = folder / f"{LANGUAGE}.json"
        write_aside(path, content, aside_of(path))
        digests[f"{META_DIR}/{path.name}"] = hashlib.sha256(content).hexdigest()
    return digests


def _survey(parts: Sequence[Path]) -> tuple[list[str], set[bytes]]:
    """Columns and languages of all parts."""
    names: set[str] = set()
    languages: set[bytes] = set()
    for path in parts:
        table = np.load(path, allow_pickle=False)
        names.update(table.dtype.names or ())
        if LANGUAGE in (table.dtype.names or ()):
            languages.update(np.unique(table[LANGUAGE]).tolist())
    languages.discard(b"")
    if len(languages) >= 1 << 16:
        raise UserError(f"{len(languages)} different languages in the input, at most 65535 are kept; check the field")
    return sorted(names), languages


def _dtype(name: str) -> str:
    return "<u2" if name == LANGUAGE else "<f4"


def _column(table: np.ndarray, name: str, count: int, codes: Mapping[bytes, int]) -> np.ndarray:
    """One column of one part, or what stands for it where the part has none."""
    if name not in (table.dtype.names or ()):
        return np.full(count, 0 if name == LANGUAGE else math.nan, _dtype(name))
    if name != LANGUAGE:
        return np.asarray(table[name])
    unique, inverse = np.unique(table[name], return_inverse=True)
    return np.array([codes[language] for language in unique.tolist()], "<u2")[inverse]


def _fact(fields: Mapping[str, Any], name: str) -> Any:
    meta = fields.get("meta")
    value = meta.get(name) if isinstance(meta, dict) else None
    return fields.get(name) if value is None else value


def _number(value: Any) -> float | None:
    """A finite number, also written as text."""
    if not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
