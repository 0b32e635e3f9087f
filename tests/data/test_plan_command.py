"""`janus-mega data plan` over real shards: what it prints, what it refuses, and how it tells plans apart."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.manifest import open_source
from data_pipeline.masks.store import write_mask
from data_pipeline.plan.difference import IDENTITY_FILE, save_identity
from janus_mega.cli import main as cli
from janus_mega.cli.run_data import open_run_data
from janus_mega.config.load import load_config, save
from janus_mega.config.schema import RunConfig
from tests.support.shards import make_shards


@pytest.fixture(scope="module")
def overrides(tmp_path_factory):
    """The tiny run over three sources of 60 samples."""
    root = tmp_path_factory.mktemp("planned")
    make_shards(root)
    paths = {"text": "text", "understanding": "questions", "generation": "drawings"}
    return [
        f"data.text_tokenizer={root / 'text.model'}",
        *(f"data.sources.{name}.path={root / folder}" for name, folder in paths.items()),
    ]


@pytest.fixture
def run(monkeypatch, capsys, overrides):
    def run(*arguments, config="run/tiny_cpu.yaml"):
        monkeypatch.setattr(sys, "argv", ["janus-mega", "data", "plan", config, *overrides, *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        shown = capsys.readouterr()
        return ended.value.code or 0, shown.out, shown.err

    return run


@pytest.fixture
def diff(monkeypatch, capsys):
    def diff(*arguments):
        monkeypatch.setattr(sys, "argv", ["janus-mega", "data", "plan", "diff", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        shown = capsys.readouterr()
        return ended.value.code or 0, shown.out, shown.err

    return diff


LATER = "data.sources.text.schedule=[{at: 20, weight: 4}]"


def test_it_says_what_a_run_will_read(run):
    code, out, _ = run(LATER, "data.window_rows=32", "stage.num_steps=60", "optimizer.warmup_steps=1")
    assert code == 0
    assert "60 steps of 4 rows x 256" in out
    assert "compiled" not in out
    for word in ("padding", "fullest rank", "fullest position", "share of tokens", "epochs end in steps"):
        assert word in out
    assert "after step 24: text weight becomes 4" in out, "windows have 8 steps"
    assert "images per row" in out


def test_json_is_the_report(run):
    code, out, err = run(LATER, "data.window_rows=32", "--json")
    assert code == 0
    assert err == ""
    report = json.loads(out)
    assert report["measured_steps"] == report["num_steps"] == 100
    assert [source["name"] for source in report["sources"]] == ["generation", "text", "understanding"]
    assert sum(source["tokens"] for source in report["sources"]) == report["tokens"]


def test_a_long_stage_is_projected(run):
    code, out, _ = run("stage.num_steps=100000", "data.window_rows=32", "--steps", "20")
    assert code == 0
    assert "compiled: the first 24 steps" in out
    assert "~" in out
    assert "tokens of the stage" in out


def test_what_cannot_last_is_refused_before_training(run):
    code, out, err = run("data.sources.text.max_epochs=1")
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert "source 'text'" in err
    assert "max_epochs=1 allows 60 documents" in err or "max_epochs=1 allows 6" in err
    code, out, _ = run("data.sources.text.max_epochs=1", "data.sources.text.on_exhausted=stop", "data.window_rows=16")
    assert code == 0
    assert "the plan ends" in out


def test_broken_rules_come_before_opening(run):
    code, _, err = run("data.sources.text.path=nowhere", "data.temperature=-1", "data.sources.text.max_epochs=-1")
    assert code == 2
    assert "2 rules are broken" in err


def test_row_lengths_are_advised(run):
    code, out, _ = run("--advise-seq-len")
    assert code == 0
    assert "256 is asked for" in out
    assert "advised" in out
    code, out, _ = run("--advise-seq-len", "--json")
    advice = json.loads(out)
    assert advice["asked"] == 256
    assert advice["advised"] in [row["seq_len"] for row in advice["rows"]]
    # Asked for a length that questions do not fit into, it says which do.
    code, out, _ = run("--advise-seq-len", "data.seq_len=65")
    assert code == 0
    assert "longest uncut document   6" in out


def test_differences(run, diff, overrides, tmp_path, shards):
    plans = {"same": {}, "other": {"seed": 5}}
    for name, changes in plans.items():
        (tmp_path / name).mkdir()
        save_identity(shards.open(**changes).plan, tmp_path / name / IDENTITY_FILE)
    save_identity(shards.open().plan, tmp_path / "again.json")
    code, out, _ = diff(tmp_path / "same", tmp_path / "again.json")
    assert code == 0
    assert "the plans are equal" in out
    code, out, _ = diff(tmp_path / "same", tmp_path / "other")
    assert code == 1
    assert "seed 0 in A, 5 in B" in out
    code, out, _ = diff(tmp_path / "same", tmp_path / "other", "--json")
    assert code == 1
    assert json.loads(out)["differences"] == ["seed 0 in A, 5 in B"]
    assert diff(tmp_path / "same")[0] == 2
    assert diff(tmp_path / "same", tmp_path / "nothing.json")[0] == 2


def test_a_configuration_against_what_a_run_was_trained_with(diff, overrides, tmp_path):
    for name, weight in (("a", 1), ("b", 3)):
        changed = [*overrides, f"data.sources.text.weight={weight}"]
        save(load_config(RunConfig, "run/tiny_cpu.yaml", changed).config, tmp_path / f"{name}.yaml")
    code, out, _ = diff(tmp_path / "a.yaml", tmp_path / "b.yaml")
    assert code == 1
    assert "source text: weight 1 in A, 3 in B" in out
    (tmp_path / "run").mkdir()
    save_identity(open_run_data(str(tmp_path / "a.yaml"), []).data.plan, tmp_path / "run" / IDENTITY_FILE)
    assert diff(tmp_path / "a.yaml", tmp_path / "run")[0] == 0
    assert diff(tmp_path / "b.yaml", tmp_path / "run")[0] == 1


def _path(overrides, name):
    return next(text.partition("=")[2] for text in overrides if f".{name}.path" in text)


def test_masks_show_in_the_report_and_in_the_difference(run, diff, overrides, tmp_path):
    source = open_source(Path(_path(overrides, "generation")))
    left_out = np.zeros(source.num_samples, bool)
    left_out[:7] = True
    write_mask(source, "seven", left_out, {"test": 7}, {})
    code, out, _ = run("data.sources.generation.masks=[seven]")
    assert code == 0
    assert "masks leave out 7 samples; an epoch is 53" in out
    code, _, err = run("data.sources.generation.masks=[eight]")
    assert code == 2
    assert "no mask 'eight'" in err
