"""The data of a run as commands look at it: a YAML or a run directory, its plan, its newest saved position."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.errors import UserError
from janus_mega.config.schema import RunConfig

if TYPE_CHECKING:
    from data_pipeline.explain.blame import Layout
    from data_pipeline.plan.open import OpenData
    from data_pipeline.schema import Hole

CONFIG_FILE = "config.yaml"
CHECKPOINTS_DIR = "checkpoints"


@dataclass(frozen=True)
class RunData:
    """A run's configuration and its opened data."""

    config: RunConfig
    data: "OpenData"
    run_dir: Path | None
    """Where the run wrote, if a run directory was given."""
    trained_digest: str
    """Plan digest that the checkpoints of the run name; empty where there is none."""

    def differences(self) -> list[str]:
        """What the plan here and the plan of the run have different; empty where nothing is, or nothing is known."""
        from data_pipeline.plan.difference import IDENTITY_FILE, difference, load_identity

        ours = self.data.plan
        if self.run_dir and (self.run_dir / IDENTITY_FILE).is_file():
            return difference(ours.identity, load_identity(self.run_dir), ("here", "in the run"))
        if self.trained_digest and self.trained_digest != ours.digest:
            return [f"digest {ours.digest[:16]} here, {self.trained_digest[:16]} in its checkpoints"]
        return []

    def holes(self) -> "list[Hole]":
        """Broken samples that the run met."""
        from data_pipeline.stream.quarantine import QUARANTINE_FILE, read_quarantine

        if self.run_dir is None or not (self.run_dir / QUARANTINE_FILE).is_file():
            return []
        return read_quarantine(self.run_dir)

    def layout(self, world_size: int) -> "Layout":
        """How rows are dealt to this many ranks.

        Raises:
            UserError: The configuration does not fit them.
        """
        from data_pipeline.explain.blame import Layout
        from janus_mega.config import derive
        from janus_mega.config.validate import validate_run

        if world_size < 1:
            raise UserError(f"--world-size {world_size} must be at least 1")
        validate_run(self.config, world_size)
        return Layout(derive.dp_size(self.config.parallel, world_size), self.config.parallel.micro_batch_size)


def open_run_data(file: str, overrides: Sequence[str], *, step: int = 1) -> RunData:
    """Opens the data of a YAML, a name under configs/, or a run directory.

    From a run directory the plan goes on from the last position that was saved at or before `step`.

    Raises:
        UserError: No configuration is there, or its sources do not open.
    """
    from data_pipeline.plan.open import open_data
    from data_pipeline.text.load import load_text_tokenizer
    from janus_mega.config.load import load_config

    run_dir = Path(file) if Path(file).is_dir() else None
    if run_dir and not (run_dir / CONFIG_FILE).is_file():
        raise UserError(f"{run_dir}: holds no {CONFIG_FILE}; give a run directory, or the YAML of a run")
    config = load_config(RunConfig, str(run_dir / CONFIG_FILE) if run_dir else file, list(overrides)).config
    tokenizer = load_text_tokenizer(config.data.text_tokenizer)
    data = open_data(config.data, tokenizer, global_batch_size=config.stage.global_batch_size)
    return RunData(config, data, run_dir, _restore(data, run_dir, step) if run_dir else "")


def _restore(data: "OpenData", run_dir: Path, step: int) -> str:
    """Lets the plan go on from the newest usable checkpoint; returns the digest that checkpoints name."""
    from janus_mega.checkpoint.reader import open_checkpoint

    digest, best = "", None
    for folder in sorted((run_dir / CHECKPOINTS_DIR).glob("step-*")):
        try:
            state = open_checkpoint(folder).read_state()
        except (UserError, OSError):
            continue  # half-written or damaged: whole ones suffice
        digest = state.plan_digest
        if state.step < step and state.data_cursor and state.plan_digest == data.plan.digest:
            best = state.data_cursor
    if best:
        data.plan.restore(best)
    return digest
