"""What a run saves: its whole state under `checkpoints/`, or the weights alone for somebody who only looks at them."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch.distributed as dist

from janus_mega.checkpoint.manager import apply_retention, save_checkpoint
from janus_mega.checkpoint.state import TrainState
from janus_mega.engine.interface import StatefulEngine
from janus_mega.engine.state import moment_slices, weight_slices
from janus_mega.models.sharding import ShardedParameter
from janus_mega.parallel.slices import Slice
from janus_mega.train.workload import Recipe, Workload

CHECKPOINTS_DIR = "checkpoints"
"""Folder of a run directory that holds its checkpoints."""


class Saver:
    """Writes checkpoints of one engine."""

    def __init__(
        self, workload: Workload, recipe: Recipe, engine: StatefulEngine, shards: Sequence[ShardedParameter]
    ) -> None:
        self._workload = workload
        self._recipe = recipe
        self._engine = engine
        self._shards = shards

    def save(self, step: int) -> Path:
        """Saves all that a resume needs; old checkpoints go. Collective over: world."""
        root = self._recipe.run_dir / CHECKPOINTS_DIR
        weights, moments = weight_slices(self._engine, self._shards), moment_slices(self._engine, self._shards)
        saved = self._save(root, [*weights, *moments], step)
        if self._engine.groups.layout.rank == 0:
            apply_retention(root, self._recipe.checkpoint.keep_last)
        return saved

    def save_weights(self, folder: Path, step: int) -> Path:
        """Saves the weights below a folder, enough to run the model. Collective over: world."""
        return self._save(folder, weight_slices(self._engine, self._shards), step)

    def _save(self, root: Path, slices: Iterable[Slice], step: int) -> Path:
        layout, order = self._engine.groups.layout, self._workload.order
        state = TrainState(
            step=step,
            consumed_rows=step * self._recipe.global_batch_size,
            plan_digest=order.digest,
            config_text=self._workload.config_text,
            data_cursor=order.cursor(step),
        )
        return save_checkpoint(
            root,
            slices,
            state,
            rank=layout.rank,
            world_size=layout.world_size,
            barrier=dist.barrier,
            extra_files=self._workload.extra_files(),
        )
