"""The compiled plan: row number -> documents, a pure function of the sources' digests and lengths and of the data spec.

Windows are compiled when somebody looks at them and a few are kept; the cursor of every window seen is kept too (some
hundred bytes each), so going back is cheap and a resumed run can start from a saved one. The digest covers whatever
changes a batch: it stands in checkpoints, and a run refuses to go on under another one.
Rows are numbered through all steps: step s holds rows s * global_batch_size and on, whatever the layout or workers.
"""

import hashlib
import json
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.plan.deal import deal_to_ranks
from data_pipeline.plan.documents import DocumentStream, PlanSource, documents_of
from data_pipeline.plan.mixture import Ledger, Mixture
from data_pipeline.plan.window import Cursor, Window, WindowShape, compile_window, first_cursor
from data_pipeline.schema import SCHEMA_VERSION, TaskId
from data_pipeline.spec import DataSpec

PLAN_VERSION = 1
"""Raised whenever equal inputs give another plan than before."""

_WINDOWS_KEPT = 4


class PlannedDocument(NamedTuple):
    """One document of a row."""

    source_no: int
    """Index in `Plan.sources`."""
    sample_no: int
    """Sample within the source."""
    epoch: int
    """How often the source was gone through before."""
    start: int
    """First token taken of the sample's document: 0 unless a long text is cut."""
    stop: int
    """Token after the last one taken."""


@dataclass(frozen=True, slots=True)
class PlannedRows:
    """Documents of some rows, row after row; documents of the k-th row are row_start[k] ... row_start[k + 1] - 1."""

    row_start: np.ndarray
    """int64 [rows + 1]."""
    source_no: np.ndarray
    """int32 [documents]; these and the following as in `PlannedDocument`."""
    sample_no: np.ndarray
    """int64 [documents]."""
    epoch: np.ndarray
    """int32 [documents]."""
    start: np.ndarray
    """int64 [documents]."""
    length: np.ndarray
    """int64 [documents], tokens taken: stop - start."""


class Plan:
    """Rows of a run in the order of training."""

    def __init__(self, identity: dict[str, Any], sources: Sequence[PlanSource], spec: DataSpec) -> None:
        """Use `compile_plan`, which checks its inputs."""
        self.identity = identity
        """Everything the plan depends on, as JSON values; two plans differ where their identities do."""
        self.digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        """sha256 of the identity, hex."""
        self.sources = tuple(sources)
        """The sources that take part, by name."""
        self.global_batch_size: int = identity["global_batch_size"]
        self.seq_len = spec.seq_len
        self.window_rows: int = identity["window_rows"]
        """Rows compiled at a time: data.window_rows rounded up to whole global batches."""
        self.mixture = Mixture([source.weight for source in self.sources], spec.ratio_unit)
        self.streams = [
            DocumentStream(source.name, documents_of(source, spec.seq_len), spec.seed) for source in self.sources
        ]
        self._tasks = [TaskId[source.task.name] for source in self.sources]
        self._shape = WindowShape(self.window_rows, spec.seq_len, self.global_batch_size, spec.seed)
        self._cursors = {0: first_cursor(len(self.sources), self._shape)}
        self._windows: OrderedDict[int, Window] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """Windows are left out: another process compiles those it needs from the nearest cursor."""
        return {**self.__dict__, "_windows": OrderedDict()}

    def window(self, window_no: int) -> Window:
        """Returns a window, compiling it and those since the nearest known cursor."""
        if window_no in self._windows:
            self._windows.move_to_end(window_no)
            return self._windows[window_no]
        at = window_no
        while at not in self._cursors:
            at -= 1
        for number in range(at, window_no + 1):
            window, cursor = compile_window(self._cursors[number], self.streams, self._tasks, self.mixture, self._shape)
            self._cursors[number + 1] = cursor
        while len(self._windows) >= _WINDOWS_KEPT:
            self._windows.popitem(last=False)
        self._windows[window_no] = window
        return window

    def row(self, row_no: int) -> list[PlannedDocument]:
        """Documents of a row, in their order within it.

        Raises:
            IndexError: The number is negative (there is no last row: sources are repeated as long as asked).
        """
        rows = self.rows([row_no])
        columns = (rows.source_no, rows.sample_no, rows.epoch, rows.start, rows.start + rows.length)
        return [PlannedDocument(*values) for values in zip(*(column.tolist() for column in columns), strict=True)]

    def rows(self, row_nos: Sequence[int]) -> "PlannedRows":
        """Documents of some rows as arrays: what `row` says of each of them, without an object per document.

        Raises:
            IndexError: As `row`.
        """
        parts: list[tuple[np.ndarray, ...]] = []
        counts = [0]
        for row_no in row_nos:
            if row_no < 0:
                raise IndexError(f"row {row_no} of a plan; rows count from 0")
            window_no, offset = divmod(row_no, self.window_rows)
            window = self.window(window_no)
            first, last = window.row_start[offset : offset + 2].tolist()
            parts.append(
                (window.source[first:last], window.document[first:last], window.epoch[first:last],
                 window.length[first:last])
            )  # fmt: skip
            counts.append(counts[-1] + last - first)
        source_no, document, epoch, length = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        sample_no, start = document.copy(), np.zeros(len(document), np.int64)
        for number, stream in enumerate(self.streams):
            table = stream.table
            if table.sample is not None and table.start is not None:
                mine = np.flatnonzero(source_no == number)
                sample_no[mine], start[mine] = table.sample[document[mine]], table.start[document[mine]]
        return PlannedRows(np.array(counts), source_no, sample_no, epoch, start, length)

    def num_images(self, step: int) -> np.ndarray:
        """int64 [global_batch_size]: images to understand in each row of a step."""
        window_no, offset = divmod(step * self.global_batch_size, self.window_rows)
        return self.window(window_no).num_images[offset : offset + self.global_batch_size]

    def place(self, step: int, dp_size: int, micro_batch_size: int) -> np.ndarray:
        """int64 [dp_size, micro-batches, micro_batch_size]: which rank computes which rows of a step, and when.

        Raises:
            ValueError: global_batch_size is not a multiple of dp_size x micro_batch_size.
        """
        offsets = deal_to_ranks(self.num_images(step), dp_size, micro_batch_size)
        return offsets + step * self.global_batch_size

    def cursor_at(self, step: int) -> dict[str, Any]:
        """State from which step `step` can be compiled without the windows before it, as JSON values."""
        window_no = step * self.global_batch_size // self.window_rows
        if window_no not in self._cursors:
            self.window(window_no)
        cursor = self._cursors[window_no]
        return {"plan": self.digest, **asdict(cursor)}

    def restore(self, cursor: dict[str, Any]) -> None:
        """Accepts the state that `cursor_at` gave, in this or another process.

        Raises:
            UserError: It belongs to another plan.
        """
        if cursor["plan"] != self.digest:
            raise UserError(
                f"the saved data position belongs to plan {cursor['plan'][:16]}, this run's plan is "
                f"{self.digest[:16]}; resume with the data configuration and shards of the checkpoint"
            )
        ledger = Ledger(tuple(cursor["ledger"]["documents"]), tuple(cursor["ledger"]["tokens"]))
        self._cursors[cursor["window_no"]] = Cursor(cursor["window_no"], ledger, cursor["tokens"])


def compile_plan(spec: DataSpec, sources: Sequence[PlanSource], *, global_batch_size: int) -> Plan:
    """Checks the inputs and returns the plan; nothing is compiled before it is asked for.

    Args:
        spec: Mixture, packing and seed; its source paths are not looked at.
        sources: One entry per source; those of weight 0 stay out.
        global_batch_size: Rows per step.

    Raises:
        UserError: No source has weight, a weight or size is impossible, a source that has weight is empty, a document
            does not fit into a row.
    """
    for name, value in (
        ("data.seq_len", spec.seq_len),
        ("data.window_rows", spec.window_rows),
        ("global_batch_size", global_batch_size),
    ):
        if value < 1:
            raise UserError(f"{name}={value} must be at least 1")
    for source in sources:
        if not (math.isfinite(source.weight) and source.weight >= 0):
            raise UserError(f"{source.where()}: weight {source.weight} is no share; give a number of 0 or more")
    used = sorted((source for source in sources if source.weight > 0), key=lambda source: source.name)
    if not used:
        raise UserError(f"data.sources: none of {len(sources)} sources has a weight above 0; give at least one a share")
    total = sum(source.weight for source in used)
    for source in used:
        if len(source.lengths) == 0:
            raise UserError(
                f"{source.where()}: holds 0 samples but is to fill {source.weight / total:.1%} of the "
                f"{spec.ratio_unit.value} (weight {source.weight:g} of {total:g}); set its weight to 0 or prepare data "
                "for it"
            )
    return Plan(_identity(spec, used, global_batch_size), used, spec)


def _identity(spec: DataSpec, sources: Sequence[PlanSource], global_batch_size: int) -> dict[str, Any]:
    """All that a batch depends on. Paths and worker counts are left out: they change nothing."""
    return {
        "plan_version": PLAN_VERSION,
        "schema_version": SCHEMA_VERSION,
        "seed": spec.seed,
        "seq_len": spec.seq_len,
        "window_rows": -(-spec.window_rows // global_batch_size) * global_batch_size,
        "global_batch_size": global_batch_size,
        "ratio_unit": spec.ratio_unit.value,
        "guidance_dropout": spec.guidance_dropout,
        "template": spec.template.value,
        "geometry": asdict(spec.geometry),
        "sources": [
            {
                "name": source.name,
                "digest": source.digest,
                "task": source.task.value,
                "weight": source.weight,
                "samples": len(source.lengths),
                "lengths": _hash_of(source.lengths, np.int32),
                "images": _hash_of(source.num_images, np.uint8),
                "can_cut": source.can_cut,
            }
            for source in sources
        ],
    }


def _hash_of(values: np.ndarray, dtype: type) -> str:
    return hashlib.sha256(np.ascontiguousarray(values, dtype).tobytes()).hexdigest()


def difference(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Names what differs between two identities, one line each; empty if nothing does."""
    lines = []
    for key in sorted((ours.keys() | theirs.keys()) - {"sources"}):
        if ours.get(key) != theirs.get(key):
            lines.append(f"{key}: {ours.get(key)!r} here, {theirs.get(key)!r} there")
    here, there = ({source["name"]: source for source in side.get("sources", [])} for side in (ours, theirs))
    for name in sorted(here.keys() | there.keys()):
        if name not in here or name not in there:
            lines.append(f"source {name}: only {'here' if name in here else 'there'}")
            continue
        for key in sorted(here[name].keys() | there[name].keys()):
            if here[name].get(key) != there[name].get(key):
                lines.append(f"source {name}.{key}: {here[name].get(key)!r} here, {there[name].get(key)!r} there")
    return lines
