"""From YAML and `key=value` to a checked, frozen dataclass, with the origin of every value. The only door to omegaconf.

Precedence, lowest first: defaults of the schema, included files in their order, the file, the overrides. Everything
that is wrong with keys and types is reported at once; rules between values are `validate`'s. The result is a plain
dataclass: nothing behind this module knows how it was read.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data_pipeline.errors import UserError
from data_pipeline.spec import MISSING
from janus_mega.config.fields import field_types, suggest, unknown_keys
from janus_mega.config.files import INCLUDE_KEY, config_root, find_config, read_with_includes, shown
from janus_mega.config.schema import RunConfig, TokenizerRunConfig

__all__ = [
    "Resolved",
    "config_root",
    "dump",
    "load_config",
    "load_section",
    "resolve_any",
    "save",
]

T = TypeVar("T")

DEFAULT_ORIGIN = "default"
OVERRIDE_ORIGIN = "override"


@dataclass(frozen=True, kw_only=True, slots=True)
class Resolved(Generic[T]):
    """A configuration and where its values came from."""

    config: T
    """The frozen dataclass."""
    origins: dict[str, str]
    """Dotted key of every leaf -> `default`, `file:line` or `override`."""
    values: dict[str, Any]
    """Dotted key of every leaf -> value as YAML writes it."""


@dataclass(frozen=True, slots=True)
class _Layer:
    """One source of values: nested plain containers, and where each dotted key stands."""

    values: dict[str, Any]
    places: dict[str, str]
    """Dotted key -> `file:line` or `override`; shown in messages and kept as origin."""


def load_config(schema: type[T], path: str | Path, overrides: Sequence[str] = ()) -> Resolved[T]:
    """Reads a file with its includes and overrides into `schema`.

    Raises UserError that names every unknown key, wrong type and missing value, each with its file and line.
    """
    merged, layers = _merge_layers(schema, path, overrides)
    _refuse_missing(merged, str(path))
    return _resolve(schema, merged, layers, str(path))


def load_section(schema: type, section: str, path: str | Path, overrides: Sequence[str] = ()) -> Any:
    """Reads one section of a schema from a file that may leave the others open, such as configs/model/*.yaml."""
    merged, _ = _merge_layers(schema, path, overrides)
    _refuse_missing(merged, str(path), f"{section}.")
    return OmegaConf.to_object(merged[section])


def resolve_any(path: str | Path, overrides: Sequence[str] = ()) -> Resolved[Any]:
    """Loads a training run or an image-tokenizer run, told apart by the section `image_tokenizer` at top level."""
    is_tokenizer = any("image_tokenizer" in layer.values for layer in _read_layers(path, ()))
    return load_config(TokenizerRunConfig if is_tokenizer else RunConfig, path, overrides)


def dump(config: Any) -> str:
    """Returns the YAML of a resolved configuration; loading it again gives an equal one."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def save(config: Any, path: Path) -> None:
    """Writes `dump` to a file that is complete or absent."""
    aside = path.with_name(f"{path.name}.tmp")
    aside.write_text(dump(config), encoding="utf-8")
    os.replace(aside, path)


def _read_layers(path: str | Path, overrides: Sequence[str]) -> list[_Layer]:
    layers = []
    for file in read_with_includes(find_config(path)):
        try:
            values = OmegaConf.to_container(OmegaConf.create(file.text)) if file.lines else {}
        except (OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
            raise UserError(f"{shown(file.path)}: {_first_line(error)}; correct that line") from error
        assert isinstance(values, dict)
        values.pop(INCLUDE_KEY, None)
        places = {key: f"{shown(file.path)}:{line}" for key, line in file.lines.items()}
        layers.append(_Layer({str(key): value for key, value in values.items()}, places))
    if overrides:
        layers.append(_override_layer(overrides))
    return layers


def _override_layer(overrides: Sequence[str]) -> _Layer:
    merged = OmegaConf.create({})
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key.strip():
            raise UserError(f"override '{override}' is not of the form key=value; write for example optimizer.lr=3e-4")
        try:
            merged = OmegaConf.merge(merged, OmegaConf.from_dotlist([override]))
        except Exception as error:  # PyYAML and omegaconf raise many kinds on a value that does not parse
            raise UserError(f"override '{override}': {_first_line(error)}; quote the value") from error
    values = OmegaConf.to_container(merged)
    assert isinstance(values, dict)
    return _Layer({str(key): value for key, value in values.items()}, {})


def _merge_layers(schema: type, path: str | Path, overrides: Sequence[str]) -> tuple[DictConfig, list[_Layer]]:
    layers = _read_layers(path, overrides)
    problems = [
        f"{_place(layer, key)}: unknown key '{key}'{suggest(schema, key)}"
        for layer in layers
        for key in unknown_keys(schema, layer.values)
    ]
    problems += [problem for layer in layers for problem in _wrong_types(schema, layer)]
    _refuse(problems, str(path))
    merged = OmegaConf.merge(OmegaConf.structured(schema), *(layer.values for layer in layers))
    assert isinstance(merged, DictConfig)
    return merged, layers


def _wrong_types(schema: type, layer: _Layer) -> Iterator[str]:
    """Yields one message for every leaf that the schema does not accept; unknown keys are reported elsewhere."""
    base = OmegaConf.structured(schema)
    try:
        OmegaConf.merge(base, layer.values)
        return  # the common case; merging leaf by leaf takes a hundred times as long
    except OmegaConfBaseException:
        pass
    unknown = set(unknown_keys(schema, layer.values))
    for key, value in _flatten(layer.values):
        if any(key == other or key.startswith(f"{other}.") for other in unknown):
            continue
        try:
            OmegaConf.merge(base, _nest(key, value))
        except OmegaConfBaseException as error:
            yield f"{_place(layer, key)}: {key}: {_first_line(error)}"


def _refuse_missing(merged: DictConfig, name: str, prefix: str = "") -> None:
    container = OmegaConf.to_container(merged, resolve=False)
    assert isinstance(container, dict)
    leaves = _flatten({str(key): value for key, value in container.items()})
    missing = [key for key, value in leaves if value == MISSING and key.startswith(prefix)]
    if missing:
        raise UserError(
            f"{name}: no value for {', '.join(missing)}; set {'it' if len(missing) == 1 else 'them'} in the file, "
            f"in an include, or as {missing[0]}=..."
        )


def _resolve(schema: type[T], merged: DictConfig, layers: list[_Layer], name: str) -> Resolved[T]:
    try:
        OmegaConf.resolve(merged)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        raise UserError(f"{name}: {f'{key}: ' if key else ''}{_first_line(error)}; correct that value") from error
    assert isinstance(config, schema)
    container = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    assert isinstance(container, dict)
    values = dict(_flatten({str(key): container[key] for key in field_types(schema)}))
    return Resolved(config=config, origins={key: _origin(key, layers) for key in values}, values=values)


def _origin(key: str, layers: list[_Layer]) -> str:
    """Returns the last layer that set `key` or, for an empty section, the section itself."""
    for layer in reversed(layers):
        if any(key == leaf for leaf, _ in _flatten(layer.values)):
            return _place(layer, key)
    return DEFAULT_ORIGIN


def _place(layer: _Layer, key: str) -> str:
    """Returns where the layer sets `key`, or the closest section around it that has a line."""
    if not layer.places:
        return OVERRIDE_ORIGIN
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        place = layer.places.get(".".join(parts[:length]))
        if place is not None:
            return place
    return next(iter(layer.places.values())).rpartition(":")[0]


def _flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted key, value) of every leaf; lists and empty mappings are leaves."""
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _nest(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _refuse(problems: list[str], name: str) -> None:
    """Raises one UserError for all problems: a single line, or a headline and one line each."""
    if len(problems) == 1:
        raise UserError(problems[0])
    if problems:
        raise UserError("\n  ".join([f"{name}: {len(problems)} values are wrong:", *problems]))
