"""A training checkpoint as a Hugging Face directory that `transformers` alone loads.

Written aside and renamed, so the directory is complete or absent. Weights stream through one shard at a time.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.errors import UserError
from data_pipeline.text import special
from janus_mega.checkpoint.disk import DISK, Disk
from janus_mega.checkpoint.format import TRASH_PREFIX, dump_json, write_bytes
from janus_mega.checkpoint.hf import config as hf_config
from janus_mega.checkpoint.hf.model import check_shapes, expected_shapes, hf_model_config, hf_weights
from janus_mega.checkpoint.hf.tokenizer import tokenizer_config, tokenizer_json
from janus_mega.checkpoint.tensor_file import write_safetensors
from janus_mega.checkpoint.trained import TrainedModel, open_trained

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Number formats of exported weights by the name that config.json uses."""
MAX_SHARD_BYTES = 5 * 10**9


def export_hf(
    checkpoint: Path | TrainedModel,
    out_dir: Path,
    *,
    dtype: str = "float32",
    overwrite: bool = False,
    use_default_system_prompt: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    disk: Disk = DISK,
) -> Path:
    """Writes a checkpoint as `JanusForConditionalGeneration` with its processor; returns `out_dir`.

    Args:
        checkpoint: a step directory, or one that was opened (`trained.open_trained`).
        out_dir: the directory to make.
        dtype: number format of the weights.
        overwrite: replace `out_dir` if it exists.
        use_default_system_prompt: let the processor put DeepSeek's system prompt before questions; only right for
            models that were trained with it.
        max_shard_bytes: weights are split into files of about this size.
        disk: where it happens.

    Raises:
        UserError: not a checkpoint of a Janus, not expressible there, or `out_dir` exists.
    """
    out_dir = Path(out_dir)
    if out_dir.exists() and not overwrite:
        raise UserError(f"{out_dir}: exists already; choose another directory or ask to overwrite it")
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}; choose one of them")
    trained = checkpoint if isinstance(checkpoint, TrainedModel) else open_trained(checkpoint)
    hf_config.check_expressible(trained.model)
    aside = out_dir.with_name(f".aside-{out_dir.name}")
    disk.make_directories(out_dir.parent)
    if aside.exists():
        disk.remove_tree(aside)
    disk.make_directory(aside)
    _write_texts(trained, aside, dtype, use_default_system_prompt, disk)
    expected = expected_shapes(hf_model_config(trained, dtype))
    weights = check_shapes(hf_weights(trained), expected)
    _write_weights(((name, tensor.to(DTYPES[dtype])) for name, tensor in weights), aside, max_shard_bytes, disk)
    disk.sync_directory(aside)
    _put_in_place(aside, out_dir, disk)
    return out_dir


def _write_texts(trained: TrainedModel, out: Path, dtype: str, use_default_system_prompt: bool, disk: Disk) -> None:
    """Everything but weights."""
    model, tokenizer = trained.model, trained.text_tokenizer
    texts = {
        "config.json": hf_model_config(trained, dtype),
        "generation_config.json": hf_config.generation_config(trained.special_ids),
        "preprocessor_config.json": hf_config.preprocessor_config(model),
        "processor_config.json": hf_config.processor_config(model, use_default_system_prompt=use_default_system_prompt),
        "tokenizer_config.json": tokenizer_config(model.backbone.max_position_embeddings),
        "special_tokens_map.json": {
            "bos_token": special.BOS,
            "eos_token": special.EOS,
            "pad_token": special.PAD,
        },
    }
    for name, content in texts.items():
        write_bytes(out / name, dump_json(content) + b"\n", disk=disk)
    write_bytes(out / "tokenizer.json", tokenizer_json(tokenizer), disk=disk)
    chat_template = hf_config.chat_template(trained.config.data.template)
    write_bytes(out / "chat_template.jinja", chat_template.encode(), disk=disk)


def _write_weights(weights: Iterable[tuple[str, Tensor]], out: Path, max_shard_bytes: int, disk: Disk) -> None:
    """Writes model.safetensors, or numbered shards with their index."""
    metadata = {"format": "pt"}
    paths, places, total = [], [], 0
    for number, shard in enumerate(_shards(weights, max_shard_bytes)):
        path = out / f"shard-{number}.safetensors"
        write_safetensors(path, shard, metadata, disk)
        paths.append(path)
        places.append([name for name, _ in shard])
        total += sum(tensor.numel() * tensor.element_size() for _, tensor in shard)
    if len(paths) == 1:
        disk.rename(paths[0], out / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, (path, names) in enumerate(zip(paths, places, strict=True)):
        name = f"model-{number + 1:05d}-of-{len(paths):05d}.safetensors"
        disk.rename(path, out / name)
        weight_map |= dict.fromkeys(names, name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_bytes(out / "model.safetensors.index.json", dump_json(index) + b"\n", disk=disk)


def _shards(weights: Iterable[tuple[str, Tensor]], max_shard_bytes: int) -> Iterator[list[tuple[str, Tensor]]]:
    shard: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in weights:
        num_bytes = tensor.numel() * tensor.element_size()
        if shard and size + num_bytes > max_shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append((name, tensor))
        size += num_bytes
    if shard:
        yield shard


def _put_in_place(aside: Path, out_dir: Path, disk: Disk) -> None:
    """Names the new directory; one that stood there is whole under its name until then, and goes after."""
    trash = out_dir.with_name(f"{TRASH_PREFIX}{out_dir.name}")
    if out_dir.exists():
        if trash.exists():
            disk.remove_tree(trash)
        disk.rename(out_dir, trash)
    disk.rename(aside, out_dir)
    disk.sync_directory(out_dir.parent)
    if trash.exists():
        disk.remove_tree(trash)
