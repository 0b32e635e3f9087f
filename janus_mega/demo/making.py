"""The phases that make things: raw files, tokenizers, shards, weights. Each runs in forked ranks (`phases`).

They call what the commands of the same names call; nothing here knows how shards, tokenizers or stages work.
"""

from pathlib import Path
from typing import Any

from data_pipeline.plan.report import describe_plan
from data_pipeline.prepare.interleaved import prepare_interleaved
from data_pipeline.prepare.options import PrepareReport, Progress, Tally
from data_pipeline.prepare.records import open_records
from data_pipeline.prepare.t2i import prepare_t2i
from data_pipeline.prepare.text import prepare_text
from data_pipeline.text.interface import TextTokenizer
from data_pipeline.text.load import load_text_tokenizer
from data_pipeline.text.train import train_sentencepiece
from janus_mega.config import derive
from janus_mega.config.schema import RunConfig, TokenizerRunConfig
from janus_mega.demo.digits import RecordCounts
from janus_mega.demo.phases import rank_and_size
from janus_mega.demo.raw import write_raw
from janus_mega.demo.workspace import Workspace
from janus_mega.models.vision.image_tokenizer import load_image_tokenizer
from janus_mega.observe.progress import Progress as Bar
from janus_mega.train.image_tokenizer import train_image_tokenizer
from janus_mega.train.janus import train_janus

INTERLEAVED = ("differences", "pairs", "questions", "descriptions")
"""Raw files of interleaved documents, the largest first."""
SOURCES = ("differences", "prose_train", "captions", "pairs", "questions", "descriptions", "prose_held_out")
"""All prepared sources, in the order in which ranks take them."""


def make_raw(workspace: Workspace, side: int, counts: RecordCounts, seed: int) -> None:
    """Writes the raw files."""
    with Bar("raw data", 1) as bar:
        write_raw(workspace.raw, side, counts, seed, bar.reach)


def make_text_tokenizer(workspace: Workspace, vocab_size: int) -> None:
    """Trains the text tokenizer on the training prose alone."""
    workspace.text_tokenizer.parent.mkdir(parents=True)
    train_sentencepiece([workspace.raw / "prose_train.jsonl"], vocab_size, workspace.text_tokenizer)


def make_image_tokenizer(config: TokenizerRunConfig) -> None:
    """Trains the image tokenizer by the common loop. Collective over: world."""
    train_image_tokenizer(config)


def make_shards(workspace: Workspace, config: RunConfig) -> dict[str, dict[str, Any]]:
    """Prepares this rank's share of the sources; returns sizes by source."""
    rank, size = rank_and_size()
    tokenizer = load_text_tokenizer(workspace.text_tokenizer)
    mine = SOURCES[rank::size]
    counts = {source: open_records([workspace.raw / f"{source}.jsonl"]).count() for source in mine}
    total, before, sizes = sum(counts.values()), 0, {}
    with Bar("shards", total, enabled=rank == 0) as bar:
        for source in mine:

            def reach(tally: Tally, before: int = before) -> None:
                bar.reach(before + tally.done, total)

            report = _prepare(workspace, config, source, tokenizer, reach)
            sizes[source] = {"samples": report.num_samples, "text_tokens": report.num_text_tokens}
            before += counts[source]
    return sizes


def _prepare(
    workspace: Workspace, config: RunConfig, source: str, tokenizer: TextTokenizer, progress: Progress
) -> PrepareReport:
    raw, out = [workspace.raw / f"{source}.jsonl"], workspace.shards(source)
    if source in INTERLEAVED:
        return prepare_interleaved(raw, out, tokenizer, template=config.data.template, progress=progress)
    if source == "captions":
        images = load_image_tokenizer(workspace.image_tokenizer)
        return prepare_t2i(raw, out, tokenizer, images, progress=progress)
    return prepare_text(raw, out, tokenizer, progress=progress)


def make_stage(config: RunConfig) -> dict[str, Any]:
    """Trains a stage; returns its final checkpoint and, from rank 0, what its plan says. Collective over: world."""
    rank, size = rank_and_size()
    checkpoint = train_janus(config)
    result: dict[str, Any] = {"checkpoint": str(Path(checkpoint))}
    if rank == 0:
        plan = describe_plan(
            config.data,
            load_text_tokenizer(config.data.text_tokenizer),
            global_batch_size=config.stage.global_batch_size,
            num_steps=derive.last_step(config.stage),
            dp_size=derive.dp_size(config.parallel, size),
            micro_batch_size=config.parallel.micro_batch_size,
        )
        result["padding_fraction"] = plan.padding_fraction
        result["epochs"] = {source.name: source.epochs for source in plan.sources}
        result["token_shares"] = {source.name: source.token_share for source in plan.sources}
    return result
