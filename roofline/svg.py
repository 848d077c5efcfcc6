"""Charts as self-contained SVG, in colours that read on light and on dark. Stdlib only."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from roofline.phases import Phase

COLOURS: Mapping[Phase, str] = {
    Phase.PREFILL: "#d98c2b",
    Phase.DECODE: "#c9582a",
    Phase.REWARD: "#8a63c9",
    Phase.SCORE: "#4aa3b8",
    Phase.REFERENCE: "#6f8fb5",
    Phase.TRAIN: "#2f7ed8",
    Phase.OPTIMIZER: "#3f9b57",
    Phase.PUBLISH: "#b5a03a",
    Phase.EVAL: "#b8578f",
    Phase.CHECKPOINT: "#8c7b6b",
    Phase.COMPILE: "#5b6470",
    Phase.COMPILE: "#7a5c9e",
    Phase.WAIT_BATCH: "#9a9a9a",
    Phase.WAIT_LEARNER: "#9a9a9a",
}
"""One colour per phase, in every chart."""

WIDTH = 880
LEFT, RIGHT, TOP, BOTTOM = 92, 18, 16, 44
TEXT_PX = 12
GRID = 'class="grid"'


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One phase of the roofline chart."""

    label: str
    colour: str
    intensity: float
    """Flops per byte."""
    predicted_flops_per_s: float
    measured_flops_per_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """One span of the Gantt chart."""

    lane: str
    label: str
    colour: str
    start_s: float
    end_s: float
    idle: bool = False


def si(value: float, unit: str = "") -> str:
    """Three significant digits with a prefix: 1.23 G, 45.6 m."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g} {unit}".strip()
    power = max(-4, min(5, math.floor(math.log10(abs(value)) / 3)))
    prefix = {-4: "p", -3: "n", -2: "u", -1: "m", 0: "", 1: "k", 2: "M", 3: "G", 4: "T", 5: "P"}[
        power
    ]
    return f"{value / 10 ** (3 * power):.3g} {prefix}{unit}".strip()


def roofline(points: Sequence[Point], flops_per_s: float, bytes_per_s: float) -> str:
    """Log-log: roofs as lines, each phase hollow where predicted and filled where measured."""
    height = 420
    ridge = flops_per_s / bytes_per_s
    xs = [p.intensity for p in points] + [ridge]
    ys = [y for p in points for y in (p.predicted_flops_per_s, p.measured_flops_per_s)]
    x = _log_scale(min(xs) / 4, max(xs) * 4, LEFT, WIDTH - RIGHT)
    y = _log_scale(min([*ys, flops_per_s]) / 2.5, flops_per_s * 2.5, height - BOTTOM, TOP)
    body = _log_axes(x, y, height, "arithmetic intensity [flop/byte]", "[flop/s]")
    low, high = min(xs) / 4, max(xs) * 4
    roof = [(low, low * bytes_per_s), (ridge, flops_per_s), (high, flops_per_s)]
    floor_y = y.low
    if roof[0][1] < floor_y:
        roof[0] = (floor_y / bytes_per_s, floor_y)
    path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in roof)
    body.append(f'<polyline points="{path}" class="roof"/>')
    body.append(_text(x(high) - 4, y(flops_per_s) - 6, f"peak {si(flops_per_s, 'flop/s')}", "end"))
    slope = f"memory {si(bytes_per_s, 'B/s')}, ridge at {ridge:.3g} flop/byte"
    body.append(_text(x(ridge) - 8, y(flops_per_s) - 6, slope, "end"))
    for point in points:
        at, colour = x(point.intensity), point.colour
        up, down = y(point.predicted_flops_per_s), y(point.measured_flops_per_s)
        predicted, measured = (
            si(rate, "flop/s") for rate in (point.predicted_flops_per_s, point.measured_flops_per_s)
        )
        tip = (
            f"{point.label}: {point.intensity:.3g} flop/byte, predicted {predicted}, "
            f"measured {measured}"
        )
        joined = _line(at, up, at, down, f'stroke="{colour}"')
        body.append(_titled(tip, joined, _ring(at, up, colour), _disc(at, down, colour)))
    body += _spread_labels(
        [(x(p.intensity) + 10, y(p.measured_flops_per_s) + 4, p.label) for p in points]
    )
    return _svg(height, body, "Roofline: predicted and measured rate of each phase")


def dumbbells(rows: Sequence[tuple[str, str, float, float, float]]) -> str:
    """Log time axis; per row (label, colour, lower, expected, measured) tick, ring and disc."""
    height = TOP + BOTTOM + 26 * len(rows)
    values = [value for row in rows for value in row[2:] if value > 0]
    x = _log_scale(min(values) / 1.6, max(values) * 1.6, LEFT, WIDTH - RIGHT)
    body = _log_ticks_x(x, height, "seconds per call")
    for index, (label, colour, lower, expected, measured) in enumerate(rows):
        y = TOP + 26 * index + 16
        marks = {"bound": lower, "expected": expected, "measured": measured}
        ends = [value for value in marks.values() if value > 0]
        tip = f"{label}: " + ", ".join(f"{name} {si(v, 's')}" for name, v in marks.items() if v > 0)
        parts = [_line(x(min(ends)), y, x(max(ends)), y, f'stroke="{colour}" opacity=".5"')]
        if lower > 0:
            thick = f'stroke="{colour}" stroke-width="2"'
            parts.append(_line(x(lower), y - 7, x(lower), y + 7, thick))
        if expected > 0:
            parts.append(_ring(x(expected), y, colour))
        parts.append(_disc(x(measured), y, colour))
        body += [_text(LEFT - 8, y + 4, label, "end"), _titled(tip, *parts)]
    return _svg(height, body, "Bound, expected and measured time of a call")


def gantt(bars: Sequence[Bar], lanes: Sequence[str]) -> str:
    """Time in seconds to the right, one row per lane."""
    row, gap = 34, 10
    height = TOP + BOTTOM + len(lanes) * (row + gap)
    start, end = min(b.start_s for b in bars), max(b.end_s for b in bars)
    width = WIDTH - LEFT - RIGHT

    def x(time_s: float) -> float:
        return LEFT + (time_s - start) / max(end - start, 1e-12) * width

    body = []
    for tick in _ticks(0.0, end - start):
        at = x(start + tick)
        body.append(_line(at, TOP, at, height - BOTTOM, GRID))
        body.append(_text(at, height - BOTTOM + 18, f"{tick:g}", "middle"))
    body.append(
        _text(WIDTH - RIGHT, height - 8, f"seconds, from {start:.4g} s into the run", "end")
    )
    for lane in lanes:
        body.append(
            _text(LEFT - 8, TOP + lanes.index(lane) * (row + gap) + row / 2 + 4, lane, "end")
        )
    for bar in bars:
        top = TOP + lanes.index(bar.lane) * (row + gap)
        tip = f"{bar.label}: {si(bar.end_s - bar.start_s, 's')}"
        size = max(0.5, x(bar.end_s) - x(bar.start_s))
        look = 'fill="none" stroke-dasharray="3 3" stroke' if bar.idle else "fill"
        body.append(
            f'<rect x="{x(bar.start_s):.2f}" y="{top}" width="{size:.2f}" height="{row}" '
            f'{look}="{bar.colour}"><title>{escape(tip)}</title></rect>'
        )
    return _svg(height, body, "What each lane did")


def columns(values: Mapping[str, float], x_label: str, y_label: str) -> str:
    """Upright bars with their values."""
    height, largest = 240, max([*values.values(), 1e-12])
    slot = (WIDTH - LEFT - RIGHT) / max(len(values), 1)
    total = sum(values.values())
    body = [
        _text(LEFT - 8, TOP + 8, y_label, "end"),
        _text(WIDTH - RIGHT, height - 6, x_label, "end"),
    ]
    for index, (name, value) in enumerate(values.items()):
        size = value / largest * (height - TOP - BOTTOM - 16)
        left, top = LEFT + index * slot, height - BOTTOM - size
        wide = min(slot * 0.8, 90)
        body.append(
            f'<rect x="{left + (slot - wide) / 2:.1f}" y="{top:.1f}" width="{wide:.1f}" '
            f'height="{size:.1f}" class="column"/>'
        )
        share = f"{value:g} ({value / total:.0%})" if total else "0"
        body.append(_text(left + slot / 2, top - 5, share, "middle"))
        body.append(_text(left + slot / 2, height - BOTTOM + 16, name, "middle"))
    return _svg(height, body, f"{y_label} by {x_label}")


def curves(series: Mapping[str, Sequence[tuple[float, float]]], x_label: str) -> str:
    """Lines over a common linear axis; the legend carries the last value."""
    height = 260
    points = [point for line in series.values() for point in line]
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    low, high = min([*ys, 0.0]), max(ys)
    high = high if high > low else low + 1
    x_low, x_high = min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1

    def x(value: float) -> float:
        return LEFT + (value - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return height - BOTTOM - (value - low) / (high - low) * (height - TOP - BOTTOM)

    body = []
    for tick in _ticks(low, high):
        body.append(_line(LEFT, y(tick), WIDTH - RIGHT, y(tick), GRID))
        body.append(_text(LEFT - 8, y(tick) + 4, f"{tick:g}", "end"))
    for tick in _ticks(x_low, x_high):
        body.append(_text(x(tick), height - BOTTOM + 16, f"{tick:g}", "middle"))
    body.append(_text(WIDTH - RIGHT, height - 6, x_label, "end"))
    palette = list(dict.fromkeys(COLOURS.values()))
    for index, (name, line) in enumerate(series.items()):
        colour = palette[(index * 5 + 5) % len(palette)]
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in line)
        body.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        body.append(
            _text(
                LEFT + 8,
                TOP + 12 + 16 * index,
                f"{name}: {line[-1][1]:.3g} at the end",
                "start",
                colour,
            )
        )
    return _svg(height, body, ", ".join(series))


def legend(phases: Sequence[Phase]) -> str:
    """Colour keys, as HTML."""
    return "".join(
        f'<span class="key"><i style="background:{COLOURS[p]}"></i>{p}</span>' for p in phases
    )


@dataclass(frozen=True, slots=True)
class _Scale:
    low: float
    high: float
    place: Callable[[float], float]

    def __call__(self, value: float) -> float:
        return self.place(min(max(value, self.low), self.high))


def _log_scale(low: float, high: float, start: float, end: float) -> _Scale:
    span = math.log(high / low)
    return _Scale(low, high, lambda value: start + math.log(value / low) / span * (end - start))


def _powers(low: float, high: float) -> list[float]:
    first, last = math.ceil(math.log10(low)), math.floor(math.log10(high))
    step = max(1, math.ceil((last - first + 1) / 10))
    return [10.0**power for power in range(first, last + 1, step)]


def _log_ticks_x(x: _Scale, height: float, label: str) -> list[str]:
    body = []
    for value in _powers(x.low, x.high):
        at = x(value)
        body.append(_line(at, TOP, at, height - BOTTOM, GRID))
        body.append(_text(at, height - BOTTOM + 18, si(value), "middle"))
    body.append(_text(WIDTH - RIGHT, height - 8, label, "end"))
    return body


def _log_axes(x: _Scale, y: _Scale, height: float, x_label: str, y_label: str) -> list[str]:
    body = _log_ticks_x(x, height, x_label)
    for value in _powers(y.low, y.high):
        at = y(value)
        body.append(_line(LEFT, at, WIDTH - RIGHT, at, GRID))
        body.append(_text(LEFT - 8, at + 4, si(value), "end"))
    body.append(_text(LEFT - 8, TOP + 4, y_label, "end"))
    return body


def _spread_labels(labels: Sequence[tuple[float, float, str]]) -> list[str]:
    """Labels moved down until none covers another."""
    placed: list[tuple[float, float]] = []
    body = []
    for x, y, text in sorted(labels, key=lambda item: (item[1], item[0])):
        while any(abs(x - a) < 90 and abs(y - b) < TEXT_PX + 2 for a, b in placed):
            y += TEXT_PX + 2
        placed.append((x, y))
        body.append(_text(x, y, text, "start"))
    return body


def _ticks(low: float, high: float) -> list[float]:
    """Five to ten round values in [low, high]."""
    rough = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough)
    first = math.ceil(low / step - 1e-9)
    return [
        round((first + i) * step, 12) for i in range(int((high - first * step) / step + 1e-9) + 1)
    ]


def _line(x1: float, y1: float, x2: float, y2: float, look: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {look}/>'


def _ring(x: float, y: float, colour: str) -> str:
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6" fill="none" stroke="{colour}" stroke-width="2"/>'
    )


def _disc(x: float, y: float, colour: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}"/>'


def _titled(title: str, *parts: str) -> str:
    return f"<g><title>{escape(title)}</title>{''.join(parts)}</g>"


def _text(x: float, y: float, text: str, anchor: str, colour: str = "") -> str:
    paint = f' style="fill:{colour}"' if colour else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{paint}>{escape(text)}</text>'


def _svg(height: float, body: Sequence[str], title: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(body)}</svg>'
    )
