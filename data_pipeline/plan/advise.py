"""Which row length suits the documents: really packs the first rows of the mixture at many lengths.

Where images and drawings are all there is, padding jumps between 0.1 % and 10 % with the row length (seven drawings of
587 tokens fill 4160 and leave 500 of 4096 open), and no formula says where. Only lengths matter, so the sources are
replaced by as many of their documents as some rows hold, in the order of training: the time hardly depends on how large
they are. Longer rows cost memory and shorter ones hold less, so padding is weighed against the distance to the length
asked for: see `POINTS_PER_LENGTH`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.plan.documents import PlanSource
from data_pipeline.plan.plan import Plan, compile_plan
from data_pipeline.spec import Captions, DataSpec, Exhausted

POINTS_PER_LENGTH = 5.0
"""Percentage points of padding that a seq_len twice as long must save; a tenth longer or shorter, a tenth of that. The
advised length has the least sum of padding and this."""
STEP = 64
"""Row lengths that are looked at are multiples of this, which keeps kernels fast."""
_TOKENS = 1 << 23
"""Tokens packed at each length, 2048 rows of 4096, unless a window holds fewer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SeqLenRow:
    """What rows of one length would hold."""

    seq_len: int
    padding_fraction: float
    """Padding over all positions."""
    documents_per_row: float
    images_per_row: float
    """Images to understand."""
    cost: float
    """Padding in percentage points and what the distance to the length asked for is worth in them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SeqLenAdvice:
    """Row lengths and the one to take."""

    asked: int
    advised: int
    """The one of least cost, the shortest of several."""
    shortest: int
    """Tokens of the longest document that must not be cut; rows cannot be shorter."""
    rows: tuple[SeqLenRow, ...]
    """By length; the length asked for is among them if documents fit into it."""


def around(seq_len: int) -> list[int]:
    """Row lengths from half to twice a length: it and multiples of 64 (of more where that would be over a hundred)."""
    step = STEP * -(-seq_len // (STEP * 64))
    first, last = max(step, -(-seq_len // 2 // step) * step), 2 * seq_len
    return sorted({seq_len, *range(first, last + 1, step)})


def advise_seq_len(
    spec: DataSpec,
    sources: Sequence[PlanSource],
    global_batch_size: int,
    candidates: Sequence[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SeqLenAdvice:
    """Packs rows of several lengths with the documents and shares that training begins with.

    Args:
        spec: The mixture; its seq_len is the length asked for.
        sources: All sources of the mixture.
        global_batch_size: Rows per step.
        candidates: Row lengths; half to twice the length asked for unless given.
        progress: Told how many lengths are done, and of how many.

    Raises:
        UserError: As `compile_plan`, or no candidate is as long as the longest document that must not be cut.
    """
    longest = max((int(source.lengths.max()) for source in sources if len(source.lengths)), default=1)
    whole = compile_plan(replace(spec, seq_len=max(longest, 1)), sources, global_batch_size=global_batch_size)
    uncut = [stream.longest for stream, source in zip(whole.streams, whole.sources, strict=True) if not source.can_cut]
    shortest = max(uncut, default=1)
    candidates = around(spec.seq_len) if candidates is None else sorted(set(candidates))
    fitting = [seq_len for seq_len in candidates if seq_len >= shortest]
    if not fitting:
        raise UserError(
            f"data.seq_len={spec.seq_len}: a document that must not be cut has {shortest} tokens, more than any length "
            f"looked at (up to {max(candidates, default=0)}); ask for {-(-shortest // STEP) * STEP} or more, or leave "
            "such documents out with a mask"
        )
    rows = []
    few = _first_documents(whole, max(_num_rows(spec, seq_len) * seq_len for seq_len in fitting))
    for number, seq_len in enumerate(fitting):
        rows.append(_look(replace(spec, seq_len=seq_len), few, spec.seq_len))
        if progress is not None:
            progress(number + 1, len(fitting))
    best = min(rows, key=lambda row: (row.cost, row.seq_len))
    return SeqLenAdvice(asked=spec.seq_len, advised=best.seq_len, shortest=shortest, rows=tuple(rows))


def _num_rows(spec: DataSpec, seq_len: int) -> int:
    """Rows packed at a length: a window, or what some million tokens fill."""
    return min(spec.window_rows, max(1, _TOKENS // seq_len))


def _first_documents(plan: Plan, tokens: int) -> list[PlanSource]:
    """The sources cut down to the documents that this many tokens begin with, with the weights of the first step."""
    weights = plan.mixture.weights(0.0)
    total = sum(weights)
    by_tokens = plan.mixture.unit.value == "tokens"
    mean = sum(weight * stream.mean for weight, stream in zip(weights, plan.streams, strict=True)) / total
    few = []
    for source, stream, weight in zip(plan.sources, plan.streams, weights, strict=True):
        if weight <= 0:
            continue
        # In the other units a source may be all there is of the tokens; samples are counted by the mean of the mixture.
        expected = weight / total * tokens / (stream.mean if by_tokens else min(mean, stream.mean))
        documents = stream.read(0, min(stream.size, int(expected * 1.1) + 64)).document
        few.append(
            replace(
                source,
                weight=weight,
                schedule=(),
                max_epochs=0.0,
                on_exhausted=Exhausted.reweight,
                lengths=np.asarray(stream.table.length)[documents],
                num_images=np.asarray(stream.table.num_images)[documents],
                left_out=None,
                masks={},
                captions=Captions.all,
                caption_number=None,
                uids=None,
            )
        )
    return few


def _look(spec: DataSpec, sources: Sequence[PlanSource], asked: int) -> SeqLenRow:
    """Packs one window at a length."""
    num_rows = _num_rows(spec, spec.seq_len)
    plan = compile_plan(replace(spec, window_rows=num_rows, temperature=0.0), sources, global_batch_size=num_rows)
    window = plan.window(0)
    padding = 1.0 - float(window.length.sum()) / (num_rows * spec.seq_len)
    return SeqLenRow(
        seq_len=spec.seq_len,
        padding_fraction=padding,
        documents_per_row=len(window.length) / num_rows,
        images_per_row=float(window.num_images.mean()),
        cost=100.0 * padding + POINTS_PER_LENGTH * abs(spec.seq_len / asked - 1.0),
    )
