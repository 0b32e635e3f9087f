"""Directories of pictures: a .txt beside each is its caption, or, without any .txt, the name of its folder is.

ImageNet's layout is the second; names of its folders become words through `--class-names` (a JSON object, or lines of
folder, blank, names of which the first counts, as in LOC_synset_mapping.txt).
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError
from data_pipeline.pairs import PICTURE_EXTENSIONS
from data_pipeline.prepare.importers.pictures import Beside
from data_pipeline.prepare.importers.record import MAX_RECORD_BYTES, Record
from data_pipeline.prepare.records import Reject

PICTURE_SUFFIXES = tuple(f".{extension}" for extension in PICTURE_EXTENSIONS)


@dataclass(slots=True)
class Folder:
    """All pictures below one directory, sorted by path."""

    path: Path
    class_names: Path | None = None
    _names: list[str] = field(default_factory=list)
    """Relative paths of the pictures."""
    _has_texts: bool = False
    _classes: dict[str, str] = field(default_factory=dict)

    def files(self) -> list[Path]:
        """See Part."""
        self.count()
        texts = [self.path / f"{os.path.splitext(name)[0]}.txt" for name in self._names] if self._has_texts else []
        return [self.path / name for name in self._names] + [path for path in texts if path.is_file()]

    def count(self) -> int:
        """See Part."""
        if not self._names:
            names, num_texts = [], 0
            for directory, _, files in os.walk(self.path):
                base = os.path.relpath(directory, self.path)
                for name in files:
                    if name.lower().endswith(PICTURE_SUFFIXES):
                        names.append(name if base == "." else f"{base}/{name}")
                num_texts += sum(name.endswith(".txt") for name in files)
            self._names = sorted(names)
            self._has_texts = num_texts > 0
            self._classes = read_class_names(self.class_names) if self.class_names else {}
            self._check()
        return len(self._names)

    def _check(self) -> None:
        alone = next((name for name in self._names if "/" not in name), None)
        if alone is not None and not self._has_texts:
            raise UserError(
                f"{self.path}: {alone!r} has no caption: there is no .txt beside any picture, and it lies in no class "
                "folder; write captions beside the pictures, or a .jsonl with image and caption"
            )

    def read(self, start: int, stop: int) -> Iterator[Record]:
        """See Part."""
        self.count()
        pictures = Beside(self.path)
        for name in self._names[start:stop]:
            yield Record(str(self.path / name), name, name, self._parse, pictures, self.path)

    def _parse(self, name: str) -> dict[str, Any]:
        if not self._has_texts:
            folder = name.rsplit("/", 2)[-2]
            return {"image": name, "caption": self._classes.get(folder, folder.replace("_", " "))}
        path = self.path / f"{os.path.splitext(name)[0]}.txt"
        try:
            if path.stat().st_size > MAX_RECORD_BYTES:
                raise Reject("too_large", f"{path.name} has more than {MAX_RECORD_BYTES} bytes")
            return {"image": name, "caption": path.read_text("utf-8")}
        except OSError as error:
            raise Reject(
                "no_caption", f"no caption beside it: {path.name} cannot be read ({error.strerror})"
            ) from error
        except ValueError as error:
            raise Reject("bad_record", f"{path.name} is not valid UTF-8 ({error})") from error


def read_class_names(path: Path) -> dict[str, str]:
    """Names of class folders.

    Raises:
        UserError: The file is missing or of neither form.
    """
    try:
        content = path.read_text("utf-8")
        if path.suffix == ".json":
            names = json.loads(content)
            if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
                raise ValueError("it must be an object of texts")
            return names
        lines = [line.split(maxsplit=1) for line in content.splitlines() if line.strip()]
        return {folder: names.split(",")[0].strip() for folder, names in lines}
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: no names of class folders ({error}); give a JSON object or lines of folder and name"
        ) from error
