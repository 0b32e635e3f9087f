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
        inner, names = _section(annotation)
        if inner is not None:
            yield from leaf_fields(inner, f"{prefix}{name}.{names}")
        else:
            yield Field(f"{prefix}{name}", annotation, docs.get(name, ""))


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
        match statement, following:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                docs[name] = " ".join(text.split())
    return docs


def unknown_keys(schema: type, values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yields the dotted keys of nested `values` that the schema does not have."""
    known = field_types(schema)
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name not in known:
            yield key
            continue
        inner, names = _section(known[name])
        if inner is None or not isinstance(value, dict):
            continue
        for entry, entry_values in value.items() if names else [("", value)]:
            if isinstance(entry_values, dict):
                yield from unknown_keys(inner, entry_values, f"{key}.{entry}." if names else f"{key}.")


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
        yield f"{prefix}{name}"
        inner, names = _section(annotation)
        if inner is not None:
            yield from all_keys(inner, f"{prefix}{name}.{names}")


def _section(annotation: Any) -> tuple[type | None, str]:
    """Returns (dataclass, "") for a section, (dataclass, "*.") for a dict of sections, (None, "") for a leaf."""
    if isinstance(annotation, type) and is_dataclass(annotation):
        return annotation, ""
    if get_origin(annotation) is dict and is_dataclass(get_args(annotation)[1]):
        return get_args(annotation)[1], "*."
    return None, ""


def _pattern_of(parent: str, keys: list[str]) -> str:
    """Returns `parent` with the user's own names replaced by `*`: data.sources.prose -> data.sources.*"""
    parts: list[str] = []
    for part in parent.split(".") if parent else []:
        has_names_of_users = any(key.startswith(".".join([*parts, "*"]) + ".") for key in keys) and parts
        parts.append("*" if has_names_of_users else part)
    return ".".join(parts)
