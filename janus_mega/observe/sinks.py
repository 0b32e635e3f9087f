"""Where metrics go: `metrics.jsonl` always, TensorBoard and Weights & Biases when asked. Values arrive reduced.

A line of metrics.jsonl is `{"step": 10, "time_s": 1712.5, ...}` with time_s in seconds since the epoch. Sinks
append, so a resumed run continues its files.
"""

import json
import math
import time
from collections.abc import Mapping
from html import escape
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

from data_pipeline.errors import UserError

METRICS_FILE = "metrics.jsonl"
EVENTS_DIR = "events"


class Sink(Protocol):
    """A place that takes scalars and pictures."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes named scalars of a step."""

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Writes a picture, uint8 [height, width, 3]; a sink for numbers ignores it."""

    def text(self, step: int, name: str, content: str) -> None:
        """Writes a text; a sink for numbers ignores it."""

    def close(self) -> None:
        """Flushes and closes."""


class JsonLines:
    """One JSON object per line and step."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one line; a value that is not finite becomes null, which JSON can hold."""
        row: dict[str, Any] = {"step": step, "time_s": round(time.time(), 3)}
        row.update({name: value if math.isfinite(value) else None for name, value in values.items()})
        self._file.write(json.dumps(row) + "\n")

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Pictures are not written as text."""

    def text(self, step: int, name: str, content: str) -> None:
        """Lines hold numbers alone."""

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class TensorBoard:
    """Event files for TensorBoard."""

    def __init__(self, directory: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only wanted here

        self._writer = SummaryWriter(str(directory))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes every scalar under its name."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Writes a picture, uint8 [height, width, 3]."""
        self._writer.add_image(name, pixels, step, dataformats="HWC")

    def text(self, step: int, name: str, content: str) -> None:
        """Writes a text (Markdown)."""
        self._writer.add_text(name, content, step)

    def close(self) -> None:
        """Flushes and closes the event file."""
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases; how it connects (or stays offline) is up to its own environment variables."""

    def __init__(self, project: str, run_dir: Path) -> None:
        """Starts a run named like the run directory."""
        self._wandb: Any = import_module("wandb")  # not among the requirements: most runs do without
        self._run: Any = self._wandb.init(project=project, name=run_dir.name, dir=str(run_dir), resume="allow")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes every scalar under its name."""
        self._run.log(dict(values), step=step)

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Writes a picture, uint8 [height, width, 3]."""
        self._run.log({name: self._wandb.Image(pixels)}, step=step)

    def text(self, step: int, name: str, content: str) -> None:
        """Writes a text as it is."""
        self._run.log({name: self._wandb.Html(f"<pre>{escape(content)}</pre>")}, step=step)

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()


class SinkGroup:
    """Several sinks as one; closes all of them, also on the way out of a `with` block."""

    def __init__(self, sinks: list[Sink]) -> None:
        self._sinks = sinks

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes to every sink."""
        for sink in self._sinks:
            sink.scalars(step, values)

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Writes to every sink; `pixels` is uint8 [height, width, 3]."""
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            raise ValueError(f"image {name}: uint8 [height, width, 3] expected, got {pixels.dtype} {pixels.shape}")
        for sink in self._sinks:
            sink.image(step, name, pixels)

    def text(self, step: int, name: str, content: str) -> None:
        """Writes to every sink."""
        for sink in self._sinks:
            sink.text(step, name, content)

    def close(self) -> None:
        """Closes every sink."""
        for sink in self._sinks:
            sink.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def open_sinks(run_dir: Path, *, tensorboard: bool, wandb: str = "", enabled: bool = True) -> SinkGroup:
    """Opens the sinks of a run directory; a rank that does not write gets an empty group.

    Raises:
        UserError: a project of Weights & Biases is named, but its package is not installed.
    """
    if wandb and find_spec("wandb") is None:  # found by all ranks alike
        raise UserError(
            f"logging.wandb={wandb}: the package wandb is not installed; install it (pip install wandb) or leave "
            "logging.wandb empty"
        )
    if not enabled:
        return SinkGroup([])
    sinks: list[Sink] = [JsonLines(run_dir / METRICS_FILE)]
    if tensorboard:
        sinks.append(TensorBoard(run_dir / EVENTS_DIR))
    if wandb:
        sinks.append(WeightsAndBiases(wandb, run_dir))
    return SinkGroup(sinks)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Returns the lines of a run's metrics.jsonl; a last line cut off by a crash is left out."""
    rows = []
    for line in (run_dir / METRICS_FILE).read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows
