"""An export against the training model on packed rows: logits, greedy text, greedy guided images.

Weights are random in every layer, so that each tensor matters. Largest relative difference of logits measured on CPU:
1.2e-6. Every planted fault of conversion must exceed the bar at least FACTOR times, or change what is generated.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_pipeline.dialogue import SpecialIds
from data_pipeline.spec import Template
from janus_mega.checkpoint.hf.config import check_expressible, model_config
from janus_mega.checkpoint.hf.export import export_hf
from janus_mega.checkpoint.hf.model import expected_shapes
from janus_mega.checkpoint.hf.names import HF_ROWS, IMAGE_TOKENIZER_PREFIX
from janus_mega.checkpoint.name_map import convert, plan_import
from janus_mega.checkpoint.trained import heads_of
from janus_mega.config.load import load_section
from janus_mega.config.schema import LossConfig, ModelConfig, ParallelConfig, RunConfig
from janus_mega.infer.model import load_trained
from janus_mega.infer.verify import Probes, verify_export
from janus_mega.models.janus import build_chunks
from janus_mega.models.sharding import sharded_parameters
from janus_mega.parallel.groups import build_groups
from janus_mega.train.training_logits import TrainingLogits
from tests.support.documents import make_documents, random_images
from tests.support.ranks import import_what_ranks_need, results_of_ranks
from tests.support.trained import make_checkpoint

BAR = 1e-5
FACTOR = 5
LAYER = "model.language_model.layers.1"

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module", autouse=True)
def _heavy_imports() -> None:
    import_what_ranks_need()


def verify_all(checkpoint: Path, exports: list[Path], with_greedy: bool) -> list[dict[str, Any]]:
    """Runs in a rank: `verify_export` of each directory against the packed training model."""
    groups = build_groups(1, 1)
    ours = load_trained(checkpoint)
    packed = TrainingLogits(ours.trained, groups)
    documents = make_documents(ours.dialogue) + make_documents(ours.dialogue, seed=1)
    assert sum(len(document.input_ids) for document in documents[:2]) < ours.trained.config.data.seq_len  # shared rows
    probes = Probes(documents)
    if with_greedy:
        questions = [("What do you see?", random_images(2, 16)), ("Who?", []), ("Which?", random_images(1, 16, 3))]
        probes = Probes(documents, questions, ("a red square", "the number nine"))
    found = [verify_export(export, ours, probes, packed, max_new_tokens=12) for export in exports]
    return [{**asdict(check), "max": check.max_relative_diff} for check in found]


@pytest.mark.parametrize("template", list(Template))
def test_export_equals_the_training_model(tmp_path: Path, template: Template) -> None:
    checkpoint = make_checkpoint(tmp_path, template=template)
    export = export_hf(checkpoint, tmp_path / "export")
    (found,) = results_of_ranks(verify_all, 1, checkpoint, [export], True)[0]
    assert set(found["num_positions"]) == {"text", "understanding", "image"}
    assert min(found["num_positions"].values()) > 50
    assert found["max"] <= BAR, found
    assert found["prompts_equal"] and found["text_equal"] and found["image_equal"]


def change_weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def plant(export: Path) -> None:
        weights = load_file(export / "model.safetensors")
        change(weights)
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, export / "model.safetensors")

    return plant


def change_json(name: str, change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def plant(export: Path) -> None:
        content = json.loads((export / name).read_text())
        change(content)
        (export / name).write_text(json.dumps(content))

    return plant


def swap(first: str, second: str) -> Callable[[Path], None]:
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights[first], weights[second] = weights[second], weights[first]

    return change_weights(change)


def ungrouped_qkv(weights: dict[str, torch.Tensor]) -> None:
    """The fused rows cut as q, then k, then v, as if they were not grouped by kv head."""
    names = [f"{LAYER}.self_attn.{part}_proj.weight" for part in "qkv"]
    q, k, v = (weights[name] for name in names)
    head_dim, num_kv = 8, len(k) // 8
    grouped = zip(q.chunk(num_kv), k.chunk(num_kv), v.chunk(num_kv), strict=True)
    fused = torch.cat([torch.cat(group) for group in grouped])
    assert len(q) == 4 * head_dim
    for name, part in zip(names, fused.split([len(q), len(k), len(v)]), strict=True):
        weights[name] = part


def forget_head_bias(weights: dict[str, torch.Tensor]) -> None:
    weights["model.generation_head.vision_head.bias"].zero_()


def set_rope(config: dict[str, Any]) -> None:
    config["text_config"]["rope_theta"] = config["text_config"]["rope_parameters"]["rope_theta"] = 10000.0


def set_clip_statistics(config: dict[str, Any]) -> None:
    config["image_mean"], config["image_std"] = [0.481, 0.458, 0.408], [0.269, 0.261, 0.276]


PLANTED = {
    "gate and up swapped": swap(f"{LAYER}.mlp.gate_proj.weight", f"{LAYER}.mlp.up_proj.weight"),
    "norms swapped": swap(f"{LAYER}.input_layernorm.weight", f"{LAYER}.post_attention_layernorm.weight"),
    "k and v swapped": swap(f"{LAYER}.self_attn.k_proj.weight", f"{LAYER}.self_attn.v_proj.weight"),
    "qkv not grouped": change_weights(ungrouped_qkv),
    "embedding tied to the head": swap("lm_head.weight", "model.language_model.embed_tokens.weight"),
    "image head without bias": change_weights(forget_head_bias),
    "generation aligner layers": swap(
        "model.generation_aligner.hidden_layers.0.bias", "model.generation_aligner.fc1.bias"
    ),
    "understanding aligner layers": swap("model.aligner.hidden_layers.0.bias", "model.aligner.fc1.bias"),
    "another rope base": change_json("config.json", set_rope),
    "another norm epsilon": change_json("config.json", lambda config: config["text_config"].update(rms_norm_eps=1e-3)),
    "pixels normalised for CLIP": change_json("preprocessor_config.json", set_clip_statistics),
}


def test_planted_faults_of_logits_are_seen(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path)
    export = export_hf(checkpoint, tmp_path / "export")
    exports = []
    for number, plant in enumerate(PLANTED.values()):
        exports.append(Path(shutil.copytree(export, tmp_path / f"planted-{number}")))
        plant(exports[-1])
    found = results_of_ranks(verify_all, 1, checkpoint, exports, False)[0]
    seen = {name: check["max"] for name, check in zip(PLANTED, found, strict=True)}
    assert all(value > FACTOR * BAR for value in seen.values()), seen


def wrong_pad(config: dict[str, Any]) -> None:
    config["pad_token_id"] = config["eos_token_id"]


def wrong_template(export: Path) -> None:
    path = export / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|User|>", "User"))


def test_planted_faults_of_generation_are_seen(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path)
    export = export_hf(checkpoint, tmp_path / "export")
    plants: dict[str, tuple[str, Callable[[Path], None]]] = {
        "pads of the unconditional branch": ("image_equal", change_json("generation_config.json", wrong_pad)),
        "chat template of the other model": ("prompts_equal", wrong_template),
    }
    exports = []
    for number, (_, plant) in enumerate(plants.values()):
        exports.append(Path(shutil.copytree(export, tmp_path / f"planted-{number}")))
        plant(exports[-1])
    found = results_of_ranks(verify_all, 1, checkpoint, exports, True)[0]
    for (name, (verdict, _)), check in zip(plants.items(), found, strict=True):
        assert check[verdict] is False, name


MODELS = sorted(path.name for path in (Path(__file__).resolve().parents[2] / "configs" / "model").glob("*.yaml"))


def trained_shapes(models: list[ModelConfig]) -> list[dict[str, list[int]]]:
    """Runs in a rank: names and shapes of the training model on the meta device."""
    layout = build_groups(1, 1).layout
    found = []
    for model in models:
        chunks = build_chunks(model, ParallelConfig(), LossConfig(), layout)
        shards = sharded_parameters(chunks, layout)
        found.append({shard.name: list(shard.global_shape) for shard in shards})
    return found


def test_every_model_config_has_the_tensors_that_transformers_expects() -> None:
    models: list[ModelConfig] = [load_section(RunConfig, "model", f"model/{name}") for name in MODELS]
    assert len(models) >= 4
    for model, ours in zip(models, results_of_ranks(trained_shapes, 1, models)[0], strict=True):
        check_expressible(model)
        theirs = expected_shapes(model_config(model, SpecialIds(1, 2, 3, 4, 5, 6)))

        def read(name: str, theirs: dict[str, tuple[int, ...]] = theirs) -> torch.Tensor:
            return torch.empty(theirs[name], device="meta")

        mapped = dict(convert(plan_import(HF_ROWS, theirs), read, heads_of(model)))
        shapes = {name: list(x.shape) for name, x in mapped.items() if not name.startswith(IMAGE_TOKENIZER_PREFIX)}
        assert shapes == ours
