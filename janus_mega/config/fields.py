"""What a configuration dataclass looks like from outside: its dotted keys, their documentation, close names.

Read from the classes and their source, so the answers cannot differ from the schema. A `dict[str, X]` field stands in
the list of keys as `field.*`.
"""

import ast
import difflib
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints


@dataclass(frozen=True, slots=True)
class Field:
    """One leaf of a schema."""

    key: str
    """Dotted key; `*` stands for a name that the user chooses."""
    type: Any
    """Its annotation."""
    doc: str
    """The string below the attribute."""


def leaf_fields(schema: type, prefix: str = "") -> Iterator[Field]:
    """Yields every leaf of a schema in the order of its definition."""
    docs = attribute_docs(schema)
    for name, annotation in field_types(schema).items():
        key = f"{prefix}{name}"
        if is_dataclass(annotation):
            yield from leaf_fields(annotation, f"{key}.")
        elif get_origin(annotation) is dict and is_dataclass(get_args(annotation)[1]):
            yield from leaf_fields(get_args(annotation)[1], f"{key}.*.")
        else:
            yield Field(key, annotation, docs.get(name, ""))


def field_types(schema: type) -> dict[str, Any]:
    """Returns name -> annotation of a dataclass, in order."""
    hints = get_type_hints(schema)
    return {field.name: hints[field.name] for field in fields(schema)}


def attribute_docs(schema: type) -> dict[str, str]:
    """Returns name -> the string literal that follows the attribute in the class body."""
    body = ast.parse(textwrap.dedent(inspect.getsource(schema))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs = {}
    for statement, following in zip(body.body, body.body[1:], strict=False):
        is_attribute = isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
        is_text = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
        if is_attribute and is_text and isinstance(following.value.value, str):
            docs[statement.target.id] = " ".join(following.value.value.split())
    return docs


def unknown_keys(schema: type, values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yields the dotted keys of nested `values` that the schema does not have."""
    known = field_types(schema)
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name not in known:
            yield key
            continue
        inner = known[name]
        if is_dataclass(inner) and isinstance(value, dict):
            yield from unknown_keys(inner, value, f"{key}.")
        elif get_origin(inner) is dict and is_dataclass(get_args(inner)[1]) and isinstance(value, dict):
            for entry, entry_values in value.items():
                if isinstance(entry_values, dict):
                    yield from unknown_keys(get_args(inner)[1], entry_values, f"{key}.{entry}.")


def suggest(schema: type, unknown: str) -> str:
    """Returns `; did you mean 'x'?` for the closest key of the schema, or an empty string.

    A sibling that is spelled alike comes first, then the same name in another section.
    """
    keys = list(all_keys(schema))
    parent, _, name = unknown.rpartition(".")
    pattern = _pattern_of(parent, keys)
    siblings = {key.rpartition(".")[2]: key for key in keys if key.rpartition(".")[0] == pattern}
    close = difflib.get_close_matches(name, siblings, n=1, cutoff=0.6)
    if close:
        return f"; did you mean '{f'{parent}.' if parent else ''}{close[0]}'?"
    same_name = [key for key in keys if key.rpartition(".")[2] == name]
    return f"; did you mean '{same_name[0]}'?" if same_name else ""


def all_keys(schema: type, prefix: str = "") -> Iterator[str]:
    """Yields the dotted keys of sections and leaves."""
    for name, annotation in field_types(schema).items():
        key = f"{prefix}{name}"
        yield key
        if is_dataclass(annotation):
            yield from all_keys(annotation, f"{key}.")
        elif get_origin(annotation) is dict and is_dataclass(get_args(annotation)[1]):
            yield from all_keys(get_args(annotation)[1], f"{key}.*.")


def _pattern_of(parent: str, keys: list[str]) -> str:
    """Returns `parent` with the user's own names replaced by `*`: data.sources.prose -> data.sources.*"""
    parts: list[str] = []
    for part in parent.split(".") if parent else []:
        has_names_of_users = any(key.startswith(".".join([*parts, "*"]) + ".") for key in keys) and parts
        parts.append("*" if has_names_of_users else part)
    return ".".join(parts)
