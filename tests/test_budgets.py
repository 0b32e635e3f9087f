"""Size and habit budgets, checked by machine: the tail is what makes a code base hard, so the tail is capped."""

import ast
import re
import subprocess
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from janus_mega.config.fields import attribute_docs, leaf_fields
from janus_mega.config.schema import RunConfig, TokenizerRunConfig

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ("janus_mega", "data_pipeline")
CODE = (*LIBRARY, "tools", "tests")

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 7
MAX_CONFIG_FIELDS = 128

VAGUE_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "base", "core", "stuff", "tools"}
PRINTING_ROOMS = ("janus_mega/cli/", "tools/", "tests/")

# path or path::function -> why it may break a budget
EXCEPTIONS: dict[str, str] = {}


def python_files(*roots: str) -> list[Path]:
    return sorted(path for root in roots for path in (ROOT / root).rglob("*.py") if "__pycache__" not in path.parts)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def num_parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    arguments = function.args
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def is_command(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """A typer command: its parameters are the options of a command line, not arguments of a call."""
    return any(".command" in ast.unparse(decorator) for decorator in function.decorator_list)


def broken_budgets(name: str, source: str) -> list[str]:
    """Everything one file breaks; the tests of this module feed it real files and planted ones."""
    tree = ast.parse(source)
    broken = []
    if source.count("\n") > MAX_FILE_LINES:
        broken.append(f"{name}: {source.count(chr(10))} lines, at most {MAX_FILE_LINES}")
    if Path(name).stem in VAGUE_NAMES:
        broken.append(f"{name}: the name says nothing; name the one thing it holds")
    for function in functions(tree):
        where, lines = f"{name}::{function.name}", (function.end_lineno or 0) - function.lineno + 1
        if where in EXCEPTIONS:
            continue
        if lines > MAX_FUNCTION_LINES:
            broken.append(f"{where}: {lines} lines, at most {MAX_FUNCTION_LINES}")
        if num_parameters(function) > MAX_PARAMETERS and not is_command(function):
            broken.append(f"{where}: {num_parameters(function)} parameters, at most {MAX_PARAMETERS}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            broken.append(f"{name}:{node.lineno}: global {', '.join(node.names)}")
        prints = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
        if prints and not name.startswith(PRINTING_ROOMS):
            broken.append(f"{name}:{node.lineno}: print; log it, or return it to the command line")
    return broken


@pytest.mark.parametrize("root", CODE)
def test_every_file_keeps_its_budgets(root):
    broken = [
        line
        for path in python_files(root)
        if name_of(path) not in EXCEPTIONS
        for line in broken_budgets(name_of(path), path.read_text(encoding="utf-8"))
    ]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("x = 1\n" * (MAX_FILE_LINES + 1), "lines"),
        ("def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES, "f: 61 lines"),
        ("def f(a, b, c, d, e, f, g, *, h): ...\n", "8 parameters"),
        ("def f():\n    global x\n    x = 1\n", "global x"),
        ("print(1)\n", "print"),
    ],
)
def test_a_planted_breach_is_seen(source, complaint):
    assert any(complaint in line for line in broken_budgets("janus_mega/planted.py", source))


def test_a_vague_file_name_is_seen():
    assert broken_budgets("janus_mega/utils.py", "")


@pytest.mark.parametrize("root", LIBRARY)
def test_every_module_opens_with_a_docstring(root):
    silent = [name_of(path) for path in python_files(root) if not ast.get_docstring(ast.parse(path.read_text("utf-8")))]
    assert not silent, f"no docstring: {', '.join(silent)}"


@pytest.mark.parametrize("root", LIBRARY)
def test_package_files_hold_a_docstring_only(root):
    """`__init__.py` runs nothing, so importing a room is free of side effects; the version is the one exception."""
    for path in python_files(root):
        if path.name != "__init__.py" or name_of(path) == "janus_mega/__init__.py":
            continue
        assert len(ast.parse(path.read_text(encoding="utf-8")).body) == 1, f"{name_of(path)} holds code"


@pytest.mark.parametrize("root", LIBRARY)
def test_every_public_function_is_annotated_and_says_what_it_does(root):
    missing = []
    for path in python_files(root):
        for function in functions(ast.parse(path.read_text(encoding="utf-8"))):
            if function.returns is None:
                missing.append(f"{name_of(path)}::{function.name}: no return annotation")
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            is_public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            if is_public and not ast.get_docstring(node):
                missing.append(f"{name_of(path)}::{node.name}: no docstring")
    assert not missing, "\n".join(missing)


def test_the_configuration_stays_small_and_documented():
    leaves = list(leaf_fields(RunConfig))
    assert len(leaves) <= MAX_CONFIG_FIELDS
    undocumented = [
        leaf.key for schema in (RunConfig, TokenizerRunConfig) for leaf in leaf_fields(schema) if not leaf.doc
    ]
    assert not undocumented, f"no string below the field: {undocumented}"
    # Every class attribute must be a field: an assignment without annotation would silently not be configurable.
    assert set(attribute_docs(RunConfig)) == {field.name for field in fields(RunConfig)}


def test_nothing_unpickles_or_unpacks_blindly():
    forbidden = re.compile(r"\bpickle\.loads?\(|\.extractall\(|allow_pickle=True|weights_only=False|\byaml\.load\(")
    found = [
        f"{name_of(path)}:{number}"
        for path in python_files(*LIBRARY, "tools")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if forbidden.search(line)
    ]
    assert not found, f"unsafe loading at {found}"


def test_no_large_or_generated_file_is_tracked():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("git lists the files, and this is no checkout")
    tracked = [ROOT / name for name in listed.stdout.split("\0") if name]
    large = [name_of(path) for path in tracked if path.is_file() and path.stat().st_size > 300_000]
    assert not large, f"above 300 kB: {large}"
