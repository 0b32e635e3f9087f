"""What filled the memory when CUDA ran out of it: a snapshot beside the run, and a line that says what to change.

The snapshot opens at https://docs.pytorch.org/memory_viz. Without a recorded history it shows what lay where, but not
who put it there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_HISTORY_ENTRIES = 100_000
REMEDY = (
    "out of memory: lower parallel.micro_batch_size or data.seq_len, set parallel.recompute to full, or raise "
    "parallel.tp_size, pp_size or zero_stage"
)


@contextmanager
def memory_snapshot_on_failure(run_dir: Path, rank: int, *, history: bool) -> Iterator[None]:
    """Lets everything pass; on the way of an out-of-memory error writes `memory-rank-<rank>.pickle`, adds the remedy.

    Args:
        run_dir: where the snapshot goes.
        rank: of this process.
        history: record the stacks of allocations from here on.
    """
    records = history and torch.cuda.is_available()
    if records:
        torch.cuda.memory._record_memory_history(max_entries=_HISTORY_ENTRIES)
    try:
        yield
    except torch.OutOfMemoryError as error:
        error.add_note(REMEDY)
        if torch.cuda.is_available():
            path = run_dir / f"memory-rank-{rank}.pickle"
            torch.cuda.memory._dump_snapshot(str(path))
            error.add_note(f"what lay in memory: {path}")
        raise
    finally:
        if records:
            torch.cuda.memory._record_memory_history(enabled=None)
