"""Janus as a workload: packed rows of a compiled plan through a JanusChunk."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from data_pipeline.errors import UserError
from data_pipeline.plan.open import OpenData, open_data
from data_pipeline.plan.supply import check_supply
from data_pipeline.schema import TokenKind
from data_pipeline.text.load import load_text_tokenizer
from janus_mega.checkpoint.trained import companion_files
from janus_mega.config import derive
from janus_mega.config.load import dump, save
from janus_mega.config.schema import RunConfig
from janus_mega.config.validate import validate_run
from janus_mega.models.backbone import compute_dtype
from janus_mega.models.encode_ahead import prepare_with
from janus_mega.models.init import initialize
from janus_mega.models.janus import MODULE_ATTRIBUTES, build_chunks
from janus_mega.models.losses import task_denominators
from janus_mega.models.placement import TASKS, PlacedBatch, count_labels, place_batch
from janus_mega.models.sharding import ShardedParameter
from janus_mega.models.vision.image_tokenizer import load_image_tokenizer
from janus_mega.observe.throughput import StepCounts, step_flops
from janus_mega.parallel.groups import ProcessGroups, build_groups, init_distributed
from janus_mega.train.layout_gate import require_verified
from janus_mega.train.order import PlannedOrder
from janus_mega.train.run import run
from janus_mega.train.starting import started
from janus_mega.train.validation_rows import open_validation_sets, read_validation_rows
from janus_mega.train.watch import Watch, collective_timeout_s
from janus_mega.train.workload import BuiltModel, Recipe

_log = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"


class JanusWorkload:
    """One stage of a Janus; see `workload.Workload`."""

    task_names = TASKS

    def __init__(self, config: RunConfig) -> None:
        """Opens tokenizer and sources and plans; reads no sample.

        Raises:
            UserError: a source is missing, damaged, too small, or fits neither tokenizers, model nor mixture.
        """
        self.config = config
        self.task_weights: Mapping[str, float] = config.loss.task_weights
        self.seq_len = config.data.seq_len
        self.config_text = dump(config)
        tokenizer = load_text_tokenizer(config.data.text_tokenizer)
        if tokenizer.vocab_size > config.model.backbone.vocab_size:
            raise UserError(
                f"{config.data.text_tokenizer}: holds {tokenizer.vocab_size} ids, the model has "
                f"{config.model.backbone.vocab_size} rows; raise model.backbone.vocab_size"
            )
        self._tokenizer_path = tokenizer.path
        self.data: OpenData = open_data(config.data, tokenizer, global_batch_size=config.stage.global_batch_size)
        self.order = PlannedOrder(self.data)
        check_supply(self.data.plan, derive.last_step(config.stage))
        self._check_image_tokenizer()
        self._validation = (
            open_validation_sets(config.data, config.validation.sets, tokenizer) if config.validation.every else {}
        )

    def _check_image_tokenizer(self) -> None:
        path = self.config.data.image_tokenizer
        if not path:
            return
        digest = load_image_tokenizer(Path(path)).digest
        for source in self.data.sources:
            entry = source.manifest.image_tokenizer
            if entry is not None and entry.digest != digest:
                raise UserError(
                    f"{source.path}: its image ids come from tokenizer {entry.digest[:12]}, data.image_tokenizer "
                    f"{path} is {digest[:12]}; prepare the source again or name the tokenizer it was made with"
                )

    def build(self, groups: ProcessGroups) -> BuiltModel:
        """This rank's chunks on the meta device, with the stage's modules trainable."""
        config = self.config
        chunks = build_chunks(config.model, config.parallel, config.loss, groups.layout)
        for chunk in chunks:
            chunk.train_only(config.stage.trainable)
        modules = {module.value: attribute for module, attribute in MODULE_ATTRIBUTES.items()}
        trainable = [module.value for module in config.stage.trainable]
        return BuiltModel(chunks, modules, trainable, prepare_with(chunks[0], config.parallel))

    def initialize(self, shards: Iterable[ShardedParameter]) -> None:
        """Fresh, layout-independent weights."""
        initialize(shards, self.config.model.backbone, self.config.seed)

    def batches(self, dp_rank: int, dp_size: int, first_step: int, last_step: int) -> Iterator[list[dict[str, Tensor]]]:
        """This dp rank's micro-batches."""
        return self.order.load(
            micro_batch_size=self.config.parallel.micro_batch_size,
            dp_rank=dp_rank,
            dp_size=dp_size,
            first_step=first_step,
            last_step=last_step,
        )

    def place(self, batch: dict[str, Tensor], groups: ProcessGroups) -> PlacedBatch:
        """A micro-batch on the rank's device."""
        return place_batch(batch, groups.device, compute_dtype(self.config.parallel))

    def count_labels(self, batch: dict[str, Tensor]) -> Tensor:
        """int64 [tasks]."""
        return count_labels(batch)

    def denominators(self, global_counts: Tensor) -> Tensor:
        """fp64 [tasks]."""
        return task_denominators(global_counts, self.config.loss.normalization)

    def measure(self, batch: dict[str, Tensor]) -> dict[str, int]:
        """Tokens, padding, images, and document lengths squared (what attention sees, twice) of a micro-batch."""
        is_padding = batch["token_kind"] == TokenKind.pad
        padding = int(is_padding.sum())
        borders = batch["cu_seqlens"].long()
        starts, lengths = borders[:-1], borders.diff()
        # Padding is a segment of its own; documents begin with a token.
        documents = lengths[(lengths > 0) & ~is_padding.flatten()[starts.clamp_max(is_padding.numel() - 1)]]
        return {
            "tokens": batch["token_kind"].numel() - padding,
            "padding": padding,
            "squared_lengths": int((documents * documents).sum()),
            "understanding_images": batch["pixel_values"].shape[0],
            "generation_tokens": int((batch["token_kind"] == TokenKind.image_gen).sum()),
        }

    def flops(self, amounts: Mapping[str, int], label_counts: Mapping[str, int]) -> dict[str, float]:
        """See `throughput.step_flops`."""
        counts = StepCounts(
            tokens=amounts["tokens"],
            understanding_images=amounts["understanding_images"],
            generation_tokens=amounts["generation_tokens"],
            text_labels=label_counts["text"] + label_counts["understanding"],
            image_labels=label_counts["generation"],
        )
        return step_flops(
            self.config.model,
            counts,
            self.config.stage.trainable,
            self.seq_len,
            squared_lengths=amounts["squared_lengths"],
            recompute=self.config.parallel.recompute,
        )

    def validation_sets(self, dp_rank: int, dp_size: int) -> Mapping[str, Callable[[], list[dict[str, Tensor]]]]:
        """Rows of the sets' own plans, read anew each time."""
        micro_size = self.config.parallel.micro_batch_size
        return {
            name: partial(read_validation_rows, data, micro_size, dp_rank, dp_size)
            for name, data in self._validation.items()
        }

    def extra_files(self) -> dict[str, bytes | Path]:
        """Tokenizers, so that a checkpoint alone can be exported and drawn with."""
        if not self.config.data.image_tokenizer:
            return {}
        return dict(companion_files(self._tokenizer_path, Path(self.config.data.image_tokenizer)))


def recipe_of(config: RunConfig) -> Recipe:
    """The part of a configuration that says how, not what."""
    return Recipe(
        name=config.name,
        run_dir=Path(config.run_dir),
        seed=config.seed,
        num_steps=config.stage.num_steps,
        last_step=derive.last_step(config.stage),
        global_batch_size=config.stage.global_batch_size,
        init_from=config.stage.init_from,
        optimizer_state=config.stage.optimizer_state,
        parallel=config.parallel,
        optimizer=config.optimizer,
        logging=config.logging,
        checkpoint=config.checkpoint,
        health=config.health,
        validate_every=config.validation.every,
        samples=config.samples,
    )


def train_janus(config: RunConfig, *, fresh: bool = False) -> Path:
    """Runs one stage on the ranks this process was started with; returns the final checkpoint.

    Args:
        config: the whole run.
        fresh: begin at step 0 in a run directory that was used before; its checkpoints are set aside.

    Raises:
        RunEnded: the run was stopped.
        UserError: the configuration breaks a rule, or data, checkpoint or run directory do not fit it.
        Collective over: world.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    validate_run(config, world_size)
    workload = JanusWorkload(config)
    with started(Path(config.run_dir), config.health.stop_grace_s, fresh=fresh) as start:
        if int(os.environ.get("RANK", "0")) == 0:
            with start.attempt.span("verify layout"):
                require_verified(config, world_size, start.stop)
        with start.attempt.span("join"), Watch(start.pulse, config.health, Path(config.run_dir), None):
            timeout_s = collective_timeout_s(config.health)
            init_distributed(timeout_s)
            start.strike("init")
            parallel = config.parallel
            groups = build_groups(parallel.tp_size, parallel.pp_size, config.seed, parallel.virtual_pp_size, timeout_s)
            prepare_run_dir(Path(config.run_dir), config, groups)
        with start.attempt.span("run"):
            return run(workload, recipe_of(config), groups, start)


def prepare_run_dir(run_dir: Path, config: Any, groups: ProcessGroups) -> None:
    """Writes the resolved configuration beside what the run will write (rank 0)."""
    if groups.layout.rank == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        save(config, run_dir / CONFIG_FILE)
