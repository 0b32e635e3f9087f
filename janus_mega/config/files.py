"""Where configuration files lie, what they include, and on which line each key stands. Knows YAML, not schemas.

A file may begin with `include:`, a list of files whose values it builds on. Includes are looked for beside the file
that names them, then under the config root; an included file includes nothing itself, so a run is always read from at
most two levels of files.
"""

from dataclasses import dataclass
from pathlib import Path

import yaml

from data_pipeline.errors import UserError

INCLUDE_KEY = "include"


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """One YAML file as read: its text, and the line (from 1) of every dotted key."""

    path: Path
    text: str
    lines: dict[str, int]
    includes: tuple[str, ...]


def config_root() -> Path:
    """Directory of the shipped configs: inside an installed wheel, or `configs/` of the checkout."""
    return _shipped("configs")


def slurm_root() -> Path:
    """Directory of the shipped job templates: inside an installed wheel, or `slurm/` of the checkout."""
    return _shipped("slurm")


def _shipped(name: str) -> Path:
    here = Path(__file__).resolve()
    in_wheel = here.parent / "builtin" / name
    return in_wheel if in_wheel.is_dir() else here.parents[2] / name


def find_config(name: str | Path, beside: Path | None = None) -> Path:
    """Returns the file `name` means: a path as given (or beside the including file), else one under the config root.

    Raises UserError naming every place that was tried.
    """
    wanted = Path(name)
    tried = [beside / wanted if beside else wanted]
    if not wanted.is_absolute():
        tried.append(config_root() / wanted)
    for path in tried:
        if path.is_file():
            return path
    places = " or ".join(str(path) for path in tried)
    raise UserError(f"config file {name} not found: looked for {places}; give a path, or a name under {config_root()}")


def read_config_file(path: Path) -> ConfigFile:
    """Reads one YAML file and the lines of its keys; UserError when it is not a YAML mapping."""
    try:
        text = path.read_text(encoding="utf-8")
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file ({error.reason} at byte {error.start}); save it as UTF-8") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}{_mark_of(error)}: not valid YAML: {_problem_of(error)}; correct that line") from error
    if tree is not None and not isinstance(tree, yaml.MappingNode):
        raise UserError(f"{path}: is not a mapping; write `key: value` lines")
    lines: dict[str, int] = {}
    if tree is not None:
        _collect_lines(path, tree, "", lines)
    return ConfigFile(path=path, text=text, lines=lines, includes=_includes_of(path, tree))


def read_with_includes(path: Path) -> list[ConfigFile]:
    """Returns the included files in order, then the file itself: the order in which values override each other."""
    main = read_config_file(path)
    files = []
    for name in main.includes:
        included = read_config_file(find_config(name, beside=path.parent))
        if included.includes:
            raise UserError(
                f"{included.path}: is included by {path} and includes {', '.join(included.includes)} itself; "
                f"includes are one level deep: list all of them in {path}"
            )
        files.append(included)
    return [*files, main]


def shown(path: Path) -> str:
    """Returns a path as messages show it: relative to the working directory where it lies inside."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _collect_lines(path: Path, node: yaml.MappingNode, prefix: str, lines: dict[str, int]) -> None:
    for key_node, value_node in node.value:
        key, line = f"{prefix}{key_node.value}", key_node.start_mark.line + 1
        if key in lines:
            raise UserError(f"{shown(path)}:{line}: {key} is given on line {lines[key]} already; keep one of them")
        lines[key] = line
        if isinstance(value_node, yaml.MappingNode):
            _collect_lines(path, value_node, f"{key}.", lines)


def _includes_of(path: Path, tree: yaml.MappingNode | None) -> tuple[str, ...]:
    for key_node, value_node in tree.value if tree is not None else ():
        if key_node.value != INCLUDE_KEY:
            continue
        entries = value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
        if not all(isinstance(entry, yaml.ScalarNode) for entry in entries):
            raise UserError(f"{path}:{key_node.start_mark.line + 1}: include must be a list of file names")
        return tuple(entry.value for entry in entries)
    return ()


def _mark_of(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f":{mark.line + 1}" if mark is not None else ""


def _problem_of(error: yaml.YAMLError) -> str:
    return str(getattr(error, "problem", None) or str(error).splitlines()[0])
