"""Scenes of conversions: a checkpoint is written again for another layout, or becomes a Hugging Face directory."""

import tempfile
from pathlib import Path

from janus_mega.checkpoint.hf.export import export_hf
from janus_mega.checkpoint.manager import save_checkpoint
from janus_mega.checkpoint.reader import CheckpointReader, open_checkpoint
from janus_mega.checkpoint.reshard import Target, reshard
from tests.support.crash_traces import EXTRA_FILES, SCENES, Scene, difference, slices_of, state_at, tensors_at
from tests.support.trained import make_checkpoint

TARGET = Target(world_size=3, tp_size=1, layer_counts=(1,), pp_size=1)
RESHARDED_STEP = 3


def make_source(folder: Path) -> CheckpointReader:
    """A checkpoint of one rank to convert."""
    tensors = slices_of(tensors_at(RESHARDED_STEP), 0, 1)
    return open_checkpoint(save_checkpoint(folder, tensors, state_at(RESHARDED_STEP), extra_files=EXTRA_FILES))


def play_reshard(scene: Scene) -> None:
    """The files of one rank become those of three."""
    root = scene.base / "resharded"
    with tempfile.TemporaryDirectory() as folder:
        source = make_source(Path(folder))
        path = scene.write(root, lambda disk: reshard(source, root, TARGET, disk=disk))
    problem = difference(path, RESHARDED_STEP)
    scene.problems += [problem] if problem else []


def play_export(scene: Scene) -> None:
    """A Hugging Face directory is written, and then again in another form."""
    out_dir = scene.base / "exported" / "hf"
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = make_checkpoint(Path(folder))
        scene.write(out_dir, lambda disk: export_hf(checkpoint, out_dir, disk=disk))
        scene.write(
            out_dir,
            lambda disk: export_hf(
                checkpoint, out_dir, dtype="bfloat16", overwrite=True, max_shard_bytes=10**6, disk=disk
            ),
        )


BY_ONE_PROCESS = {"reshard": play_reshard, "export": play_export}
"""Scenes that other ranks have no part in."""
EVERY_SCENE = SCENES | BY_ONE_PROCESS
"""By name."""
