"""What a plan will do, said before anything runs: shares, epochs, padding, balance of images."""

from dataclasses import dataclass

import numpy as np

from data_pipeline.plan.deal import deal_to_ranks
from data_pipeline.plan.open import open_data
from data_pipeline.plan.plan import Plan
from data_pipeline.plan.window import Window
from data_pipeline.schema import TaskId
from data_pipeline.spec import DataSpec
from data_pipeline.text.interface import TextTokenizer

_WRAPS_LISTED = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceReport:
    """One source over the rows reported."""

    name: str
    task: str
    planned_share: float
    """Of all tokens or samples, as data.ratio_unit says."""
    realised_share: float
    """In the same unit."""
    token_share: float
    """Of all tokens, whatever the unit."""
    tokens: int
    documents: int
    """Documents trained on; pieces of cut texts count each."""
    documents_per_epoch: int
    """Documents the source holds."""
    epochs: float
    """How often the source is gone through."""
    wraps_at_steps: tuple[int, ...]
    """Steps in which the source has been gone through once more, the first few."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanReport:
    """A plan over a number of steps."""

    digest: str
    num_steps: int
    global_batch_size: int
    seq_len: int
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
    sources: tuple[SourceReport, ...]


def report_plan(plan: Plan, num_steps: int, *, dp_size: int = 1, micro_batch_size: int = 1) -> PlanReport:
    """Compiles the first `num_steps` steps and sums them up.

    Args:
        plan: The plan.
        num_steps: Steps to look at, at least 1.
        dp_size: Data-parallel ranks that images are dealt to.
        micro_batch_size: Rows per micro-batch.
    """
    totals = _Totals(plan)
    num_rows = num_steps * plan.global_batch_size
    for first in range(0, num_rows, plan.window_rows):
        totals.add(plan.window(first // plan.window_rows), first, min(plan.window_rows, num_rows - first))
    images = np.concatenate(totals.images)
    of_ranks, of_positions = _imbalance(images.reshape(num_steps, -1), dp_size, micro_batch_size)
    tokens = int(totals.tokens.sum())
    return PlanReport(
        digest=plan.digest,
        num_steps=num_steps,
        global_batch_size=plan.global_batch_size,
        seq_len=plan.seq_len,
        num_rows=num_rows,
        tokens=tokens,
        padding_fraction=1.0 - tokens / (num_rows * plan.seq_len),
        documents_per_row=float(totals.documents.sum() / num_rows),
        images_per_row=float(images.mean()),
        max_images_per_row=int(images.max()),
        max_task_error_rows=totals.max_task_error / plan.seq_len,
        rank_image_imbalance=of_ranks,
        micro_batch_image_imbalance=of_positions,
        sources=totals.sources(),
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
        self._plan = plan
        num_sources = len(plan.sources)
        self._task = np.array([TaskId[source.task.name] for source in plan.sources], np.int64)
        self.tokens = np.zeros(num_sources, np.int64)
        self.documents = np.zeros(num_sources, np.int64)
        self.images: list[np.ndarray] = []
        self.max_task_error = 0.0
        self._wraps: list[list[int]] = [[] for _ in range(num_sources)]

    def add(self, window: Window, first_row: int, num_rows: int) -> None:
        """Adds the first rows of a window."""
        stop = int(window.row_start[num_rows])
        source, length = window.source[:stop], window.length[:stop]
        step = np.repeat(np.arange(num_rows), np.diff(window.row_start[: num_rows + 1])) // self._plan.global_batch_size
        in_steps = np.zeros((num_rows // self._plan.global_batch_size, len(self.tokens)), np.int64)
        np.add.at(in_steps, (step, source), length)
        self.tokens += in_steps.sum(axis=0)
        self.images.append(window.num_images[:num_rows])
        self._add_task_errors(in_steps, np.bincount(window.source, window.length, len(self.tokens)))
        self._add_wraps(step, source, first_row // self._plan.global_batch_size)

    def _add_wraps(self, step: np.ndarray, source: np.ndarray, first_step: int) -> None:
        """Notes the steps in which a source has given as many documents as some number of epochs holds."""
        for number, wraps in enumerate(self._wraps):
            size = len(self._plan.streams[number].table)
            given = np.bincount(step[source == number], minlength=1)
            reached = self.documents[number] + np.cumsum(given)
            epochs = np.arange(self.documents[number] // size + 1, reached[-1] // size + 1)
            wraps += (first_step + np.searchsorted(reached, epochs * size)).tolist()
            self.documents[number] = reached[-1]

    def _add_task_errors(self, in_steps: np.ndarray, window_tokens: np.ndarray) -> None:
        """Compares the tasks of every step with their share of the window."""
        by_task = np.zeros((len(in_steps), len(TaskId)), np.float64)
        quota = np.zeros(len(TaskId), np.float64)
        np.add.at(by_task.T, self._task, in_steps.T)
        np.add.at(quota, self._task, window_tokens / window_tokens.sum())
        error = np.abs(by_task - by_task.sum(axis=1, keepdims=True) * quota)
        self.max_task_error = max(self.max_task_error, float(error.max()))

    def sources(self) -> tuple[SourceReport, ...]:
        """Reports of all sources."""
        unit = self._plan.mixture.unit
        amounts = self.tokens if unit.value == "tokens" else self.documents
        reports = []
        for number, source in enumerate(self._plan.sources):
            size = len(self._plan.streams[number].table)
            reports.append(
                SourceReport(
                    name=source.name,
                    task=source.task.value,
                    planned_share=self._plan.mixture.shares(0)[number] / 10**12,
                    realised_share=float(amounts[number] / amounts.sum()),
                    token_share=float(self.tokens[number] / self.tokens.sum()),
                    tokens=int(self.tokens[number]),
                    documents=int(self.documents[number]),
                    documents_per_epoch=size,
                    epochs=float(self.documents[number] / size),
                    wraps_at_steps=tuple(self._wraps[number][:_WRAPS_LISTED]),
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
    """Opens the sources of a spec and reports their plan: what `data plan` shows (`dataclasses.asdict` is its JSON).

    Raises:
        UserError: As `open_data`.
    """
    data = open_data(spec, tokenizer, global_batch_size=global_batch_size)
    return report_plan(data.plan, num_steps, dp_size=dp_size, micro_batch_size=micro_batch_size)
