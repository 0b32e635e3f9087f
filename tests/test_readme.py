"""Every command the README shows exists; cheap ones are run."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from janus_mega.cli.main import app

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "docs/data.md"]
CHEAP = ("--help", "--version", "config", "describe")
"""First words after `janus-mega` of what is run for real."""


def shown_commands():
    for name in DOCUMENTS:
        for block in re.findall(r"```console\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL):
            for line in block.splitlines():
                if line.startswith("$ "):
                    yield line[2:].split(" #")[0].strip()


COMMANDS = sorted(set(shown_commands()))


def in_this_environment(*words):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)


def janus_mega(*words):
    return in_this_environment(sys.executable, "-m", "janus_mega.cli.main", *words)


def test_the_readme_shows_its_two_commands():
    assert {"make demo", "make test"} <= set(COMMANDS)


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("make ")])
def test_make_targets_exist(line):
    if shutil.which("make") is None:
        pytest.skip("make is not installed here, so its targets cannot be tried")
    result = in_this_environment("make", "--dry-run", *shlex.split(line)[1:])
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("line", [line for line in COMMANDS if "janus-mega " in line])
def test_commands_of_janus_mega(line):
    words = shlex.split(line)
    words = words[[Path(word).name for word in words].index("janus-mega") + 1 :]
    if words[0] in CHEAP:
        result = janus_mega(*words)
        assert result.returncode == 0, result.stderr
        return
    command, rest = typer.main.get_command(app), list(words)
    while hasattr(command, "commands"):
        assert rest[0] in command.commands, f"no command {rest[0]} in: {line}"
        command = command.commands[rest.pop(0)]
    known = {option for parameter in command.params for option in parameter.opts}
    used = {word.split("=")[0] for word in rest if word.startswith("--")}
    assert used <= known, f"unknown options {used - known} in: {line}"


def test_every_command_shown_is_covered():
    covered = [line for line in COMMANDS if line.startswith("make ") or "janus-mega " in line or "pytest" in line]
    assert covered == COMMANDS


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text(encoding="utf-8")):
        assert target.startswith("http") or ((ROOT / name).parent / target).exists(), f"{name}: {target} does not exist"


def test_places_named_for_changes_exist():
    table = (ROOT / "README.md").read_text(encoding="utf-8").split("## To change X, open Y")[1].split("\n## ")[0]
    for named in re.findall(r"`((?:janus_mega|data_pipeline|configs)/[^`*]*)", table):
        assert (ROOT / named).exists(), f"{named} does not exist"
