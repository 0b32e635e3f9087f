"""Deals packed rows: into global batches by task, and inside a global batch to ranks by images.

Both deals rest on one step: items go in descending order to bins in ascending order of what they hold. If the bins
differed by at most d before, they differ by at most max(d, largest - smallest item) after; so with one row per bin and
round, bins never differ by more than one row. The rows of a step are fixed by the first deal alone; the second
only says who computes them, so it may depend on the layout.
"""

import numpy as np

from data_pipeline.plan.order import permutation

_MAX_EXCHANGES = 64
_MAX_SWAPS = 32
"""How often rows are exchanged between two global batches, and all pairs of ranks swap."""


def deal_to_batches(tokens: np.ndarray, num_batches: int, key: int) -> np.ndarray:
    """Orders the rows of a window so that every task's tokens are alike in all its global batches.

    Args:
        tokens: int [rows, tasks], tokens of each task in each row; rows is a multiple of `num_batches`.
        num_batches: Global batches in the window.
        key: Fixes which of several equal rows goes where.

    Returns:
        int64 [rows]: row numbers, batch after batch.
    """
    num_rows, num_tasks = tokens.shape
    rows = permutation(key, num_rows).astype(np.int64)
    # Rounds of rows alike in the task that varies most: its batches then cannot differ by more than one row
    # however a round is dealt, and each round is dealt by the task that is worst at that time.
    main = int(np.argmax(tokens.astype(np.float64).var(axis=0)))
    rows = rows[np.argsort(-tokens[rows, main], kind="stable")]
    batches = np.empty((num_batches, num_rows // num_batches), np.int64)
    held = np.zeros((num_batches, num_tasks), np.int64)
    for column, dealt in enumerate(rows.reshape(-1, num_batches)):
        worst = int(np.argmax(np.ptp(held, axis=0))) if column else main
        to = np.argsort(held[:, worst], kind="stable")
        ordered = dealt[np.argsort(-tokens[dealt, worst], kind="stable")]
        batches[to, column] = ordered
        held[to] += tokens[ordered]
    _even_out(batches, held - held.mean(axis=0), tokens)
    return batches.reshape(-1)


def _even_out(batches: np.ndarray, excess: np.ndarray, tokens: np.ndarray) -> None:
    """Exchanges rows between batches, in place, while a task is more than half a row off its mean and that helps.

    The rounds keep the varying task in bounds for certain and the others nearly always; this is for the rest.
    """
    row_tokens = int(tokens.sum(axis=1).max())
    for _ in range(_MAX_EXCHANGES):
        batch, task = np.unravel_index(int(np.argmax(np.abs(excess))), excess.shape)
        if abs(excess[batch, task]) <= row_tokens / 2:
            return
        other = int(np.argmin(excess[:, task] * np.sign(excess[batch, task])))
        looked_at = _spread(batches.shape[1])
        change = tokens[batches[other, looked_at]][None, :, :] - tokens[batches[batch, looked_at]][:, None, :]
        after = np.maximum(np.abs(excess[batch] + change).max(axis=2), np.abs(excess[other] - change).max(axis=2))
        best = np.unravel_index(int(np.argmin(after)), after.shape)
        if after[best] >= max(np.abs(excess[batch]).max(), np.abs(excess[other]).max()):
            return
        excess[batch] += change[best]
        excess[other] -= change[best]
        a, b = looked_at[best[0]], looked_at[best[1]]
        batches[batch, a], batches[other, b] = batches[other, b], batches[batch, a]


def _spread(count: int) -> np.ndarray:
    """At most 64 evenly spread numbers below `count`."""
    return np.unique(np.linspace(0, count - 1, min(count, 64)).astype(np.int64))


def deal_to_ranks(num_images: np.ndarray, dp_size: int, micro_batch_size: int) -> np.ndarray:
    """Places the rows of a global batch on ranks and micro-batches so that all carry like numbers of images.

    Args:
        num_images: int [global_batch_size], images to understand in each row.
        dp_size: Data-parallel ranks.
        micro_batch_size: Rows per micro-batch.

    Returns:
        int64 [dp_size, micro-batches, micro_batch_size]: offsets within the global batch. Micro-batches of the same
        position are alike over the ranks (the slowest sets the beat), and so are the totals of the ranks.

    Raises:
        ValueError: The global batch does not divide evenly.
    """
    num_rows = len(num_images)
    if num_rows % (dp_size * micro_batch_size):
        raise ValueError(
            f"global_batch_size={num_rows} is not a multiple of dp_size={dp_size} x micro_batch_size={micro_batch_size}"
        )
    counts = np.asarray(num_images, np.int64)
    cells = _deal(counts, num_rows // micro_batch_size)
    _swap_evenly(cells, counts)
    of_cell = counts[cells].sum(axis=1)
    positions = _deal(of_cell, dp_size)
    _swap_evenly(positions, of_cell, in_place=True)
    return cells[positions]


def _deal(values: np.ndarray, num_bins: int) -> np.ndarray:
    """int64 [num_bins, items / num_bins]: items dealt round after round, largest first, to the least loaded bins."""
    order = np.argsort(-values, kind="stable").reshape(-1, num_bins)
    held = np.zeros(num_bins, np.int64)
    bins = np.empty((num_bins, len(order)), np.int64)
    for column, items in enumerate(order):
        to = np.argsort(held, kind="stable")
        bins[to, column] = items
        held[to] += values[items]
    return bins


def _swap_evenly(bins: np.ndarray, values: np.ndarray, in_place: bool = False) -> None:
    """Swaps items between full and empty bins while that brings them nearer; dealing alone leaves them an item apart.

    Args:
        bins: int64 [bins, items per bin], changed in place.
        values: int64 [items].
        in_place: Whether an item may only change places with one in the same column, so that columns keep theirs.
    """
    pairs = len(bins) // 2
    looked_at = _spread(bins.shape[1])
    for _ in range(_MAX_SWAPS if pairs else 0):
        held = values[bins].sum(axis=1)
        order = np.argsort(held, kind="stable")
        low, high = order[:pairs], order[::-1][:pairs]
        gap = (held[high] - held[low])[:, None, None]
        items = values[bins[:, looked_at]]
        moved = items[high][:, :, None] - items[low][:, None, :]
        helps = (moved > 0) & (moved < gap)
        if in_place:
            helps &= np.eye(len(looked_at), dtype=bool)
        # The nearer to half the gap, the nearer the two come.
        cost = np.where(helps, np.abs(2 * moved - gap), np.iinfo(np.int64).max).reshape(pairs, -1)
        best = cost.argmin(axis=1)
        found = np.flatnonzero(helps.reshape(pairs, -1)[np.arange(pairs), best])
        if not len(found):
            return
        here, there = looked_at[best[found] // len(looked_at)], looked_at[best[found] % len(looked_at)]
        high, low = high[found], low[found]
        bins[high, here], bins[low, there] = bins[low, there], bins[high, here]
