"""What a path on the command line means."""

from pathlib import Path

from data_pipeline.errors import UserError
from janus_mega.checkpoint.format import MANIFEST_FILE
from janus_mega.checkpoint.manager import find_latest

CHECKPOINTS_DIR = "checkpoints"


def checkpoint_at(path: Path) -> Path:
    """Returns a step directory: the path itself, or the newest whole one of a run directory or checkpoint folder.

    Raises:
        UserError: There is none.
    """
    if (path / MANIFEST_FILE).is_file():
        return path
    for folder in (path / CHECKPOINTS_DIR, path):
        latest = find_latest(folder)
        if latest is not None:
            return latest
    raise UserError(
        f"{path}: holds no whole checkpoint; give a step directory, or the run_dir of a run that has saved one"
    )
