"""The loader of one data-parallel rank: for every step the list of its micro-batches.

A plain torch DataLoader over `RowDataset`; which rows it asks for is computed from the step number, so there is no
loader state to save: a run resumes by naming the step. Workers, prefetching and dp_size change who reads a row and
when, never what is in it.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from data_pipeline.errors import UserError
from data_pipeline.plan.open import OpenData
from data_pipeline.plan.plan import Plan, PlanEnded
from data_pipeline.schema import Hole
from data_pipeline.stream.assemble import combine_digests, row_digest
from data_pipeline.stream.canvas import Rows
from data_pipeline.stream.collate import Parcel, from_parcel, split, to_batch, to_parcel
from data_pipeline.stream.dataset import RowDataset
from data_pipeline.stream.workers import leave_signals_to_parent, signals_held

Batch = dict[str, Tensor]


def build_loader(
    data: OpenData,
    *,
    micro_batch_size: int,
    dp_rank: int = 0,
    dp_size: int = 1,
    first_step: int = 0,
    num_steps: int,
) -> "StepLoader":
    """The loader of one rank over steps first_step ... first_step + num_steps - 1, or as far as the plan goes.

    Raises:
        ValueError: global_batch_size is not a multiple of dp_size x micro_batch_size, or there is no such rank.
    """
    if not 0 <= dp_rank < dp_size:
        raise ValueError(f"dp_rank {dp_rank} of {dp_size}")
    with suppress(PlanEnded):  # then there is no step to give; what follows would find it
        data.plan.place(first_step, dp_size, micro_batch_size)
    rows = _RowNumbers(data.plan, micro_batch_size, (dp_rank, dp_size), range(first_step, first_step + num_steps))
    return StepLoader(RowDataset(data), rows, data.spec.num_workers)


class StepLoader:
    """Iterates over steps; each is the list of this rank's micro-batches, in the order to run them."""

    def __init__(self, dataset: RowDataset, rows: "_RowNumbers", num_workers: int) -> None:
        """Use `build_loader`."""
        self.dataset = dataset
        self.holes: tuple[Hole, ...] = ()
        """Broken samples in the step that was given last, in the micro-batches of this rank."""
        self._rows = rows
        self._num_workers = num_workers

    def __len__(self) -> int:
        """Steps asked for; there are fewer where the plan ends before."""
        return len(self._rows.steps)

    def __iter__(self) -> Iterator[list[Batch]]:
        """Starts at the first step.

        Raises:
            UserError: A shard is missing or cannot be read. What is damaged in a readable one is a hole.
        """
        loader = DataLoader(
            _MicroBatches(self.dataset),
            batch_sampler=self._rows,
            num_workers=self._num_workers,
            collate_fn=_sent if self._num_workers else _as_tensors,
            # Of its own, or starting a loader would draw from (and so shift) the generator of the whole process.
            generator=torch.Generator(),
            worker_init_fn=leave_signals_to_parent,
        )
        with signals_held():
            batches = iter(loader)
        step: list[Batch] = []
        holes: list[Hole] = []
        for loaded in batches:
            if isinstance(loaded, UserError):
                raise loaded
            batch, new_holes = loaded
            step.append(from_parcel(batch) if isinstance(batch, Parcel) else batch)
            holes += new_holes
            if len(step) == self._rows.num_micro_batches:
                self.holes = tuple(holes)
                yield step
                step, holes = [], []


class _RowNumbers(Sampler[list[int]]):
    """Row numbers of each micro-batch of one rank."""

    def __init__(self, plan: Plan, micro_batch_size: int, rank: tuple[int, int], steps: range) -> None:
        self.steps = steps
        self.num_micro_batches = plan.global_batch_size // (micro_batch_size * rank[1])
        self._plan = plan
        self._micro_batch_size = micro_batch_size
        self._dp_rank, self._dp_size = rank

    def __len__(self) -> int:
        return len(self.steps) * self.num_micro_batches

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            try:
                placed = self._plan.place(step, self._dp_size, self._micro_batch_size)
            except PlanEnded:
                return  # a source with on_exhausted=stop has given its epochs; every rank ends here
            yield from placed[self._dp_rank].tolist()


class _MicroBatches(Dataset[Rows | UserError]):
    """Micro-batches by their row numbers. Errors meant for users are handed on as values: a worker would wrap them into
    its traceback."""

    def __init__(self, rows: RowDataset) -> None:
        self._rows = rows

    def __getitems__(self, row_nos: list[int]) -> Rows | UserError:
        """What torch's fetcher calls with everything that the sampler gives at once."""
        try:
            return self._rows.micro_batch(row_nos)
        except UserError as error:
            return error


def _as_tensors(loaded: Rows | UserError) -> tuple[Batch, tuple[Hole, ...]] | UserError:
    return loaded if isinstance(loaded, UserError) else (to_batch(loaded.arrays), loaded.holes)


def _sent(loaded: Rows | UserError) -> tuple[Parcel, tuple[Hole, ...]] | UserError:
    return loaded if isinstance(loaded, UserError) else (to_parcel(loaded.arrays), loaded.holes)


def row_digests(micro_batches: Sequence[Batch]) -> list[bytes]:
    """Digests of the rows in some micro-batches; gather those of all ranks and `combine_digests` them."""
    return [row_digest(row) for batch in micro_batches for row in split(batch)]


def batch_hash(micro_batches: Sequence[Batch]) -> str:
    """Hash (hex) of a global batch, given all its micro-batches in any order; equals `RowDataset.step_hash`."""
    return combine_digests(row_digests(micro_batches))
