"""The command line answers fast, shows where values come from, and turns bad input into one line and exit code 2."""

import os
import subprocess
import sys
import time

import pytest
import typer

from janus_mega import __version__
from janus_mega.cli import main as cli
from janus_mega.cli.show import config_lines
from janus_mega.config.load import load_config
from janus_mega.config.schema import RunConfig

COMMANDS = {
    "config",
    "data prepare",
    "data plan",
    "data inspect",
    "demo",
    "describe",
    "export",
    "generate",
    "tokenizer train-image",
    "tokenizer train-text",
    "train",
}


def commands_of(group, prefix=""):
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands_of(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command in this process; returns (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["janus-mega", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        shown = capsys.readouterr()
        return ended.value.code or 0, shown.out, shown.err

    return run


def test_help_answers_in_under_a_second():
    command = [sys.executable, "-m", "janus_mega.cli.main", "--help"]
    subprocess.run(command, capture_output=True, check=True)  # compiles what is not compiled yet
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        result = subprocess.run(
            command, capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "120"}
        )
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1.0
    assert "Usage: janus-mega" in result.stdout


def test_every_promised_command_is_there_and_explains_itself(run):
    found = dict(commands_of(typer.main.get_command(cli.app)))
    assert set(found) >= COMMANDS
    for name, command in found.items():
        assert command.help, name
        code, out, _ = run(*name.split(), "--help")
        assert code == 0
        assert "Usage:" in out


def test_version(run):
    assert run("--version")[:2] == (0, f"{__version__}\n")


def test_config_shows_origins(run):
    code, out, _ = run("config", "run/tiny_cpu.yaml", "optimizer.lr=3e-4")
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()}
    assert code == 0
    assert rows["optimizer.lr"] == ["0.0003", "override"]
    assert rows["model.backbone.num_layers"][1].endswith("model/tiny.yaml:7")
    assert rows["optimizer.beta2"] == ["0.95", "default"]


def test_config_explains_every_value():
    lines = list(config_lines(load_config(RunConfig, "run/tiny_cpu.yaml"), explain=True))
    values = [number for number, line in enumerate(lines) if not line.startswith("#")]
    assert all(lines[number - 1].startswith("# ") for number in values)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["paralel.tp_size=2"], ["unknown key 'paralel'", "did you mean 'parallel'"]),
        (["data.sources.text.weight=-2"], ["data.sources.text.weight -2.0"]),
        (["parallel.zero_stage=2", "parallel.pp_size=2", "--world-size", "2"], ["zero_stage 2", "pp_size 2"]),
        (["parallel.tp_size=8", "--world-size", "8"], ["num_heads 4 is not divisible by parallel.tp_size 8"]),
    ],
)
def test_bad_input_ends_with_code_2_and_no_traceback(run, arguments, words):
    code, _, err = run("config", "run/tiny_cpu.yaml", *arguments)
    assert code == 2
    assert all(word in err for word in words)
    assert "Traceback" not in err


def test_one_problem_is_one_line(run):
    code, out, err = run("config", "run/nowhere.yaml")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith("janus-mega: config file run/nowhere.yaml not found")


def test_an_unknown_command_ends_with_code_2(run):
    assert run("dance")[0] == 2
