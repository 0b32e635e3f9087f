"""What a run saves: its whole state under `checkpoints/`, or the weights alone for somebody who only looks at them.

Also the way back to an earlier state while the run goes on.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.distributed as dist

from janus_mega.checkpoint.manager import Ranks, find_latest, save_checkpoint
from janus_mega.checkpoint.reader import open_checkpoint
from janus_mega.checkpoint.retention import apply_retention
from janus_mega.parallel.slices import Slice
from janus_mega.train.restoring import LiveState
from janus_mega.train.workload import Recipe, Workload

CHECKPOINTS_DIR = "checkpoints"
"""Folder of a run directory that holds its checkpoints."""


class Saver:
    """Writes checkpoints of one engine."""

    def __init__(
        self,
        workload: Workload,
        recipe: Recipe,
        live: LiveState,
    ) -> None:
        self._workload = workload
        self._recipe = recipe
        self._live = live

    def save(self, step: int) -> Path:
        """Saves all that a resume needs; old checkpoints go. Collective over: world."""
        root = self._recipe.run_dir / CHECKPOINTS_DIR
        saved = self._save(root, self._live.slices(), step)
        if self._live.engine.groups.layout.rank == 0:
            checkpoint = self._recipe.checkpoint
            apply_retention(root, checkpoint.keep_last, checkpoint.keep_every, written=saved)
        return saved

    def save_weights(self, folder: Path, step: int) -> Path:
        """Saves the weights below a folder, enough to run the model. Collective over: world."""
        return self._save(folder, self._live.weights(), step)

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
        self._live.go_back(reader, step)
        self.save(step)  # its first agreement comes before anything is pruned, so nobody still reads
        return reader.step

    def _save(self, root: Path, slices: Iterable[Slice], step: int) -> Path:
        groups = self._live.engine.groups

        def agree(ok: bool) -> bool:
            all_ok = torch.tensor(int(ok))
            dist.all_reduce(all_ok, dist.ReduceOp.MIN, groups.saving)
            return bool(all_ok)

        return save_checkpoint(
            root,
            slices,
            self._live.at(step),
            ranks=Ranks(groups.layout.rank, groups.layout.world_size, agree),
            extra_files=self._workload.extra_files(),
        )
