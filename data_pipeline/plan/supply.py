"""What a plan will need over a whole stage, without compiling it: epochs of each source, and when one runs out.

Shares times rows gives what each source is owed at any step; lengths of documents are taken at their mean, rows as full
as the caller says. Between two events (a weight changes, a source is exhausted) everything grows evenly, so a stage of
180,000 steps costs as much as there are events. Documents are whole and rows have gaps in truth, so a step found here
may be off by a window; `check_supply` counts rows as full and thereby errs to the safe side.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from data_pipeline.errors import UserError
from data_pipeline.plan.plan import Plan
from data_pipeline.plan.schedule import WHOLE
from data_pipeline.plan.window import Cursor
from data_pipeline.spec import Exhausted, RatioUnit, ScheduleUnit

_PIECES_OF_RAMP = 512
"""Pieces in which a stage with gradually changing weights is gone through, at least."""
EPOCHS_LISTED = 16
"""Ends of epochs that are remembered per source."""


@dataclass(slots=True)
class Projection:
    """Where a plan will be; sources are in the order of `plan.sources`."""

    windows: float
    """Windows gone through."""
    tokens: list[float]
    documents: list[float]
    epoch_ends: list[list[int]] = field(default_factory=list)
    """Steps in which each source has been gone through once more, the first few."""
    exhausted_at: dict[int, int] = field(default_factory=dict)
    """Step in which a source, by number, has given all that max_epochs allows."""
    changes: list[tuple[int, int, float]] = field(default_factory=list)
    """(step, source, weight): points of schedules that were reached."""
    ends_at: int | None = None
    """The first step that does not exist; None if all that were asked for do."""


def project(
    plan: Plan, num_steps: int, row_tokens: Sequence[float], *, start: Cursor | None = None, lasting: bool = False
) -> Projection:
    """Goes on from a cursor (the beginning, unless said) to the end of a stage.

    Args:
        plan: The plan.
        num_steps: Steps of the stage.
        row_tokens: Tokens that a row holds; one entry per source, which differ only where shares count rows.
        start: Where to begin.
        lasting: Go on with sources that must not run out when they do, to learn what they would need.
    """
    return _Projector(plan, row_tokens, start, lasting).run(math.ceil(num_steps / plan.steps_per_window))


class _Projector:
    """The state of `project`."""

    def __init__(self, plan: Plan, row_tokens: Sequence[float], start: Cursor | None, lasting: bool) -> None:
        count = len(plan.sources)
        ledger = start.ledger if start else None
        self._plan = plan
        self._row_tokens = row_tokens
        self._lasting = lasting
        self._supply = [_supply(plan, k) for k in range(count)]
        self._now = Projection(
            float(start.window_no if start else 0),
            [float(tokens) for tokens in ledger.tokens] if ledger else [0.0] * count,
            [float(documents) for documents in ledger.documents] if ledger else [0.0] * count,
            [[] for _ in range(count)],
        )
        self._out = {
            k for k, supply in enumerate(self._supply) if supply is not None and self._now.documents[k] >= supply
        }

    def run(self, num_windows: int) -> Projection:
        """Goes from event to event."""
        now, curves = self._now, self._plan.mixture.curves
        while now.windows < num_windows and now.ends_at is None:
            time = self._time()
            ahead = num_windows - now.windows
            is_moving = any(curve.is_changing(time) for curve in curves)
            if is_moving:
                ahead = min(ahead, max(1.0, num_windows / _PIECES_OF_RAMP))
            rates = self._rates(time)
            if is_moving:  # the mean of the windows' first steps
                rates = self._rates(time + max(0.0, ahead - 1) * self._time_per_window(rates) / 2)
            if not rates:
                now.ends_at = self._step(now.windows)
                break
            waits = [wait for curve in curves for point in curve.points if (wait := self._wait(point.at, rates)) > 0]
            ahead = min([ahead, *waits])
            ends = {k: wait for k, wait in self._waits_for_end(rates).items() if wait <= ahead}
            ahead = min([ahead, *ends.values()])
            self._advance(ahead, rates)
            self._note_points(time)
            self._exhaust([k for k, wait in ends.items() if wait <= ahead])
        return now

    def _step(self, windows: float) -> int:
        return math.floor(windows + 1e-9) * self._plan.steps_per_window

    def _time(self) -> float:
        """What weights depend on."""
        if self._plan.mixture.schedule_unit is ScheduleUnit.token:
            return sum(self._now.tokens) + 0.5  # half a token covers what adding up fractions lost
        return math.floor(self._now.windows + 1e-9) * self._plan.steps_per_window

    def _time_per_window(self, rates: Sequence[tuple[float, float]]) -> float:
        if self._plan.mixture.schedule_unit is ScheduleUnit.token:
            return sum(tokens for _, tokens in rates)
        return self._plan.steps_per_window

    def _wait(self, at: float, rates: Sequence[tuple[float, float]]) -> float:
        """Windows until a point holds, from a window's first step on; not positive if it does."""
        windows, missing = self._now.windows, at - self._time()
        if missing <= 0:
            return 0.0
        if self._plan.mixture.schedule_unit is ScheduleUnit.step:
            return math.ceil(at / self._plan.steps_per_window) - windows
        return math.ceil(windows + missing / self._time_per_window(rates) - 1e-9) - windows

    def _rates(self, time: float) -> list[tuple[float, float]]:
        """Documents and tokens of each source in a window; nothing if no source is left."""
        plan = self._plan
        shares = [
            share / WHOLE for share in plan.mixture.shares(time, [k not in self._out for k in range(len(plan.sources))])
        ]
        if not any(shares):
            return []
        means = [stream.mean for stream in plan.streams]
        if plan.mixture.unit is RatioUnit.samples:
            mean = sum(share * mean for share, mean in zip(shares, means, strict=True))
            total = plan.window_rows * self._row_tokens[0] / mean
            return [(share * total, share * total * mean) for share, mean in zip(shares, means, strict=True)]
        tokens = [plan.window_rows * share * held for share, held in zip(shares, self._row_tokens, strict=True)]
        return [(given / mean, given) for given, mean in zip(tokens, means, strict=True)]

    def _waits_for_end(self, rates: Sequence[tuple[float, float]]) -> dict[int, float]:
        """Windows until each source that has a limit reaches it."""
        return {
            k: (supply - self._now.documents[k]) / documents
            for k, (supply, (documents, _)) in enumerate(zip(self._supply, rates, strict=True))
            if supply is not None and documents > 0 and k not in self._out and k not in self._now.exhausted_at
        }

    def _advance(self, windows: float, rates: Sequence[tuple[float, float]]) -> None:
        now, plan = self._now, self._plan
        for k, (documents, tokens) in enumerate(rates):
            size, listed = plan.streams[k].size, now.epoch_ends[k]
            after = now.documents[k] + documents * windows
            epoch = math.floor(now.documents[k] / size + 1e-9) + 1
            while documents > 0 and epoch * size <= after + 1e-6 and len(listed) < EPOCHS_LISTED:
                at = now.windows + max(0.0, epoch * size - now.documents[k]) / documents
                listed.append(math.ceil(at * plan.steps_per_window - 1e-9) - 1)
                epoch += 1
            now.documents[k] = after
            now.tokens[k] += tokens * windows
        now.windows += windows

    def _note_points(self, before: float) -> None:
        """Remembers the points that hold from here on and did not before."""
        time = self._time()
        for k, curve in enumerate(self._plan.mixture.curves):
            for point in curve.points:
                if before < point.at <= time:
                    self._now.changes.append((self._step(self._now.windows), k, point.weight))

    def _exhaust(self, ended: Sequence[int]) -> None:
        """What the end of sources does to the plan."""
        for k in ended:
            self._now.exhausted_at[k] = self._step(self._now.windows)
            ends_plan = not self._plan.mixture.leaves[k]
            if not ends_plan:
                self._out.add(k)
            elif not (self._lasting and self._plan.sources[k].on_exhausted is Exhausted.error):
                self._now.ends_at = self._step(self._now.windows)


def _supply(plan: Plan, number: int) -> float | None:
    """Documents that a source may give; where shares count tokens, documents of mean length with the same tokens."""
    limit, stream = plan.mixture.limits[number], plan.streams[number]
    if limit is None:
        return None
    epochs, rest = divmod(limit, stream.size)
    if plan.mixture.unit is RatioUnit.samples or not rest:
        return float(limit)
    return epochs * stream.size + float(stream.read(epochs * stream.size, rest).length.sum()) / stream.mean


def check_supply(plan: Plan, num_steps: int) -> Projection:
    """Refuses a run whose sources cannot fill their shares under their max_epochs; call it before training.

    Rows are counted as full, so what passes lasts: a run that is refused for less than its padding may be given
    on_exhausted=reweight instead, which then hardly ever acts.

    Args:
        plan: The plan.
        num_steps: Steps of the run.

    Returns:
        What the run will need at most; its `ends_at` tells if a source with on_exhausted=stop ends it.

    Raises:
        UserError: Naming every source that is too small, what it has and what it would need.
    """
    found = project(plan, num_steps, [float(plan.seq_len)] * len(plan.sources), lasting=True)
    last_step = num_steps if found.ends_at is None else min(num_steps, found.ends_at)
    lines = []
    for number, step in sorted(found.exhausted_at.items(), key=lambda entry: entry[1]):
        source, stream, supply = plan.sources[number], plan.streams[number], plan.mixture.limits[number]
        if source.on_exhausted is not Exhausted.error or supply is None:
            continue
        needed, lasting = found.documents[number], _supply(plan, number)
        if lasting is not None and needed - lasting <= 1:
            continue  # the last document but for rounding
        lines.append(
            f"{source.where()}: max_epochs={source.max_epochs:g} allows {supply:,} documents of {stream.size:,}, but "
            f"its share of the {plan.mixture.unit.value} over {last_step:,} steps needs up to {math.ceil(needed):,} "
            f"({needed / stream.size:.2f} epochs); it lasts for about {step:,} steps"
        )
    if lines:
        raise UserError(
            f"{'; '.join(lines)}; raise max_epochs, lower the weight, train fewer steps, or set on_exhausted to "
            "reweight or stop"
        )
    return found
