"""Precedence, origins, and messages that name everything that is wrong at once."""

import pytest

from data_pipeline.errors import UserError
from data_pipeline.spec import Task
from janus_mega.config.load import config_root, dump, load_config, load_section, resolve_any, save
from janus_mega.config.schema import Precision, RunConfig, Schedule, TokenizerRunConfig

MINIMAL = """\
include: [model/tiny.yaml]
name: minimal
run_dir: runs/minimal
data:
  text_tokenizer: text.model
  sources:
    prose: {path: shards/prose}
optimizer:
  lr: 1e-3
stage:
  name: all
  num_steps: 10
  global_batch_size: 4
  trainable: [backbone]
"""


@pytest.fixture
def write(tmp_path):
    def write(text, name="run.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def message(*arguments):
    with pytest.raises(UserError) as caught:
        load_config(RunConfig, *arguments)
    return str(caught.value)


def test_later_layers_win(write):
    write("optimizer: {lr: 1.0, beta1: 0.5, beta2: 0.6, eps: 1e-7}\n", "first.yaml")
    write("optimizer: {beta1: 0.7, beta2: 0.8}\n", "second.yaml")
    path = write(MINIMAL.replace("[model/tiny.yaml]", "[model/tiny.yaml, first.yaml, second.yaml]"))
    optimizer = load_config(RunConfig, path, ["optimizer.beta2=0.99"]).config.optimizer
    assert (optimizer.lr, optimizer.beta1, optimizer.beta2, optimizer.eps) == (1e-3, 0.7, 0.99, 1e-7)
    assert optimizer.clip_grad_norm == 1.0


def test_every_value_has_an_origin(write):
    path = write(MINIMAL)
    resolved = load_config(RunConfig, path, ["seed=3", "data.sources.prose.weight=2"])
    assert resolved.origins["seed"] == "override"
    assert resolved.origins["optimizer.lr"] == f"{path}:9"
    assert resolved.origins["model.backbone.num_heads"].endswith("model/tiny.yaml:8")
    assert resolved.origins["optimizer.beta1"] == "default"
    assert resolved.origins["data.sources.prose.weight"] == "override"
    assert resolved.origins["data.sources.prose.path"] == f"{path}:7"
    assert resolved.values["data.sources.prose.weight"] == 2.0


def test_the_result_is_plain_and_frozen(write):
    config = load_config(RunConfig, write(MINIMAL), ["optimizer.schedule=cosine", "parallel.precision=fp32"]).config
    assert type(config) is RunConfig
    assert config.optimizer.schedule is Schedule.cosine
    assert config.parallel.precision is Precision.fp32
    assert config.data.sources["prose"].task is Task.text
    assert type(config.stage.trainable) is list
    with pytest.raises(AttributeError):
        config.seed = 4


def test_lists_replace_and_dicts_merge(write):
    config = load_config(
        RunConfig, write(MINIMAL), ["stage.trainable=[text_head]", "loss.task_weights.text=0.5"]
    ).config
    assert [module.value for module in config.stage.trainable] == ["text_head"]
    assert config.loss.task_weights == {"text": 0.5, "understanding": 1.0, "generation": 1.0}


def test_a_shipped_file_is_found_by_its_name():
    assert load_config(RunConfig, "run/tiny_cpu.yaml").config.name == "tiny_cpu"


def test_a_dumped_config_loads_back_equal(write, tmp_path):
    config = load_config(RunConfig, write(MINIMAL)).config
    save(config, tmp_path / "saved.yaml")
    assert load_config(RunConfig, tmp_path / "saved.yaml").config == config
    assert not list(tmp_path.glob("*.tmp"))
    assert "schedule: constant" in dump(config)


def test_all_wrong_values_are_reported_at_once_with_their_lines(write):
    path = write(MINIMAL.replace("  lr: 1e-3", "  lr: fast\n  shedule: cosine") + "paralel: {tp_size: 2}\n")
    text = message(path, ["tp_size=2"])
    assert f"{path}:10: unknown key 'optimizer.shedule'; did you mean 'optimizer.schedule'?" in text
    assert f"{path}:16: unknown key 'paralel'; did you mean 'parallel'?" in text
    assert "override: unknown key 'tp_size'; did you mean 'parallel.tp_size'?" in text
    assert f"{path}:9: optimizer.lr: Value 'fast'" in text


def test_a_single_problem_is_a_single_line(write):
    text = message(write(MINIMAL), ["data.sources.prose.wieght=2"])
    assert text == "override: unknown key 'data.sources.prose.wieght'; did you mean 'data.sources.prose.weight'?"


def test_all_missing_values_are_named_together(write):
    text = message(write("name: x\ndata: {sources: {prose: {weight: 1}}}\n"))
    assert text.count("\n") == 0
    for key in ("run_dir", "model.backbone.hidden_size", "data.sources.prose.path", "optimizer.lr", "stage.num_steps"):
        assert key in text


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("name: x\nname: y\n", ":2: name is given on line 1 already"),
        ("name: [x\n", ":2: not valid YAML"),
        ("- x\n", "is not a mapping"),
        ("parallel: 3\n", ":1: parallel: "),
        ("parallel:\n", "parallel"),
        ("stage: {trainable: [backbon]}\n", "expected one of"),
        ("parallel: {tp_size: 1.5}\n", "could not be converted to Integer"),
        ("include: [nowhere.yaml]\n", "config file nowhere.yaml not found: looked for "),
        ("include: run/tiny_cpu.yaml\n", "includes are one level deep"),
        ("include: {a: b}\n", "include must be a list"),
        (MINIMAL.replace("name: minimal", "name: ${nothing}"), "'nothing' not found"),
    ],
)
def test_malformed_files_are_explained(write, text, complaint):
    assert complaint in message(write(text))


def test_binary_files_are_refused(tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not a text file" in message(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("override", "complaint"), [("seed", "not of the form key=value"), ("name=[", "quote the value")]
)
def test_malformed_overrides_are_explained(write, override, complaint):
    assert complaint in message(write(MINIMAL), [override])


def test_one_section_of_an_open_file():
    model = load_section(RunConfig, "model", "model/tiny.yaml", ["model.backbone.num_layers=2"])
    assert (model.name, model.backbone.num_layers) == ("tiny", 2)
    with pytest.raises(UserError, match="no value for stage.name, stage.num_steps, stage.global_batch_size"):
        load_section(RunConfig, "stage", "model/tiny.yaml")


def test_the_kind_of_run_is_told_by_its_sections(write):
    tokenizer = """\
name: vq
run_dir: runs/vq
image_tokenizer: {image_size: 16, base_channels: 32, channel_multiplier: [1, 2, 2], codebook_size: 256}
data: {path: raw}
optimizer: {lr: 1e-3}
num_steps: 5
global_batch_size: 8
"""
    assert isinstance(resolve_any(write(tokenizer)).config, TokenizerRunConfig)
    assert isinstance(resolve_any(write(MINIMAL)).config, RunConfig)


def test_the_config_root_holds_the_shipped_files():
    assert (config_root() / "model" / "janus_1b.yaml").is_file()
