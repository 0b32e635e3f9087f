"""Line charts as inline SVG: axes with round numbers, one colour a series, a legend. No drawing library."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from janus_mega.report.page import EMPTY, Markup, show_number

WIDTH, HEIGHT = 460, 260
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 28, 34
COLOURS = ("#1f6feb", "#d2621f", "#1b7f4b", "#8a3ffc", "#b3261e", "#5c6773")


@dataclass(frozen=True, slots=True)
class Series:
    """One line: points (x, y) in order of x."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Axis:
    """A linear scale from data to pixels with a handful of round ticks."""

    low: float
    high: float
    start: float
    end: float

    def place(self, value: float) -> float:
        """Pixel of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values within the axis."""
        step = round_step((self.high - self.low) / 4)
        first = math.ceil(self.low / step - 1e-9)
        return [number * step for number in range(first, math.floor(self.high / step + 1e-9) + 1)]


def round_step(rough: float) -> float:
    """The 1, 2 or 5 times a power of ten that is nearest above `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))


def line_chart(title: str, series: Sequence[Series], x_label: str = "step") -> Markup:
    """A chart of all finite points; series without any are left out, and no points at all give nothing."""
    lines = [Series(s.name, [(x, y) for x, y in s.points if math.isfinite(y)]) for s in series]
    lines = [line for line in lines if line.points]
    if not lines:
        return EMPTY
    x_axis = _axis([x for line in lines for x, _ in line.points], LEFT, WIDTH - RIGHT)
    y_axis = _axis([y for line in lines for _, y in line.points], HEIGHT - BOTTOM, TOP)
    parts = [_text(LEFT, 16, title, "start", "bold"), *_grid(x_axis, y_axis)]
    parts.append(_text(WIDTH - RIGHT, HEIGHT - 4, x_label, "end"))
    for number, line in enumerate(lines):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(f"{x_axis.place(x):.1f},{y_axis.place(y):.1f}" for x, y in line.points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        if len(line.points) == 1:
            x, y = line.points[0]
            parts.append(f'<circle cx="{x_axis.place(x):.1f}" cy="{y_axis.place(y):.1f}" r="3" fill="{colour}"/>')
        parts.append(_text(WIDTH - RIGHT, TOP + 14 * (number + 1), line.name, "end", fill=colour))
    body = "".join(parts)
    return Markup(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="system-ui, sans-serif" font-size="11">{body}</svg>'
    )


def _axis(values: Sequence[float], start: float, end: float) -> Axis:
    """An axis that holds all values, also when they are equal."""
    low, high = min(values), max(values)
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):
        pad = abs(low) * 0.5 or 1.0
        low, high = low - pad, high + pad
    return Axis(low, high, start, end)


def _grid(x_axis: Axis, y_axis: Axis) -> list[str]:
    """Grid lines and tick labels."""
    parts = []
    for value in y_axis.ticks():
        y = y_axis.place(value)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#d9dee4"/>')
        parts.append(_text(LEFT - 6, y + 4, show_number(value), "end"))
    for value in x_axis.ticks():
        parts.append(_text(x_axis.place(value), HEIGHT - BOTTOM + 16, show_number(value), "middle"))
    return parts


def _text(x: float, y: float, value: str, anchor: str, weight: str = "normal", fill: str = "#1d2530") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}" fill="{fill}">'
        f"{escape(value)}</text>"
    )
