"""The compiled plan: row number -> documents, a pure function of the sources' digests and lengths and of the data spec.

Windows are compiled when somebody looks at them and a few are kept; the cursor of every window seen is kept too (some
hundred bytes each), so going back is cheap and a resumed run can start from a saved one. The digest covers whatever
changes a batch: it stands in checkpoints, and a run refuses to go on under another one.
Rows are numbered through all steps: step s holds rows s * global_batch_size and on, whatever the layout or workers.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.plan.deal import deal_to_ranks
from data_pipeline.plan.documents import DocumentStream, PlanSource, documents_of
from data_pipeline.plan.identity import digest_of, identity_of
from data_pipeline.plan.mixture import Ledger, Mixture, SourceExhausted
from data_pipeline.plan.schedule import size_factors
from data_pipeline.plan.window import Cursor, Window, WindowShape, compile_window
from data_pipeline.schema import TaskId
from data_pipeline.spec import DataSpec, Exhausted, RatioUnit

_WINDOWS_KEPT = 4


class PlanEnded(IndexError):
    """There are no rows from here on: a source has given all it may, and the plan was told to stop then."""

    def __init__(self, step: int, why: str) -> None:
        super().__init__(f"the data plan ends before step {step}: {why}")
        self.step = step
        """The first step that does not exist; all before it do."""
        self.why = why
        """Which source has given what."""


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
        self.digest = digest_of(identity)
        """sha256 of the identity, hex."""
        self.streams = [
            DocumentStream(source.name, documents_of(source, spec.seq_len), spec.seed) for source in sources
        ]
        # The columns that the choice of captions was made from are in its table now; workers need no second copy.
        self.sources = tuple(replace(source, caption_number=None, uids=None) for source in sources)
        """The sources that take part, by name."""
        self.global_batch_size: int = identity["global_batch_size"]
        self.seq_len = spec.seq_len
        self.window_rows: int = identity["window_rows"]
        """Rows compiled at a time: data.window_rows rounded up to whole global batches."""
        self.steps_per_window = self.window_rows // self.global_batch_size
        """Steps that share one window, and so one set of shares."""
        self.mixture = _mixture_of(self.sources, self.streams, spec)
        self._tasks = [TaskId[source.task.name] for source in self.sources]
        self._shape = WindowShape(self.window_rows, spec.seq_len, self.global_batch_size, spec.seed)
        self._cursors = {0: Cursor(0, Ledger.empty(len(self.sources)))}
        self._windows: OrderedDict[int, Window] = OrderedDict()
        self._end: tuple[int, str] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Windows are left out: another process compiles those it needs from the nearest cursor."""
        return {**self.__dict__, "_windows": OrderedDict()}

    def window(self, window_no: int) -> Window:
        """Returns a window, compiling it and those since the nearest known cursor.

        Raises:
            PlanEnded: The plan ends before this window.
            UserError: A source that was to last runs out (`supply.check_supply` sees that before training).
        """
        if window_no in self._windows:
            self._windows.move_to_end(window_no)
            return self._windows[window_no]
        window = self._compile(self.cursor(window_no))
        while len(self._windows) >= _WINDOWS_KEPT:
            self._windows.popitem(last=False)
        self._windows[window_no] = window
        return window

    def cursor(self, window_no: int) -> Cursor:
        """The state before a window; compiles the windows between it and the nearest known one.

        Raises:
            PlanEnded: The plan ends before the window before it.
        """
        at = window_no
        while at not in self._cursors:
            at -= 1
        for number in range(at, window_no):
            self._compile(self._cursors[number])
        return self._cursors[window_no]

    def _compile(self, cursor: Cursor) -> Window:
        """Compiles the window at a cursor and notes the cursor after it."""
        number = cursor.window_no
        if self._end is None or number < self._end[0]:
            try:
                window, after = compile_window(cursor, self.streams, self._tasks, self.mixture, self._shape)
            except SourceExhausted as exhausted:
                self._end = (number, self._why_ended(cursor, exhausted.source_no))
            else:
                self._cursors[number + 1] = after
                return window
        raise PlanEnded(self._shape.first_step(self._end[0]), self._end[1])

    def _why_ended(self, cursor: Cursor, source_no: int) -> str:
        """What to say of a source that has too little left for the window at a cursor.

        Raises:
            UserError: The source was to last for the whole run.
        """
        if source_no < 0:
            return "every source that has weight has given the epochs it may"
        source, stream = self.sources[source_no], self.streams[source_no]
        given = f"{cursor.ledger.documents[source_no]:,} of {self.mixture.limits[source_no]:,} documents"
        why = f"source {source.name!r} has given {given} that max_epochs={source.max_epochs:g} allows"
        if source.on_exhausted is not Exhausted.error:
            return why
        raise UserError(
            f"{source.where()}: runs out at step {self._shape.first_step(cursor.window_no)}, {given} (max_epochs="
            f"{source.max_epochs:g}, {stream.size:,} an epoch) are given; raise max_epochs, lower the weight, train "
            "fewer steps, or set on_exhausted to stop or reweight"
        )

    def ends_at_step(self, limit: int) -> int | None:
        """The first step below `limit` that does not exist because a source has given its epochs; None if all do.

        Compiles every window before it, unless no source has a limit.
        """
        if any(left is not None for left in self.mixture.limits):
            try:
                self.cursor(-(-limit * self.global_batch_size // self.window_rows))
            except PlanEnded as ended:
                return ended.step if ended.step < limit else None
        return None

    def row(self, row_no: int) -> list[PlannedDocument]:
        """Documents of a row, in their order within it.

        Raises:
            IndexError: The number is negative.
            PlanEnded: There is no such row because a source has given its epochs.
        """
        rows = self.rows([row_no])
        columns = (rows.source_no, rows.sample_no, rows.epoch, rows.start, rows.start + rows.length)
        return [PlannedDocument(*values) for values in zip(*(column.tolist() for column in columns), strict=True)]

    def rows(self, row_nos: Sequence[int]) -> "PlannedRows":
        """Documents of some rows as arrays: what `row` says of each of them, without an object per document.

        Raises:
            IndexError: As `row`.
        """
        if min(row_nos) < 0:
            raise IndexError(f"row {min(row_nos)} of a plan; rows count from 0")
        counts: list[np.ndarray] = [np.zeros(1, np.int64)]
        parts: list[tuple[np.ndarray, ...]] = []
        for window_no, run in groupby(row_nos, lambda row_no: row_no // self.window_rows):
            window = self.window(window_no)
            offsets = np.array(list(run)) - window_no * self.window_rows
            first = window.row_start[offsets]
            count = window.row_start[offsets + 1] - first
            ends = np.cumsum(count)
            chosen = np.repeat(first - ends + count, count) + np.arange(ends[-1])
            parts.append((window.source[chosen], window.document[chosen], window.epoch[chosen], window.length[chosen]))
            counts.append(count)
        source_no, document, epoch, length = (
            parts[0] if len(parts) == 1 else (np.concatenate(columns) for columns in zip(*parts, strict=True))
        )
        sample_no, start = document.copy(), np.zeros(len(document), np.int64)
        for number, stream in enumerate(self.streams):
            table = stream.table
            if table.sample is not None and table.start is not None:
                mine = np.flatnonzero(source_no == number)
                sample_no[mine], start[mine] = table.sample[document[mine]], table.start[document[mine]]
        return PlannedRows(np.cumsum(np.concatenate(counts)), source_no, sample_no, epoch, start, length)

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
        cursor = self.cursor(step * self.global_batch_size // self.window_rows)
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
        saved = cursor["ledger"]
        ledger = Ledger(tuple(saved["documents"]), tuple(saved["tokens"]), tuple(saved["debts"]))
        self._cursors[cursor["window_no"]] = Cursor(cursor["window_no"], ledger, tuple(cursor["fullness"]))


def _mixture_of(sources: Sequence[PlanSource], streams: Sequence[DocumentStream], spec: DataSpec) -> Mixture:
    """The mixture of some sources; sizes for temperature are those of an epoch, in the ratio unit (rows: tokens)."""
    by_samples = spec.ratio_unit is RatioUnit.samples
    sizes = [stream.size if by_samples else stream.size * stream.mean for stream in streams]
    limits = [
        stream.limit(source.max_epochs) if source.max_epochs else None
        for source, stream in zip(sources, streams, strict=True)
    ]
    for source, stream, limit in zip(sources, streams, limits, strict=True):
        if limit == 0:
            raise UserError(
                f"{source.where()}: max_epochs={source.max_epochs:g} of {stream.size:,} documents is less than one "
                "document; raise it, or set the weight to 0"
            )
    return Mixture(
        [source.curve for source in sources],
        spec.ratio_unit,
        schedule_unit=spec.schedule_unit,
        factors=size_factors(sizes, spec.temperature),
        limits=limits,
        leaves=[source.on_exhausted is Exhausted.reweight for source in sources],
    )


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
    if not (math.isfinite(spec.temperature) and spec.temperature >= 0):
        raise UserError(f"data.temperature={spec.temperature} must be 0 (weights are shares) or more")
    for source in sources:
        _check_numbers(source)
    used = sorted((source for source in sources if source.curve.is_used), key=lambda source: source.name)
    if not used:
        raise UserError(f"data.sources: none of {len(sources)} sources has a weight above 0; give at least one a share")
    for source in used:
        _check_content(source, used, spec.ratio_unit)
    moments = {0.0, *(point.at for source in used for point in source.schedule)}
    for moment in sorted(moments):
        if not any(source.curve.at(moment) for source in used):
            raise UserError(
                f"data.sources: from {spec.schedule_unit.value} {moment:g} on no source has a weight above 0; give one "
                "a share there"
            )
    return Plan(identity_of(spec, used, global_batch_size), used, spec)


def _check_numbers(source: PlanSource) -> None:
    """Weights, points and caps that mean something."""
    weights = [source.weight, *(point.weight for point in source.schedule)]
    for weight in weights:
        if not (math.isfinite(weight) and weight >= 0):
            raise UserError(f"{source.where()}: weight {weight} is no share; give a number of 0 or more")
    moments = [point.at for point in source.schedule]
    if not all(math.isfinite(moment) and moment > 0 for moment in moments) or moments != sorted(set(moments)):
        raise UserError(
            f"{source.where()}: the points of its schedule are at {', '.join(f'{moment:g}' for moment in moments)}; "
            "give moments above 0 in ascending order, each once"
        )
    if not (math.isfinite(source.max_epochs) and source.max_epochs >= 0):
        raise UserError(f"{source.where()}: max_epochs={source.max_epochs} must be 0 (no limit) or more")


def _check_content(source: PlanSource, used: Sequence[PlanSource], unit: RatioUnit) -> None:
    """A source that is to give something has something."""
    num_samples = len(source.lengths)
    num_left_out = 0 if source.left_out is None else int(source.left_out.sum())
    if num_samples > num_left_out:
        return
    weight = max([source.weight, *(point.weight for point in source.schedule)])
    total = sum(max([other.weight, *(point.weight for point in other.schedule)]) for other in used)
    is_to = f"is to fill {weight / total:.1%} of the {unit.value} (weight {weight:g} of {total:g})"
    if not num_samples:
        raise UserError(f"{source.where()}: holds 0 samples but {is_to}; set its weight to 0 or prepare data for it")
    masks = ", ".join(source.masks) or "its mask"
    raise UserError(
        f"{source.where()}: {masks} leaves out all of its {num_samples:,} samples but it {is_to}; set its weight to 0 "
        "or take masks away"
    )
