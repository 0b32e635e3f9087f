"""What commands print: results as lines of text. Imports no torch."""

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from data_pipeline.errors import UserError
from janus_mega.config import derive
from janus_mega.config.fields import attribute_docs, field_types, leaf_fields
from janus_mega.config.load import Resolved, load_config, load_section
from janus_mega.config.schema import ModelConfig, RunConfig
from janus_mega.config.validate import validate_run
from janus_mega.models.count import (
    image_tokenizer_parameters,
    module_parameters,
    total_parameters,
    trainable_parameters,
)
from janus_mega.observe.throughput import StepCounts, training_flops

if TYPE_CHECKING:
    from data_pipeline.prepare.options import Counts, PrepareReport
    from janus_mega.checkpoint.reader import CheckpointReader

KEY_WIDTH = 44
VALUE_WIDTH = 26
NAME_WIDTH = 24


def config_lines(resolved: Resolved[Any], *, explain: bool) -> Iterator[str]:
    """Yields `key  value  origin` for every value; with `explain`, its meaning in a comment line before."""
    docs = {field.key: field.doc for field in leaf_fields(type(resolved.config))} if explain else {}
    for key, value in resolved.values.items():
        doc = docs.get(key) or docs.get(_with_wildcard(key)) or docs.get(key.rpartition(".")[0])
        if explain and not doc:  # a dict of sections that is empty
            doc = _section_doc(type(resolved.config), key)
        if doc:
            yield f"# {doc}"
        shown = value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
        yield f"{key:<{KEY_WIDTH}} {shown:<{VALUE_WIDTH}} {resolved.origins[key]}"


def _section_doc(schema: type, key: str) -> str:
    """Returns what the field of a dotted key says of itself, where the key is no leaf."""
    *parents, name = key.split(".")
    for parent in parents:
        schema = field_types(schema)[parent]
    return attribute_docs(schema)[name]


def config_summary_lines(file: str, world_size: int) -> Iterator[str]:
    """Yields what a YAML will build: its model, and what a step does where the file is a whole run."""
    yield from model_lines(load_section(RunConfig, "model", file))
    try:
        config = load_config(RunConfig, file).config
    except UserError:
        return  # a part: keys and types were accepted above, so only values of other sections are open
    validate_run(config, world_size)
    yield ""
    yield from run_lines(config, world_size)


def model_lines(model: ModelConfig) -> Iterator[str]:
    """Yields the parameters of a model by module, and its image geometry."""
    yield f"model {model.name}"
    for module, count in module_parameters(model).items():
        yield _row(module.value, f"{count:>16,}")
    yield _row("all", f"{total_parameters(model):>16,}")
    yield _row("image tokenizer, frozen", f"{sum(image_tokenizer_parameters(model.image_tokenizer).values()):>16,}")
    grid, drawn = derive.understanding_grid(model.understanding), derive.generation_grid(model.image_tokenizer)
    yield _row("images in", f"{model.understanding.image_size} px, {grid} x {grid} = {grid**2} tokens")
    codes = model.image_tokenizer.codebook_size
    yield _row("images out", f"{model.image_tokenizer.image_size} px, {drawn} x {drawn} = {drawn**2} ids of {codes}")


def run_lines(config: RunConfig, world_size: int) -> Iterator[str]:
    """Yields what one step of a run does on `world_size` ranks."""
    parallel, stage = config.parallel, config.stage
    dp_size = derive.dp_size(parallel, world_size)
    tokens, last_step = derive.tokens_per_step(config), derive.last_step(stage)
    flops = training_flops(config.model, StepCounts(tokens=1), stage.trainable, config.data.seq_len)
    micro_batches = derive.num_micro_batches(stage.global_batch_size, parallel.micro_batch_size, dp_size)
    yield f"run {config.name}, stage {stage.name}"
    yield _row("trainable parameters", f"{trainable_parameters(config.model, stage.trainable):>16,}")
    yield _row("ranks", f"{world_size} = tp {parallel.tp_size} x pp {parallel.pp_size} x dp {dp_size}")
    yield _row("rows per step", f"{stage.global_batch_size} in {micro_batches} micro-batches per dp rank")
    yield _row("positions", f"{tokens:,} per step, {tokens * last_step:,} in {last_step:,} steps")
    yield _row("backbone per token", f"{flops / 1e9:.2f} GFLOP (causal, forward and backward)")
    shares = ", ".join(f"{task} {share:.0%}" for task, share in derive.task_shares(config).items())
    yield _row("mixture", f"{shares} of {config.data.ratio_unit.value}")


def checkpoint_lines(reader: "CheckpointReader") -> Iterator[str]:
    """Yields what a checkpoint directory holds."""
    state = reader.read_state()
    names = reader.weight_names
    yield f"checkpoint {reader.directory}"
    yield _row("step", f"{state.step:,} ({state.consumed_rows:,} rows)")
    yield _row("plan", state.plan_digest[:12] or "none")
    yield _row("weights", f"{len(names)} tensors, {sum(_product(reader.shape(name)) for name in names):,} values")
    yield _row("files", f"{len(reader.manifest['files'])}, {_size_of(reader):,} bytes")


def prepare_lines(report: "PrepareReport") -> Iterator[str]:
    """Yields what a prepare command wrote."""
    yield f"{report.path}: {report.num_samples:,} samples of kind {report.kind} in {report.num_shards} shards"
    if report.num_shards_missing:
        yield _row("left to other tasks", f"{report.num_shards_missing} shards; the last task to end writes the index")
    yield _row("text tokens", f"{report.num_text_tokens:,}")
    yield _row("images", f"{report.num_images:,}")
    if report.num_shards_kept:
        yield _row("finished before", f"{report.num_shards_kept} shards")
    for reason, count in sorted(report.rejects.items()):
        yield _row(f"left out: {reason}", f"{count:,}")


def tally_note(made: "Counts", elapsed_s: float) -> str:
    """Returns how fast prepare is and what it left out, for the end of a line of progress."""
    if elapsed_s <= 0 or not made.records:
        return ""
    rates = {"records": made.records, "tokens": made.text_tokens, "images": made.images}
    parts = [f"{_short(count / elapsed_s)} {name}/s" for name, count in rates.items() if count]
    rejects = [f"{count:,} {reason}" for reason, count in sorted(made.rejects.items())]
    return ", ".join(parts + ([f"left out: {', '.join(rejects)}"] if rejects else []))


def _short(value: float) -> str:
    """Three digits or so: 3.2, 412, 1.3k, 27M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _row(name: str, value: str) -> str:
    return f"  {name:<{NAME_WIDTH}} {value}"


def _product(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _size_of(reader: "CheckpointReader") -> int:
    return sum(int(entry["bytes"]) for entry in reader.manifest["files"].values())


def _with_wildcard(key: str) -> str:
    """Returns data.sources.*.path for data.sources.prose.path."""
    parts = key.split(".")
    return ".".join(["*" if number == len(parts) - 2 else part for number, part in enumerate(parts)])
