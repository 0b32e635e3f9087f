"""Item-level records: one JSON line per judged item, so that figures can be recounted and misses be looked at."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError
from data_pipeline.files import write_aside


def write_records(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Writes records as JSON lines, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(record, ensure_ascii=False, sort_keys=True) for record in records)
    write_aside(path, "".join(f"{line}\n" for line in lines).encode())


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file in order.

    Raises:
        UserError: A line is no JSON object.
    """
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}:{number}: not a JSON record ({error}); write the file again") from error
            if not isinstance(record, dict):
                raise UserError(f"{path}:{number}: a record is a JSON object, found {type(record).__name__}")
            yield record
