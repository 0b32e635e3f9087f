"""Where metrics go: `metrics.jsonl` always, TensorBoard and Weights & Biases when asked. Values arrive reduced.

A line of metrics.jsonl is `{"step": 10, "time_s": 1712.5, ...}` with time_s in seconds since the epoch. Sinks
append, so a resumed run continues its files. What cannot be opened stops the start; what cannot be written later is
told and left out.
"""

import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from html import escape
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

from data_pipeline.errors import UserError
from janus_mega.observe.json_lines import read_lines
from janus_mega.observe.lenient import Lenient, LenientLines

METRICS_FILE = "metrics.jsonl"
EVENTS_DIR = "events"
_PROBE_BYTES = 4096


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
        path.open("a", encoding="utf-8").close()  # a place that takes no file is told at the start
        self._lines = LenientLines(path)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one line; a value that is not finite becomes null, which JSON can hold."""
        row: dict[str, Any] = {"step": step, "time_s": round(time.time(), 3)}
        row.update({name: value if math.isfinite(value) else None for name, value in values.items()})
        self._lines.append([row])

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Pictures are not written as text."""

    def text(self, step: int, name: str, content: str) -> None:
        """Lines hold numbers alone."""

    def close(self) -> None:
        """Every line is in the file already."""


class TensorBoard:
    """Event files for TensorBoard.

    They are written by a thread that ends at its first failure, and a record it cut off hides those after it. So after
    a failure a new writer begins a file of its own, once there is room again.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._writer: Any = None
        self._open()

    def _open(self) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only wanted here

        self._writer = SummaryWriter(str(self._directory))

    def _add(self, add: Callable[[Any], None]) -> None:
        if self._writer is None:
            _require_room(self._directory)
            self._open()
        try:
            add(self._writer)
        except OSError:
            self._writer = None
            raise

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes every scalar under its name."""

        def add(writer: Any) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        self._add(add)

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Writes a picture, uint8 [height, width, 3]."""
        self._add(lambda writer: writer.add_image(name, pixels, step, dataformats="HWC"))

    def text(self, step: int, name: str, content: str) -> None:
        """Writes a text (Markdown)."""
        self._add(lambda writer: writer.add_text(name, content, step))

    def close(self) -> None:
        """Flushes and closes the event file."""
        if self._writer is not None:
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
    """Several sinks as one; closes all of them, also on the way out of a `with` block.

    A sink whose disk or network fails is told once, and takes nothing from the others nor from training.
    """

    def __init__(self, sinks: list[Sink]) -> None:
        self._sinks = [(sink, Lenient(f"metrics for {type(sink).__name__}")) for sink in sinks]

    def _each(self, write: Callable[[Sink], None]) -> None:
        for sink, writes in self._sinks:
            writes.attempt(partial(write, sink))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes to every sink."""
        self._each(lambda sink: sink.scalars(step, values))

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Writes to every sink; `pixels` is uint8 [height, width, 3]."""
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            raise ValueError(f"image {name}: uint8 [height, width, 3] expected, got {pixels.dtype} {pixels.shape}")
        self._each(lambda sink: sink.image(step, name, pixels))

    def text(self, step: int, name: str, content: str) -> None:
        """Writes to every sink."""
        self._each(lambda sink: sink.text(step, name, content))

    def close(self) -> None:
        """Closes every sink."""
        self._each(lambda sink: sink.close())

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
        OSError: one of them cannot be opened.
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


def _require_room(directory: Path) -> None:
    """Raises OSError where nothing can be written: a writer that fails as it opens leaves an empty file each time."""
    probe = directory / ".room"
    try:
        probe.write_bytes(bytes(_PROBE_BYTES))
    finally:
        probe.unlink(missing_ok=True)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Returns the lines of a run's metrics.jsonl; a last line cut off by a crash is left out."""
    return read_lines(run_dir / METRICS_FILE)
