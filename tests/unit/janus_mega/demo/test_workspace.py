"""A workspace never deletes what no demo wrote, and every path of a configuration leads into it."""

from pathlib import Path

import pytest

from data_pipeline.errors import UserError
from janus_mega.config.validate import validate_run, validate_tokenizer_run
from janus_mega.demo import workspace as ws
from janus_mega.demo.making import SOURCES
from janus_mega.demo.run import RANKS


def test_a_directory_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="something else") as refusal:
        ws.open_workspace(tmp_path)
    assert "\n" not in str(refusal.value)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_an_earlier_demo_is_replaced(tmp_path):
    first = ws.open_workspace(tmp_path / "demo")
    (first.root / "report.json").write_text("{}")
    second = ws.open_workspace(tmp_path / "demo")
    assert [path.name for path in second.root.iterdir()] == [ws.MARKER]


@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("stage", ws.STAGES)
def test_stages_validate_and_point_into_the_workspace(tmp_path, stage, short):
    workspace = ws.Workspace(tmp_path)
    config = ws.stage_config(workspace, stage, short, init_from="somewhere")
    validate_run(config, RANKS)
    paths = [config.run_dir, config.data.text_tokenizer, config.data.image_tokenizer]
    paths += [source.path for source in config.data.sources.values()]
    assert all(Path(path).is_relative_to(tmp_path) for path in paths)
    assert config.stage.init_from == "somewhere"
    assert {Path(source.path).name for source in config.data.sources.values()} <= set(SOURCES)


@pytest.mark.parametrize("short", [False, True])
def test_the_image_tokenizer_validates_and_is_the_models(tmp_path, short):
    workspace = ws.Workspace(tmp_path)
    config = ws.image_tokenizer_config(workspace, short)
    validate_tokenizer_run(config, RANKS)
    assert Path(config.data.path).is_relative_to(tmp_path)
    assert config.image_tokenizer == ws.stage_config(workspace, "stage1", short).model.image_tokenizer
