"""A wheel carries everything that a run needs outside the checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """The content of a freshly built wheel, as pip would lay it out."""
    pytest.importorskip("hatchling")
    out, site = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(out)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = out.glob("janus_mega-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            target = site / name
            assert site in target.resolve().parents
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(archive.read(name))
    return site


def test_the_wheel_holds_configs_templates_and_licence(unpacked):
    shipped = unpacked / "janus_mega" / "config" / "builtin"
    assert {path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml")} == {
        path.relative_to(shipped).as_posix() for path in (shipped / "configs").rglob("*.yaml")
    }
    assert (shipped / "slurm" / "README.md").is_file()
    assert list(unpacked.glob("*.dist-info/licenses/LICENSE"))
    assert not list(unpacked.rglob("test_*.py"))


def test_shipped_runs_are_found_outside_the_checkout(unpacked, tmp_path):
    command = [sys.executable, "-m", "janus_mega.cli.main", "config", "run/tiny_cpu.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(unpacked), "PYTHONSAFEPATH": "1"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert str(unpacked / "janus_mega" / "config" / "builtin") in result.stdout
