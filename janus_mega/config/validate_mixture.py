"""Rules of the mixture: weights and their schedules, caps, masks, and what else the data plan is told."""

import math
from collections.abc import Iterator

from data_pipeline.plan.schedule import WeightCurve
from data_pipeline.spec import Captions, DataSpec, SourceSpec, Task


def curve_of(source: SourceSpec) -> WeightCurve:
    """The weight of a source over time."""
    return WeightCurve(source.weight, tuple(source.schedule))


def mixture_rules(data: DataSpec) -> Iterator[str]:
    """Sources, their weights over time, and ranges of the plan's numbers."""
    if not data.sources:
        yield "data.sources is empty; give at least one source as data.sources.NAME.path=..."
    weights_are_shares = True
    for name, source in data.sources.items():
        problems = list(_weight_rules(f"data.sources.{name}", source))
        weights_are_shares &= not problems
        yield from problems
        yield from _source_rules(f"data.sources.{name}", source)
    if data.sources and weights_are_shares:
        yield from _some_weight(data)
    if not 0 <= data.temperature < math.inf:
        yield f"data.temperature {data.temperature} must be 0 (weights are shares) or a positive finite number"
    if not 0 <= data.guidance_dropout < 1:
        yield f"data.guidance_dropout {data.guidance_dropout} must lie in [0, 1)"
    for knob in ("num_workers", "max_broken_samples"):
        if getattr(data, knob) < 0:
            yield f"data.{knob} {getattr(data, knob)} must be 0 or more"
    if data.window_rows < 1:
        yield f"data.window_rows {data.window_rows} must be at least 1"


def _weight_rules(key: str, source: SourceSpec) -> Iterator[str]:
    """Weights are shares, and their points lie in the order of time."""
    if not 0 <= source.weight < math.inf:
        yield f"{key}.weight {source.weight} must be a finite number of 0 or more (0 leaves it out)"
    before = 0.0
    for number, point in enumerate(source.schedule):
        if not 0 <= point.weight < math.inf:
            yield f"{key}.schedule[{number}].weight {point.weight} must be a finite number of 0 or more"
        if not before < point.at < math.inf:
            after = f"after the point before it, {before:g}" if number else "above 0; what holds at first is the weight"
            yield f"{key}.schedule[{number}].at {point.at:g} must be {after}"
        before = max(before, point.at)


def _source_rules(key: str, source: SourceSpec) -> Iterator[str]:
    """Caps, masks and captions."""
    if not 0 <= source.max_epochs < math.inf:
        yield f"{key}.max_epochs {source.max_epochs} must be 0 (no limit) or a positive finite number"
    repeated = sorted({mask for mask in source.masks if source.masks.count(mask) > 1})
    if repeated:
        yield f"{key}.masks names {', '.join(repeated)} more than once; name each mask once"
    if source.captions is Captions.one and source.task is not Task.generation:
        yield (
            f"{key}.captions is one, but its task is {source.task.value}: only pictures to draw have captions to "
            "choose from; set captions to all, or task to generation"
        )


def _some_weight(data: DataSpec) -> Iterator[str]:
    """At every moment some source has weight; a weight becomes 0 at a point, so looking at those suffices."""
    curves = [curve_of(source) for source in data.sources.values()]
    if not any(curve.is_used for curve in curves):
        yield "data.sources: every weight is 0, so there is nothing to draw from; give one source a weight above 0"
        return
    for moment in sorted({0.0, *(point.at for curve in curves for point in curve.points)}):
        if not any(curve.at(moment) for curve in curves):
            yield (
                f"data.sources: every weight is 0 from {data.schedule_unit.value} {moment:g} on; give one source a "
                "weight above 0 there"
            )
            return
