"""Every shipped YAML loads and validates, and says what the papers say."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from data_pipeline.errors import UserError
from janus_mega.config import derive
from janus_mega.config.load import config_root, dump, load_config, load_section, resolve_any, save
from janus_mega.config.schema import Module, RunConfig, Schedule, TokenizerRunConfig
from janus_mega.config.validate import validate_any, validate_run
from janus_mega.config.validate_mixture import curve_of
from janus_mega.models.count import image_tokenizer_parameters, module_parameters, total_parameters
from janus_mega.models.janus import MODULE_ATTRIBUTES, build_chunks
from janus_mega.models.vision.vq import VqModel
from janus_mega.parallel.groups import build_groups
from tests.support.ranks import results_of_ranks

ROOT = config_root()
EVERY_FILE = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.yaml"))
RUNS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("run/*.yaml"))
WORLD_SIZES = {"janus_1b": 128, "janus_pro_1b": 128, "janus_pro_7b": 256}
"""GPUs that the papers used; other runs are checked on one process."""


def is_whole_run(name: str) -> bool:
    return "name" in (yaml.safe_load((ROOT / name).read_text()) or {})


def is_chain(name: str) -> bool:
    return name.startswith("chain/")


def world_size_of(name: str) -> int:
    return next((size for prefix, size in WORLD_SIZES.items() if Path(name).name.startswith(f"{prefix}_stage")), 1)


@pytest.mark.parametrize("name", [name for name in EVERY_FILE if is_whole_run(name)])
def test_runs_load_validate_and_survive_a_round_trip(name, tmp_path):
    resolved = resolve_any(ROOT / name)
    validate_any(resolved.config, world_size_of(name))
    assert set(resolved.origins) == set(resolved.values)
    save(resolved.config, tmp_path / "config.yaml")
    assert load_config(type(resolved.config), tmp_path / "config.yaml").config == resolved.config


@pytest.mark.parametrize("name", [name for name in EVERY_FILE if not (is_whole_run(name) or is_chain(name))])
def test_parts_have_known_keys_and_right_types(name):
    """A part leaves things open, so only missing values may be complained about."""
    schema = TokenizerRunConfig if "image_tokenizer" in yaml.safe_load((ROOT / name).read_text()) else RunConfig
    with pytest.raises(UserError, match="no value for") as caught:
        load_config(schema, ROOT / name)
    assert "unknown key" not in str(caught.value)


@pytest.mark.parametrize("name", EVERY_FILE)
def test_every_file_opens_with_a_comment(name):
    assert (ROOT / name).read_text().startswith("#")


ADAPTORS = {
    Module.understanding_adaptor,
    Module.generation_adaptor,
    Module.generation_embedding,
    Module.image_head,
}
LANGUAGE_MODEL = {Module.text_embedding, Module.backbone, Module.text_head}
TRAINABLE = {
    1: ADAPTORS,
    2: ADAPTORS | LANGUAGE_MODEL,
    3: ADAPTORS | LANGUAGE_MODEL | {Module.understanding_encoder},
}

# run: (lr, schedule, warm-up, planned steps, last step, rows per step, weight decay, (und, text, gen))
PAPER = {
    "janus_1b_stage1": (1e-3, Schedule.cosine, 300, 10_000, 10_000, 256, 0.0, (1, 0, 1)),
    "janus_1b_stage2": (1e-4, Schedule.constant, 5_000, 180_000, 180_000, 512, 0.0, (2, 3, 5)),
    "janus_1b_stage3": (2e-5, Schedule.constant, 0, 24_000, 24_000, 256, 0.1, (7, 3, 10)),
    "janus_pro_1b_stage1": (1e-3, Schedule.constant, 600, 20_000, 20_000, 256, 0.0, (1, 0, 3)),
    "janus_pro_1b_stage2": (1e-4, Schedule.constant, 5_000, 360_000, 270_000, 512, 0.0, (2, 3, 5)),
    "janus_pro_1b_stage3": (4e-5, Schedule.constant, 0, 80_000, 80_000, 128, 0.0, (5, 1, 4)),
    "janus_pro_7b_stage1": (1e-3, Schedule.constant, 600, 20_000, 20_000, 256, 0.0, (1, 0, 3)),
    "janus_pro_7b_stage2": (1e-4, Schedule.constant, 5_000, 360_000, 270_000, 512, 0.0, (2, 3, 5)),
    "janus_pro_7b_stage3": (4e-5, Schedule.constant, 0, 40_000, 40_000, 128, 0.0, (5, 1, 4)),
}


@pytest.mark.parametrize("run", PAPER)
def test_stages_say_what_the_papers_say(run):
    config = load_config(RunConfig, f"run/{run}.yaml").config
    optimizer, stage = config.optimizer, config.stage
    lr, schedule, warmup_steps, num_steps, last_step, batch, weight_decay, ratio = PAPER[run]
    assert (optimizer.lr, optimizer.schedule, optimizer.warmup_steps) == (lr, schedule, warmup_steps)
    assert (stage.num_steps, derive.last_step(stage), stage.global_batch_size) == (num_steps, last_step, batch)
    assert (optimizer.weight_decay, optimizer.beta1, optimizer.beta2) == (weight_decay, 0.9, 0.95)
    assert optimizer.clip_grad_norm == 1.0
    assert set(stage.trainable) == TRAINABLE[int(run[-1])]
    shares = derive.task_shares(config)
    expected = dict(zip(("understanding", "text", "generation"), ratio, strict=True))
    assert shares == pytest.approx({task: share / sum(ratio) for task, share in expected.items() if share})
    assert config.data.seq_len == 4096
    assert config.data.template.value == ("deepseek_old" if run.startswith("janus_1b") else "deepseek")


def test_stage_two_of_janus_draws_imagenet_alone_and_then_the_rest():
    """ImageNet in the first 120,000 of 180,000 steps; the ratio of tasks never changes."""
    sources = load_config(RunConfig, "run/janus_1b_stage2.yaml").config.data.sources
    curves = {name: curve_of(source) for name, source in sources.items()}
    for step, drawn_from in ((0, "imagenet"), (119_999, "imagenet"), (120_000, "generation"), (179_999, "generation")):
        weights = {name: curve.at(step) for name, curve in curves.items() if curve.at(step)}
        assert weights == {"understanding": 2, "text": 3, drawn_from: 5}


# Published sizes in millions, at the digits that the papers' tables and the released files support.
JANUS_1B = {
    Module.text_embedding: 209.7,
    Module.understanding_encoder: 303.7,
    Module.understanding_adaptor: 6.3,
    Module.generation_embedding: 0.1,
    Module.generation_adaptor: 4.2,
    Module.backbone: 1233.2,
    Module.text_head: 209.7,
    Module.image_head: 37.8,
}
JANUS_PRO_7B = {
    **JANUS_1B,
    Module.text_embedding: 419.4,
    Module.understanding_adaptor: 21.0,
    Module.generation_adaptor: 16.8,
    Module.backbone: 6071.5,
    Module.text_head: 419.4,
    Module.image_head: 83.9,
}


@pytest.mark.parametrize(
    ("name", "millions"), [("janus_1b", JANUS_1B), ("janus_pro_1b", JANUS_1B), ("janus_pro_7b", JANUS_PRO_7B)]
)
def test_parameter_counts_are_the_published_ones(name, millions):
    model = load_section(RunConfig, "model", f"model/{name}.yaml")
    counts = {module: round(count / 1e6, 1) for module, count in module_parameters(model).items()}
    assert counts == millions


@pytest.mark.parametrize("name", ["janus_1b", "janus_pro_7b"])
def test_image_tokenizer_counts_are_vq16s(name):
    tokenizer = load_section(RunConfig, "model", f"model/{name}.yaml").image_tokenizer
    parts = image_tokenizer_parameters(tokenizer)
    assert round(sum(parts.values()) / 1e6, 2) == 71.88
    assert (round(parts["encoder"] / 1e6, 1), round(parts["decoder"] / 1e6, 1)) == (29.3, 42.4)


def build_every_run():
    """Builds the model of every run on the meta device; returns parameters by module, and of the whole chunk."""
    layout = build_groups(tp_size=1, pp_size=1).layout
    built = {}
    for name in RUNS:
        config = load_config(RunConfig, name).config
        parallel = replace(config.parallel, tp_size=1, pp_size=1, sequence_parallel=False)
        (chunk,) = build_chunks(config.model, parallel, config.loss, layout)
        assert all(parameter.device.type == "meta" for parameter in chunk.parameters())
        built[name] = {
            module.value: sum(parameter.numel() for parameter in getattr(chunk, attribute).parameters())
            for module, attribute in MODULE_ATTRIBUTES.items()
        }
        built[name]["all"] = sum(parameter.numel() for parameter in chunk.parameters())
    return built


@pytest.fixture(scope="module")
def built_runs():
    return results_of_ranks(build_every_run, 1)[0]


@pytest.mark.parametrize("name", RUNS)
def test_every_run_builds_on_the_meta_device_with_the_counted_parameters(name, built_runs):
    model = load_config(RunConfig, name).config.model
    counted = {module.value: count for module, count in module_parameters(model).items()}
    assert built_runs[name] == {**counted, "all": total_parameters(model)}


@pytest.mark.parametrize("name", ["tiny", "janus_1b", "janus_pro_7b"])
def test_image_tokenizers_build_with_the_counted_parameters(name):
    tokenizer = load_section(RunConfig, "model", f"model/{name}.yaml").image_tokenizer
    with torch.device("meta"):
        model = VqModel(tokenizer)
    built = sum(parameter.numel() for parameter in model.parameters())
    assert built == sum(image_tokenizer_parameters(tokenizer).values())


@pytest.mark.parametrize(("name", "gigabytes"), [("janus_1b", 4.178), ("janus_pro_7b", 14.84)])
def test_the_released_checkpoints_have_the_computed_size(name, gigabytes):
    """Released files also hold the tokenizer, its usage buffer and SigLIP's attention pool, which nothing uses."""
    model = load_section(RunConfig, "model", f"model/{name}.yaml")
    width, mlp = model.understanding.hidden_size, derive.encoder_ffn_size(model.understanding)
    attention = 4 * (width * width + width)
    attention_pool = attention + (width * mlp + mlp) + (mlp * width + width) + 2 * width + width
    stored = total_parameters(model) + sum(image_tokenizer_parameters(model.image_tokenizer).values()) + attention_pool
    usage_buffer_bytes = 65_536 * 4
    assert (2 * stored + usage_buffer_bytes) / 1e9 == pytest.approx(gigabytes, abs=0.006)


def test_dump_names_every_section():
    config = load_config(RunConfig, "run/tiny_cpu.yaml").config
    assert set(yaml.safe_load(dump(config))) == set(RunConfig.__dataclass_fields__)


def test_a_paper_run_refuses_a_world_that_does_not_divide():
    config = load_config(RunConfig, "run/janus_pro_7b_stage2.yaml").config
    with pytest.raises(UserError, match="world size 6 is not divisible"):
        validate_run(config, world_size=6)
