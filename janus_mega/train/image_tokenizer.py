"""The image tokenizer as a workload: raw pictures through a VqChunk, then a directory that preparation can use.

Pictures come straight from raw records; the global batch of a step is the next `global_batch_size` pictures of an
endless order of epochs, dealt to dp ranks in contiguous parts.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.stream.pictures import PictureSet, epoch_order
from janus_mega.checkpoint.reader import open_checkpoint
from janus_mega.config.load import dump
from janus_mega.config.schema import LossNormalization, TokenizerRunConfig
from janus_mega.config.validate import validate_tokenizer_run
from janus_mega.models.losses import task_denominators
from janus_mega.models.sharding import ShardedParameter
from janus_mega.models.vision.image_tokenizer import build_vq, save_image_tokenizer
from janus_mega.models.vision.vq_training import MODULE, TASKS, build_vq_chunk, fresh_weights
from janus_mega.parallel.groups import ProcessGroups, build_groups, init_distributed
from janus_mega.train.janus import prepare_run_dir
from janus_mega.train.order import FixedOrder
from janus_mega.train.run import run
from janus_mega.train.starting import started
from janus_mega.train.watch import Watch, collective_timeout_s
from janus_mega.train.workload import BuiltModel, Recipe

TOKENIZER_DIR = "image_tokenizer"
"""Folder of a run directory that receives the frozen tokenizer."""


class ImageTokenizerWorkload:
    """Training of a VQ image tokenizer; see `workload.Workload`."""

    task_names: tuple[str, ...] = TASKS
    seq_len = 1

    def __init__(self, config: TokenizerRunConfig) -> None:
        """Lists the pictures; reads none.

        Raises:
            UserError: the records are missing or name no pictures.
        """
        self.config = config
        self.task_weights: Mapping[str, float] = dict.fromkeys(TASKS, 1.0)
        self.config_text = dump(config)
        self.pictures = PictureSet([config.data.path], config.image_tokenizer.image_size)
        order = f"{self.pictures.digest} {config.data.seed} {config.global_batch_size}"
        self.order = FixedOrder(hashlib.sha256(order.encode()).hexdigest())

    def build(self, groups: ProcessGroups) -> BuiltModel:
        """The whole network, all of it trainable."""
        chunk = build_vq_chunk(self.config.image_tokenizer, self.config.parallel)
        return BuiltModel([chunk], {MODULE: MODULE}, [MODULE])

    @torch.no_grad()
    def initialize(self, shards: Iterable[ShardedParameter]) -> None:
        """Fresh weights, the same on every rank."""
        weights = fresh_weights(self.config.image_tokenizer, self.config.seed)
        for shard in shards:
            shard.parameter.copy_(weights[shard.name.removeprefix(f"{MODULE}.")])

    def batches(self, dp_rank: int, dp_size: int, first_step: int, last_step: int) -> Iterator[list[dict[str, Tensor]]]:
        """This dp rank's micro-batches of pictures."""
        global_size, micro_size = self.config.global_batch_size, self.config.parallel.micro_batch_size
        share = global_size // dp_size
        for step in range(first_step, last_step):
            start = step * global_size + dp_rank * share
            numbers = epoch_order(len(self.pictures), start, share, self.config.data.seed)
            images = torch.from_numpy(self.pictures.read_many(numbers))
            yield [{"pixel_values": part} for part in images.split(micro_size)]

    def place(self, batch: dict[str, Tensor], groups: ProcessGroups) -> dict[str, Tensor]:
        """A micro-batch on the rank's device."""
        return {name: value.to(groups.device, non_blocking=True) for name, value in batch.items()}

    def count_labels(self, batch: dict[str, Tensor]) -> Tensor:
        """int64 [2]: pictures, for either loss."""
        return torch.full((len(TASKS),), batch["pixel_values"].shape[0], dtype=torch.int64)

    def denominators(self, global_counts: Tensor) -> Tensor:
        """fp64 [2]: each loss is a mean over pictures."""
        return task_denominators(global_counts, LossNormalization.per_task)

    def measure(self, batch: dict[str, Tensor]) -> dict[str, int]:
        """Pictures of a micro-batch."""
        return {"images": batch["pixel_values"].shape[0]}

    def flops(self, amounts: Mapping[str, int], label_counts: Mapping[str, int]) -> dict[str, float]:
        """Nobody counted."""
        return {}

    def validation_sets(self, dp_rank: int, dp_size: int) -> Mapping[str, Callable[[], list[dict[str, Tensor]]]]:
        """None."""
        return {}

    def extra_files(self) -> dict[str, bytes | Path]:
        """None: a checkpoint's config says everything."""
        return {}


def recipe_of(config: TokenizerRunConfig) -> Recipe:
    """The part of a configuration that says how, not what."""
    return Recipe(
        name=config.name,
        run_dir=Path(config.run_dir),
        seed=config.seed,
        num_steps=config.num_steps,
        last_step=config.num_steps,
        global_batch_size=config.global_batch_size,
        init_from="",
        parallel=config.parallel,
        optimizer=config.optimizer,
        logging=config.logging,
        checkpoint=config.checkpoint,
        health=config.health,
    )


def train_image_tokenizer(config: TokenizerRunConfig, *, fresh: bool = False) -> Path:
    """Trains on the ranks this process was started with; returns the frozen tokenizer's directory.

    Args:
        config: the whole run.
        fresh: begin at step 0 in a run directory that was used before; its checkpoints are set aside.

    Raises:
        RunEnded: the run was stopped.
        UserError: the configuration breaks a rule, or pictures or run directory do not fit it.
        Collective over: world.
    """
    validate_tokenizer_run(config, int(os.environ.get("WORLD_SIZE", "1")))
    workload = ImageTokenizerWorkload(config)
    with started(Path(config.run_dir), config.health.stop_grace_s, fresh=fresh) as start:
        with start.attempt.span("join"), Watch(start.pulse, config.health, Path(config.run_dir), None):
            timeout_s = collective_timeout_s(config.health)
            init_distributed(timeout_s)
            start.strike("init")
            groups = build_groups(1, 1, config.seed, timeout_s=timeout_s)
            prepare_run_dir(Path(config.run_dir), config, groups)
        with start.attempt.span("run"):
            checkpoint = run(workload, recipe_of(config), groups, start)
        path = Path(config.run_dir) / TOKENIZER_DIR
        with start.attempt.span("export"):
            if groups.layout.rank == 0:
                export_image_tokenizer(checkpoint, config, path)
            dist.barrier(groups.host)
    return path


def export_image_tokenizer(checkpoint: Path, config: TokenizerRunConfig, path: Path) -> None:
    """Writes the frozen tokenizer of a training checkpoint to the directory `path`."""
    reader = open_checkpoint(checkpoint)
    prefix = f"{MODULE}."
    weights = {name.removeprefix(prefix): reader.read(name) for name in reader.weight_names if name.startswith(prefix)}
    save_image_tokenizer(build_vq(config.image_tokenizer, weights), config.image_tokenizer, path)
