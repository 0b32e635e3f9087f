"""JSON lines read back: an object each, and a damaged one is named."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError

_REMEDY = "restore the file, or remove the line"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file that is appended to; half a line that a kill has left behind the last newline is none.

    Raises:
        OSError: it could not be read.
        UserError: a line before is no JSON object.
    """
    return list(json_objects(path.read_bytes().split(b"\n")[:-1], path))


def json_objects(lines: Iterable[bytes], path: Path) -> Iterator[dict[str, Any]]:
    """The object of every line; `path` is for the error.

    Raises:
        UserError: a line is no JSON object.
    """
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number}: damaged, not JSON ({error}); {_REMEDY}") from error
        if not isinstance(value, dict):
            raise UserError(f"{path}:{number}: damaged, {type(value).__name__} instead of a JSON object; {_REMEDY}")
        yield value
