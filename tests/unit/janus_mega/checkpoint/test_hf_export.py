"""The exported directory: whole or absent, what both versions of transformers read, and back again bit for bit."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor, GenerationConfig
from transformers.models.janus.modeling_janus import JanusForConditionalGeneration

from data_pipeline.dialogue import pieces_text, question_pieces
from data_pipeline.errors import UserError
from data_pipeline.spec import Template
from janus_mega.checkpoint.disk import Disk
from janus_mega.checkpoint.hf import export as hf_export
from janus_mega.checkpoint.hf.config import chat_template, check_expressible
from janus_mega.checkpoint.hf.export import export_hf
from janus_mega.checkpoint.hf.importing import import_hf
from janus_mega.checkpoint.manager import load_weights, save_checkpoint
from janus_mega.checkpoint.reader import open_checkpoint
from janus_mega.checkpoint.trained import open_trained
from janus_mega.models.vision.siglip import normalize_pixels
from janus_mega.parallel.slices import Slice
from tests.support.documents import random_images
from tests.support.trained import MODEL


def read(export: Path, name: str) -> dict:
    return json.loads((export / name).read_text())


def test_directory_is_complete(export: Path) -> None:
    assert {path.name for path in export.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "processor_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }


def test_known_traps_are_written(export: Path) -> None:
    config = read(export, "config.json")
    assert config["tie_word_embeddings"] is False and config["text_config"]["tie_word_embeddings"] is False
    text = config["text_config"]
    assert text["rope_theta"] == text["rope_parameters"]["rope_theta"] == MODEL.backbone.rope_theta
    ids = read(export, "tokenizer.json")
    by_string = {token["content"]: token["id"] for token in ids["added_tokens"]}
    assert config["image_token_id"] == by_string["<image_placeholder>"]
    generation = GenerationConfig.from_pretrained(export)
    assert generation.generation_kwargs["boi_token_id"] == by_string["<begin_of_image>"]
    assert generation.pad_token_id == by_string["<｜▁pad▁｜>"]
    assert read(export, "preprocessor_config.json")["image_mean"] == [0.5] * 3
    assert read(export, "processor_config.json")["num_image_tokens"] == 16
    assert isinstance(read(export, "tokenizer_config.json")["extra_special_tokens"], dict)


def test_transformers_loads_it_without_a_missing_or_spare_tensor(export: Path) -> None:
    network, report = JanusForConditionalGeneration.from_pretrained(
        export, local_files_only=True, output_loading_info=True
    )
    assert not any(report.values()), report
    assert not torch.equal(network.lm_head.weight, network.get_input_embeddings().weight)
    assert network.config.text_config.rope_parameters["rope_theta"] == MODEL.backbone.rope_theta


def test_image_ids_of_the_exported_encoder_are_ours(export: Path, checkpoint: Path) -> None:
    """transformers' encoder does not scale codes to unit length, so this holds for unit rows alone."""
    network = JanusForConditionalGeneration.from_pretrained(export, local_files_only=True).eval()
    tokenizer = open_trained(checkpoint).image_tokenizer
    images = np.stack(random_images(16, 16))
    ours = tokenizer.encode(images)
    with torch.no_grad():
        pixels = normalize_pixels(torch.from_numpy(images))
        theirs = network.model.vqmodel.encode(pixels).image_tokens.view(16, -1)
        decoded = network.model.vqmodel.decode(torch.from_numpy(ours.astype(np.int64)))
    assert len(np.unique(ours)) > 10
    # Their features keep their length; among unit codes that changes no ranking of |z - e|^2 = |z|^2 + 1 - 2 z e.
    assert (theirs.numpy() == ours).all()
    again = ((decoded + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()
    assert np.abs(again.astype(int) - tokenizer.decode(ours).astype(int)).max() <= 1


def test_import_of_the_export_is_the_identity(export: Path, checkpoint: Path) -> None:
    imported = import_hf(export)
    ours = load_weights(checkpoint)
    assert imported.weights.keys() == ours.keys()
    assert all(torch.equal(imported.weights[name], ours[name]) for name in ours)
    tokenizer = open_trained(checkpoint).image_tokenizer.model.state_dict()
    assert imported.image_tokenizer_weights.keys() == tokenizer.keys()
    assert all(torch.equal(imported.image_tokenizer_weights[name], tokenizer[name]) for name in tokenizer)
    assert imported.model == replace(MODEL, name=export.name)


def test_shards_hold_the_same_tensors(export: Path, checkpoint: Path, tmp_path: Path) -> None:
    sharded = export_hf(checkpoint, tmp_path / "sharded", max_shard_bytes=100_000)
    index = read(sharded, "model.safetensors.index.json")
    whole = load_file(export / "model.safetensors")
    files = set(index["weight_map"].values())
    assert len(files) > 3 and index["weight_map"].keys() == whole.keys()
    for file in files:
        for name, tensor in load_file(sharded / file).items():
            assert torch.equal(tensor, whole[name]) and index["weight_map"][name] == file
    imported, plain = import_hf(sharded), import_hf(export)
    assert all(torch.equal(imported.weights[name], plain.weights[name]) for name in plain.weights)


def test_bfloat16_export_says_so(checkpoint: Path, tmp_path: Path) -> None:
    out = export_hf(checkpoint, tmp_path / "half", dtype="bfloat16")
    network = JanusForConditionalGeneration.from_pretrained(out, local_files_only=True)
    assert network.dtype == torch.bfloat16
    with pytest.raises(UserError, match="int8"):
        export_hf(checkpoint, tmp_path / "other", dtype="int8")


def test_nothing_is_left_half_written(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(hf_export, "_write_weights", fail)
        with pytest.raises(OSError, match="disk full"):
            export_hf(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export_hf(checkpoint, tmp_path / "out")
    with pytest.raises(UserError, match="exists already"):
        export_hf(checkpoint, tmp_path / "out")
    export_hf(checkpoint, tmp_path / "out", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def resaved(checkpoint: Path, root: Path, weights: dict[str, torch.Tensor]) -> Path:
    """The same checkpoint with other weights."""
    reader = open_checkpoint(checkpoint)
    extra = {name: reader.path(name) for name in reader.manifest["files"] if "/" in name}
    slices = [Slice(name, tuple(x.shape), (0,) * x.ndim, x) for name, x in weights.items()]
    return save_checkpoint(root, slices, reader.read_state(), extra_files=extra)


def test_rows_that_pad_the_vocabulary_are_removed(checkpoint: Path, export: Path, tmp_path: Path) -> None:
    weights = load_weights(checkpoint)
    for name in ("text_embedding.weight", "text_head.weight"):
        weights[name] = torch.cat([weights[name], torch.full((24, weights[name].shape[1]), 9.0)])
    out = export_hf(resaved(checkpoint, tmp_path / "padded", weights), tmp_path / "out")
    assert (out / "model.safetensors").read_bytes() == (export / "model.safetensors").read_bytes()


def test_weights_that_do_not_fit_are_named(checkpoint: Path, tmp_path: Path) -> None:
    weights = load_weights(checkpoint)
    missing = {name: tensor for name, tensor in weights.items() if name != "image_head.fc1.bias"}
    with pytest.raises(UserError, match=r"model\.generation_head\.proj_out\.bias: missing \(1 in all\)"):
        export_hf(resaved(checkpoint, tmp_path / "a", missing), tmp_path / "out")
    odd = {**weights, "text_head.weight": torch.zeros(4, 4)}
    with pytest.raises(UserError, match=r"lm_head\.weight: shape \[4, 4\]"):
        export_hf(resaved(checkpoint, tmp_path / "b", odd), tmp_path / "out")
    bare = save_checkpoint(tmp_path / "c", [], open_checkpoint(checkpoint).read_state())
    with pytest.raises(UserError, match="holds 0 files under text_tokenizer"):
        export_hf(bare, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model", "what"),
    [
        (replace(MODEL, backbone=replace(MODEL.backbone, qk_norm=True)), "qk_norm"),
        (replace(MODEL, image_head_hidden_size=48), "image_head_hidden_size 48"),
        (replace(MODEL, understanding=replace(MODEL.understanding, patch_size=2)), "8x8 tokens"),
        (replace(MODEL, understanding=replace(MODEL.understanding, name="eva")), "'eva'"),
    ],
)
def test_what_the_classes_cannot_be_is_refused(model: object, what: str) -> None:
    check_expressible(MODEL)
    with pytest.raises(UserError, match=what):
        check_expressible(model)


@pytest.mark.parametrize("template", list(Template))
def test_chat_template_renders_our_prompts(export: Path, template: Template) -> None:
    processor = AutoProcessor.from_pretrained(export, local_files_only=True)
    picture, question = {"type": "image"}, {"type": "text", "text": " What is it? "}
    rendered = processor.apply_chat_template(
        [
            {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
            {"role": "user", "content": [picture, picture, question]},
        ],
        chat_template=chat_template(template),
        add_generation_prompt=True,
    )
    assert rendered == pieces_text(question_pieces(template, "What is it?", 2, system="Be brief."))
    answered = processor.apply_chat_template(
        [
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
        ],
        chat_template=chat_template(template),
    )
    assert answered == pieces_text(question_pieces(template, "a")) + " b<｜end▁of▁sentence｜>"


def test_import_refuses_what_is_not_a_janus(export: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        import_hf(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UserError, match="not 'janus'"):
        import_hf(tmp_path)
    (tmp_path / "config.json").write_text((export / "config.json").read_text())
    with pytest.raises(UserError, match=r"model\.safetensors: missing"):
        import_hf(tmp_path)


@pytest.mark.parametrize("method", ["create", "sync_file", "rename"])
def test_an_export_that_fails_leaves_nothing_half_written(checkpoint: Path, tmp_path: Path, method: str) -> None:
    class Failing(Disk):
        left = 0

    def fail(self: Failing, *args: object) -> object:
        self.left -= 1
        if self.left < 0:
            raise OSError(5, "Input/output error")
        return getattr(Disk, method)(self, *args)

    setattr(Failing, method, fail)
    out = tmp_path / "exports" / "out"
    disk = Failing()
    for disk.left in (0, 1):
        with pytest.raises(OSError, match="Input/output error"):
            export_hf(checkpoint, out, disk=disk)
        assert not out.exists()
    export_hf(checkpoint, out)
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    whole = {path.name: path.read_bytes() for path in out.iterdir()}
    for disk.left in (1, 2):  # of the renames these take the old directory away and put the new one in its place
        with pytest.raises(OSError, match="Input/output error"):
            export_hf(checkpoint, out, overwrite=True, disk=disk)
        kept = [path for path in (out, out.with_name(".trash-out")) if path.exists()]
        assert [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in kept] == [whole]
