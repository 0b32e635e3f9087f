"""What commands print: results as lines of text. No command is imported here."""

import json
from collections.abc import Iterator
from typing import Any

from janus_mega.config.fields import leaf_fields
from janus_mega.config.load import Resolved

KEY_WIDTH = 44
VALUE_WIDTH = 26


def config_lines(resolved: Resolved[Any], *, explain: bool) -> Iterator[str]:
    """Yields `key  value  origin` for every value; with `explain`, its meaning in a comment line before."""
    docs = {field.key: field.doc for field in leaf_fields(type(resolved.config))} if explain else {}
    for key, value in resolved.values.items():
        doc = docs.get(key) or docs.get(_with_wildcard(key)) or docs.get(key.rpartition(".")[0])
        if doc:
            yield f"# {doc}"
        shown = value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
        yield f"{key:<{KEY_WIDTH}} {shown:<{VALUE_WIDTH}} {resolved.origins[key]}"


def _with_wildcard(key: str) -> str:
    """Returns data.sources.*.path for data.sources.prose.path."""
    parts = key.split(".")
    return ".".join(["*" if number == len(parts) - 2 else part for number, part in enumerate(parts)])
