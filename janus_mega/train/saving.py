"""What a run saves: its whole state under `checkpoints/`, or the weights alone for somebody who only looks at them.

Also the way back to an earlier state while the run goes on.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch.distributed as dist

from janus_mega.checkpoint.manager import apply_retention, find_latest, save_checkpoint
from janus_mega.checkpoint.reader import open_checkpoint
from janus_mega.checkpoint.state import TrainState
from janus_mega.engine.interface import StatefulEngine
from janus_mega.engine.state import moment_slices, restore_masters, restore_moments, weight_slices
from janus_mega.models.sharding import ShardedParameter
from janus_mega.parallel.slices import Slice
from janus_mega.train.health import Health
from janus_mega.train.workload import Recipe, Workload

CHECKPOINTS_DIR = "checkpoints"
"""Folder of a run directory that holds its checkpoints."""


class Saver:
    """Writes checkpoints of one engine."""

    def __init__(
        self,
        workload: Workload,
        recipe: Recipe,
        engine: StatefulEngine,
        shards: Sequence[ShardedParameter],
        health: Health,
    ) -> None:
        self._workload = workload
        self._recipe = recipe
        self._engine = engine
        self._shards = shards
        self._health = health

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

    def go_back(self, accept: Callable[[int], bool], step: int) -> int | None:
        """Puts weights, moments and health of the newest acceptable checkpoint in place, and saves that as `step`.

        Step and position in the data stay. The new checkpoint lets a run that is stopped now go on from here, not from
        a checkpoint that was given up.

        Returns:
            The step of the checkpoint, None if there is none. Collective over: world.
        """
        found = find_latest(self._recipe.run_dir / CHECKPOINTS_DIR, accept)
        if found is None:
            return None
        reader = open_checkpoint(found)
        state = reader.read_state()
        self._health.go_back(state.health, state.step, step)
        restore_masters(self._engine, self._shards, reader.read_box)
        self._engine.publish_weights()
        restore_moments(self._engine, self._shards, self._health.updates, reader.read_box)
        self.save(step)  # its first barrier comes before anything is pruned, so nobody still reads
        return state.step

    def _save(self, root: Path, slices: Iterable[Slice], step: int) -> Path:
        layout, order = self._engine.groups.layout, self._workload.order
        state = TrainState(
            step=step,
            consumed_rows=step * self._recipe.global_batch_size,
            plan_digest=order.digest,
            config_text=self._workload.config_text,
            data_cursor=order.cursor(step),
            health=self._health.state(),
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
