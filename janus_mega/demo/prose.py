"""Real English prose that every machine has: the docstrings of Python's standard library.

The files are walked in sorted order and parsed with `ast`, nothing is imported or run. Held-out prose is split off by
whole modules (a hash of the module's path), so that a held-out text never shares its file with a training text, and
texts that occur twice are kept once, in favour of the training side. Docstrings with interpreter sessions are left
out: they are not prose. Another Python version gives another corpus, hence figures differ slightly between versions.
"""

import ast
import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import UserError

SKIPPED_DIRECTORIES = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "__pycache__"}
)
"""Installed packages, tests and programs: not the library's own prose."""
MIN_CHARACTERS = 60
"""Shorter docstrings are labels rather than prose."""
HELD_OUT_SHARE = 0.06
"""Share of modules whose docstrings are never trained on."""


@dataclass(frozen=True, slots=True)
class Text:
    """One piece of prose with a stable identity."""

    uid: str
    """Module path and number within it, for example `asyncio/base_events.py:12`."""
    text: str
    """The docstring with its indentation removed."""


@dataclass(frozen=True, slots=True)
class Prose:
    """The corpus, split by module."""

    train: tuple[Text, ...]
    held_out: tuple[Text, ...]


def collect_prose(root: Path | None = None) -> Prose:
    """Docstrings below `root` (default: this Python's standard library), deduplicated and split by module.

    Raises:
        UserError: the directory holds too few docstrings (a Python stripped of its sources).
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    by_module = {path.relative_to(root).as_posix(): list(_docstrings(path)) for path in _python_files(root)}
    sides: dict[bool, list[Text]] = {False: [], True: []}
    seen: set[str] = set()
    for held_out in (False, True):
        for module, texts in by_module.items():
            if _is_held_out(module) != held_out:
                continue
            for number, text in enumerate(texts):
                if text not in seen:
                    seen.add(text)
                    sides[held_out].append(Text(f"{module}:{number}", text))
    if not sides[False] or not sides[True]:
        raise UserError(
            f"{root}: {len(sides[False])} training and {len(sides[True])} held-out docstrings found, both must be "
            "above 0; use a Python that ships its standard library as .py files"
        )
    return Prose(tuple(sides[False]), tuple(sides[True]))


def _python_files(root: Path) -> list[Path]:
    """Source files of the library proper, in an order that does not depend on the file system."""
    files = []
    for directory, below, names in os.walk(root):
        below[:] = [name for name in below if name not in SKIPPED_DIRECTORIES]
        files += [Path(directory) / name for name in names if name.endswith(".py")]
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def _docstrings(path: Path) -> Iterator[str]:
    """Prose docstrings of one file in source order."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # some Pythons ship templates or samples that are not meant to parse
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) >= MIN_CHARACTERS and ">>>" not in text:
                yield text


def _is_held_out(module: str) -> bool:
    """Whether a module is on the held-out side; depends on its path alone."""
    digest = hashlib.sha256(module.encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32
