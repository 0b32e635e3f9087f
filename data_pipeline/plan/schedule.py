"""Weights over time, and what they come to: shares that are whole numbers of trillionths.

A weight is a function of one number, the steps or tokens trained before; nothing else is remembered, so a schedule is
as pure as a constant. Shares are integers because sums of them over a whole run must be exact: 5 : 3 : 2 is 0.5, 0.3
and 0.2 without a last bit to lose, and a share rounded to a trillionth is off by one token in a trillion. The
arithmetic is that of IEEE and of `decimal` alone: a C library's `cos` or `pow` may differ in its last bit elsewhere.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, localcontext
from fractions import Fraction

from data_pipeline.spec import Shape, WeightPoint

WHOLE = 10**12
"""All of the mixture: shares sum to it, and debts are counted in the WHOLE-th part of a token, sample or row."""


@dataclass(frozen=True, slots=True)
class WeightCurve:
    """The weight of one source as a function of time."""

    first: float
    """Before the first point."""
    points: tuple[WeightPoint, ...] = ()
    """Ascending by `at`; a point reached gradually is approached from the moment of the one before, or from 0."""

    def at(self, time: float) -> float:
        """The weight once `time` steps or tokens are trained."""
        since, weight = 0.0, self.first
        for point in self.points:
            if time < point.at:
                if point.shape is Shape.step:
                    return weight
                part = _part(point.shape, (time - since) / (point.at - since))
                return weight + (point.weight - weight) * part
            since, weight = point.at, point.weight
        return weight

    @property
    def is_used(self) -> bool:
        """Whether the source ever has weight."""
        return self.first > 0 or any(point.weight > 0 for point in self.points)

    def is_changing(self, time: float) -> bool:
        """Whether the weight is on its way from one point to the next."""
        return any(time < point.at for point in self.points[:1] if point.shape is not Shape.step) or any(
            before.at <= time < point.at and point.shape is not Shape.step
            for before, point in zip(self.points, self.points[1:], strict=False)
        )


def _part(shape: Shape, time: float) -> float:
    """How much of the way from one weight to the next is done at `time` in [0, 1]."""
    if shape is Shape.linear:
        return time
    # (1 - cos(pi t)) / 2 = sin(pi t / 2)^2, the sine by its series: exact to 1e-15 up to pi / 2.
    angle = time * (math.pi / 2)
    term = sine = angle
    for order in range(2, 24, 2):
        term *= -angle * angle / (order * (order + 1))
        sine += term
    return sine * sine


def size_factors(sizes: Sequence[float], temperature: float) -> tuple[float, ...]:
    """What temperature multiplies weights with: size^(1/T), relative to the largest; 1 for each at temperature 0."""
    if temperature == 0:
        return (1.0,) * len(sizes)
    with localcontext() as context:
        context.prec = 30
        power = 1 / Decimal(temperature)
        powers = [Decimal(size) ** power for size in sizes]
        largest = max(powers)
        return tuple(float(value / largest) for value in powers)


def shares_of(weights: Sequence[float]) -> tuple[int, ...]:
    """Whole numbers in proportion to weights that sum to WHOLE; the largest remainders are rounded up."""
    exact = [Fraction(weight) for weight in weights]
    total = sum(exact)
    if not total:
        return (0,) * len(weights)
    scaled = [weight * WHOLE / total for weight in exact]
    shares = [math.floor(value) for value in scaled]
    by_remainder = sorted(range(len(shares)), key=lambda k: (shares[k] - scaled[k], k))
    for k in by_remainder[: WHOLE - sum(shares)]:
        shares[k] += 1
    return tuple(shares)


def apportion(owed: Sequence[int], total: int) -> list[int]:
    """Whole numbers >= 0 that sum to `total`, as near as possible to what is owed (in 1/WHOLE)."""
    counts = [max(0, amount // WHOLE) for amount in owed]
    while (missing := total - sum(counts)) != 0:
        rest = [amount - count * WHOLE for amount, count in zip(owed, counts, strict=True)]
        if missing > 0:
            order = sorted(range(len(owed)), key=lambda k: (-rest[k], k))
        else:
            order = sorted((k for k in range(len(owed)) if counts[k]), key=lambda k: (rest[k], k))
        for k in order[: abs(missing)]:
            counts[k] += 1 if missing > 0 else -1
    return counts
