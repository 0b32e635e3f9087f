"""Import contracts hold, a planted breach is caught, and importing the command line stays light."""

import importlib
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINTER = Path(sys.executable).with_name("lint-imports")


def lint(directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [LINTER, "--no-cache"], cwd=directory, capture_output=True, text=True, check=False, env={"PYTHONPATH": "."}
    )


@pytest.fixture
def copy_of_the_house(tmp_path):
    ignore = shutil.ignore_patterns("__pycache__", "builtin")
    for name in ("janus_mega", "data_pipeline"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_contracts_hold():
    result = lint(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("room", "line", "contract"),
    [
        ("data_pipeline/planted.py", "import janus_mega.config.schema", "imports go down"),
        ("janus_mega/config/planted.py", "import omegaconf", "omegaconf has one door"),
        ("janus_mega/observe/planted.py", "import deepspeed", "deepspeed has one door"),
        ("janus_mega/config/planted.py", "import megatron.core", "megatron-core"),
    ],
)
def test_a_planted_import_is_caught(copy_of_the_house, room, line, contract):
    (copy_of_the_house / room).write_text(f'"""Planted."""\n\n{line}\n')
    result = lint(copy_of_the_house)
    broken = [text for text in result.stdout.splitlines() if "BROKEN" in text]
    assert result.returncode != 0
    assert any(contract in text for text in broken), result.stdout


def loaded_by(module: str, *heavy: str) -> list[str]:
    """Which of the heavy packages a fresh interpreter holds after importing one module."""
    program = f"import sys, {module}; print(*[name for name in {heavy!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return result.stdout.split()


@pytest.mark.parametrize(
    "module",
    ["janus_mega.cli.main", "janus_mega.config.load", "janus_mega.config.validate", "data_pipeline.spec"],
)
def test_light_modules_import_no_torch(module):
    assert loaded_by(module, "torch", "transformers", "deepspeed", "megatron", "sklearn") == []


@pytest.mark.parametrize("room", ["data_pipeline.prepare", "data_pipeline.plan"])
def test_offline_data_work_runs_where_torch_is_not_installed(room):
    """webdataset takes torch along where it finds it, so torch is hidden instead of looked for."""
    package = importlib.import_module(room)
    modules = [room, *(f"{room}.{module.name}" for module in pkgutil.iter_modules(package.__path__))]
    program = f"import sys; sys.modules['torch'] = None; import {', '.join(modules)}"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
