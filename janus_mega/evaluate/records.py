"""Item-level records: one JSON line per judged item, so that figures can be recounted and misses be looked at."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data_pipeline.files import write_aside
from janus_mega.observe.json_lines import json_objects


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
    with path.open("rb") as lines:
        yield from json_objects(lines, path)
