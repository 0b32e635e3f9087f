"""What a plan will do, said before anything runs: shares, epochs, padding, balance of images, and what happens when.

The first steps are compiled and counted; the rest of a stage is projected from them (`supply.project`), because a stage
of 180,000 steps has half a billion documents. Which figure is which is said: `measured_steps` tells how far counting
went. Steps are counted as a run's metrics count them: the first is step 1, and "after step n" means n are trained.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.plan.deal import deal_to_ranks
from data_pipeline.plan.open import open_data
from data_pipeline.plan.plan import Plan, PlanEnded
from data_pipeline.plan.schedule import WHOLE
from data_pipeline.plan.supply import EPOCHS_LISTED, Projection, check_supply, project
from data_pipeline.plan.window import Window
from data_pipeline.schema import TaskId
from data_pipeline.spec import DataSpec, RatioUnit
from data_pipeline.text.interface import TextTokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceReport:
    """One source: what was counted in the measured steps, and what the whole stage comes to."""

    name: str
    task: str
    planned_share: float
    """Of all tokens, samples or rows, as data.ratio_unit says; the mean of the measured windows."""
    realised_share: float
    """In the same unit."""
    max_off_share: float
    """Farthest that the source was from what it was owed after a window, in the same unit."""
    token_share: float
    """Of all tokens, whatever the unit."""
    tokens: int
    documents: int
    """Documents trained on; pieces of cut texts count each."""
    documents_per_epoch: int
    """Documents the source holds."""
    samples_left_out: int
    """By masks."""
    epochs: float
    """How often the source is gone through."""
    stage_tokens: int
    """Over the whole stage."""
    stage_epochs: float
    epoch_ends: tuple[int, ...]
    """Steps in which the source has been gone through once more, the first few."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanEvent:
    """Something that changes the mixture."""

    after_step: int
    """Steps trained before it holds; always the end of a window."""
    source: str
    what: str
    is_projected: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanReport:
    """A plan over a stage."""

    digest: str
    num_steps: int
    """Of the stage; fewer if the plan ends before."""
    measured_steps: int
    """Steps that were compiled; figures without "stage" are of these."""
    global_batch_size: int
    seq_len: int
    steps_per_window: int
    """Weights change between windows only."""
    ratio_unit: str
    num_rows: int
    tokens: int
    """Without padding."""
    padding_fraction: float
    """Padding over all positions."""
    documents_per_row: float
    images_per_row: float
    """Images to understand, mean."""
    max_images_per_row: int
    max_task_error_rows: float
    """Largest distance of a task from its share of a single step, in rows."""
    rank_image_imbalance: float
    """Images on the fullest rank over the mean rank, mean of all steps (1 is even)."""
    micro_batch_image_imbalance: float
    """The same per micro-batch position: sum of the fullest over sum of the means."""
    stage_tokens: int
    """Over the whole stage, without padding."""
    events: tuple[PlanEvent, ...]
    sources: tuple[SourceReport, ...]


def report_plan(
    plan: Plan,
    num_steps: int,
    *,
    dp_size: int = 1,
    micro_batch_size: int = 1,
    max_steps: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> PlanReport:
    """Compiles the first steps of a stage, sums them up and projects the rest.

    Args:
        plan: The plan.
        num_steps: Steps of the stage, at least 1.
        dp_size: Data-parallel ranks that images are dealt to.
        micro_batch_size: Rows per micro-batch.
        max_steps: Steps to compile, rounded up to whole windows; 0 compiles all.
        progress: Told of compiled steps and how many there are to compile.

    Raises:
        UserError: The plan has no step at all, because a source's limit is below one window.
    """
    per_window = plan.steps_per_window
    to_measure = min(num_steps, -(-max_steps // per_window) * per_window) if max_steps else num_steps
    totals, done = _Totals(plan), 0
    try:
        while done < to_measure:
            steps = min(per_window, to_measure - done)
            totals.add(done // per_window, steps)
            done += steps
            if progress:
                progress(done, to_measure)
    except PlanEnded as ended:
        if not done:
            raise UserError(
                f"the data plan has no step: {ended.why}, too few for a window; raise max_epochs"
            ) from ended
        totals.events.append(PlanEvent(after_step=done, source="", what=f"ends: {ended.why}", is_projected=False))
        num_steps = done
    return _report(totals, num_steps, done, (dp_size, micro_batch_size))


def _report(totals: "_Totals", num_steps: int, measured_steps: int, ranks: tuple[int, int]) -> PlanReport:
    plan = totals.plan
    projection, events = None, totals.events
    if measured_steps < num_steps:
        start = plan.cursor(measured_steps // plan.steps_per_window)
        projection = project(plan, num_steps, totals.row_tokens(), start=start)
        events = events + _projected_events(plan, projection, num_steps)
        num_steps = min(num_steps, projection.ends_at or num_steps)
    images = np.concatenate(totals.images)
    of_ranks, of_positions = _imbalance(images.reshape(measured_steps, -1), *ranks)
    tokens, num_rows = int(totals.tokens.sum()), measured_steps * plan.global_batch_size
    return PlanReport(
        digest=plan.digest,
        num_steps=num_steps,
        measured_steps=measured_steps,
        global_batch_size=plan.global_batch_size,
        seq_len=plan.seq_len,
        steps_per_window=plan.steps_per_window,
        ratio_unit=plan.mixture.unit.value,
        num_rows=num_rows,
        tokens=tokens,
        padding_fraction=1.0 - tokens / (num_rows * plan.seq_len),
        documents_per_row=float(totals.documents.sum() / num_rows),
        images_per_row=float(images.mean()),
        max_images_per_row=int(images.max()),
        max_task_error_rows=totals.max_task_error / plan.seq_len,
        rank_image_imbalance=of_ranks,
        micro_batch_image_imbalance=of_positions,
        stage_tokens=round(sum(projection.tokens)) if projection else tokens,
        events=tuple(sorted(events, key=lambda event: event.after_step)),
        sources=totals.sources(projection),
    )


def _projected_events(plan: Plan, projection: Projection, num_steps: int) -> list[PlanEvent]:
    """What will change the mixture after the steps that were compiled."""
    found = []
    for step, number, weight in projection.changes:
        found.append((step, plan.sources[number].name, f"weight becomes {weight:g}"))
    for number, step in projection.exhausted_at.items():
        found.append((step, plan.sources[number].name, _limit_reached(plan, number)))
    if projection.ends_at is not None:
        found.append((projection.ends_at, "", "ends"))
    return [
        PlanEvent(after_step=step, source=name, what=what, is_projected=True)
        for step, name, what in found
        if step < num_steps
    ]


def _limit_reached(plan: Plan, number: int) -> str:
    return f"has given its max_epochs={plan.sources[number].max_epochs:g}" + (
        " and leaves the mixture" if plan.mixture.leaves[number] else ""
    )


def _imbalance(images: np.ndarray, dp_size: int, micro_batch_size: int) -> tuple[float, float]:
    """Fullest over mean, of ranks and of micro-batch positions; `images` is [steps, global_batch_size]."""
    ranks: list[float] = []
    fullest = mean = 0.0
    for counts in images:
        if counts.any():
            held = counts[deal_to_ranks(counts, dp_size, micro_batch_size)].sum(axis=2)
            ranks.append(float(held.sum(axis=1).max() / held.sum(axis=1).mean()))
            fullest += float(held.max(axis=0).sum())
            mean += float(held.mean(axis=0).sum())
    return (float(np.mean(ranks)), fullest / mean) if ranks else (1.0, 1.0)


class _Totals:
    """Sums over windows."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        num_sources = len(plan.sources)
        self._task = np.array([TaskId[source.task.name] for source in plan.sources], np.int64)
        self.tokens = np.zeros(num_sources, np.int64)
        self.documents = np.zeros(num_sources, np.int64)
        self.images: list[np.ndarray] = []
        self.events: list[PlanEvent] = []
        self.max_task_error = 0.0
        self._rows = np.zeros(num_sources, np.int64)
        self._planned = np.zeros(num_sources)
        self._max_debt = [0] * num_sources
        self._epoch_ends: list[list[int]] = [[] for _ in range(num_sources)]
        self._time = 0.0

    def add(self, window_no: int, num_steps: int) -> None:
        """Compiles a window and adds its first steps.

        Raises:
            PlanEnded: There is no such window.
        """
        plan = self.plan
        window = plan.window(window_no)
        num_rows = num_steps * plan.global_batch_size
        stop = int(window.row_start[num_rows])
        source, length = window.source[:stop], window.length[:stop]
        row = np.repeat(np.arange(num_rows), np.diff(window.row_start[: num_rows + 1]))
        step = row // plan.global_batch_size
        count = len(plan.sources)
        in_steps = np.bincount(step * count + source, length, num_steps * count).astype(np.int64).reshape(-1, count)
        rows = np.bincount(source[window.row_start[:num_rows]], minlength=count)
        before = self._amounts()
        self.tokens += in_steps.sum(axis=0)
        self._rows += rows
        self.images.append(window.num_images[:num_rows])
        self._add_task_errors(in_steps, np.bincount(window.source, window.length, count))
        self._add_epoch_ends(step, source, window_no * plan.steps_per_window)
        self._add_planned(window, self._amounts() - before)
        self._add_events(window_no, window)
        debts = plan.cursor(window_no + 1).ledger.debts
        self._max_debt = [max(most, abs(debt)) for most, debt in zip(self._max_debt, debts, strict=True)]

    def _amounts(self) -> np.ndarray:
        """What was taken so far, in what shares count."""
        of_unit = {RatioUnit.tokens: self.tokens, RatioUnit.samples: self.documents, RatioUnit.rows: self._rows}
        return of_unit[self.plan.mixture.unit].astype(np.float64)

    def _add_planned(self, window: Window, amounts: np.ndarray) -> None:
        """Adds what the sources were due: shares of what is shared; those that gave the rest they had, that."""
        shares = np.array(window.shares, np.float64) / WHOLE
        given = np.isin(np.arange(len(amounts)), window.finished) & (shares == 0)
        self._planned += np.where(given, amounts, shares * amounts[~given].sum())

    def _add_events(self, window_no: int, window: Window) -> None:
        """Notes weights that hold from this window on, and sources that leave in it."""
        plan = self.plan
        step = window_no * plan.steps_per_window
        time = plan.mixture.time_of(step, plan.cursor(window_no).ledger)
        for number, source in enumerate(plan.sources):
            for point in source.schedule:
                if self._time < point.at <= time:
                    self._add_event(step, number, f"weight becomes {point.weight:g}")
            if number in window.finished:
                self._add_event(step, number, _limit_reached(plan, number))
        self._time = time

    def _add_event(self, step: int, number: int, what: str) -> None:
        name = self.plan.sources[number].name
        self.events.append(PlanEvent(after_step=step, source=name, what=what, is_projected=False))

    def _add_epoch_ends(self, step: np.ndarray, source: np.ndarray, first_step: int) -> None:
        """Notes the steps in which a source has given as many documents as some number of epochs holds."""
        for number, ends in enumerate(self._epoch_ends):
            size = self.plan.streams[number].size
            given = np.bincount(step[source == number], minlength=1)
            reached = self.documents[number] + np.cumsum(given)
            epochs = np.arange(self.documents[number] // size + 1, reached[-1] // size + 1)
            ends += (first_step + 1 + np.searchsorted(reached, epochs * size)).tolist()
            self.documents[number] = reached[-1]

    def _add_task_errors(self, in_steps: np.ndarray, window_tokens: np.ndarray) -> None:
        """Compares the tasks of every step with their share of the window."""
        by_task = np.zeros((len(in_steps), len(TaskId)), np.float64)
        quota = np.zeros(len(TaskId), np.float64)
        np.add.at(by_task.T, self._task, in_steps.T)
        np.add.at(quota, self._task, window_tokens / window_tokens.sum())
        error = np.abs(by_task - by_task.sum(axis=1, keepdims=True) * quota)
        self.max_task_error = max(self.max_task_error, float(error.max()))

    def row_tokens(self) -> list[float]:
        """Mean tokens in a row; where rows belong to sources, of each (one without rows: a full one)."""
        if self.plan.mixture.unit is RatioUnit.rows:
            pairs = zip(self.tokens.tolist(), self._rows.tolist(), strict=True)
            return [tokens / rows if rows else float(self.plan.seq_len) for tokens, rows in pairs]
        num_rows = sum(map(len, self.images))
        return [float(self.tokens.sum() / num_rows)] * len(self.tokens)

    def sources(self, projection: Projection | None) -> tuple[SourceReport, ...]:
        """Reports of all sources."""
        plan, amounts = self.plan, self._amounts()
        reports = []
        for number, source in enumerate(plan.sources):
            size = plan.streams[number].size
            documents, tokens = int(self.documents[number]), int(self.tokens[number])
            ends = self._epoch_ends[number]
            if projection:
                ends = ends + [step + 1 for step in projection.epoch_ends[number]]
            reports.append(
                SourceReport(
                    name=source.name,
                    task=source.task.value,
                    planned_share=float(self._planned[number] / self._planned.sum()),
                    realised_share=float(amounts[number] / amounts.sum()),
                    max_off_share=self._max_debt[number] / WHOLE,
                    token_share=float(tokens / self.tokens.sum()),
                    tokens=tokens,
                    documents=documents,
                    documents_per_epoch=size,
                    samples_left_out=0 if source.left_out is None else int(source.left_out.sum()),
                    epochs=documents / size,
                    stage_tokens=round(projection.tokens[number]) if projection else tokens,
                    stage_epochs=(projection.documents[number] if projection else documents) / size,
                    epoch_ends=tuple(ends[:EPOCHS_LISTED]),
                )
            )
        return tuple(reports)


def describe_plan(
    spec: DataSpec,
    tokenizer: TextTokenizer,
    *,
    global_batch_size: int,
    num_steps: int,
    dp_size: int = 1,
    micro_batch_size: int = 1,
) -> PlanReport:
    """Opens the sources of a spec and reports their plan, every step compiled (`dataclasses.asdict` is its JSON).

    Raises:
        UserError: As `open_data` and `check_supply`.
    """
    data = open_data(spec, tokenizer, global_batch_size=global_batch_size)
    check_supply(data.plan, num_steps)
    return report_plan(data.plan, num_steps, dp_size=dp_size, micro_batch_size=micro_batch_size)
