"""The charts of the report, as SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from roofline.analyse import PhaseRow
from roofline.report.account import TERMS, Validation, Waterfall
from roofline.report.outlook import SplitCurve
from roofline.svg import (
    BOTTOM,
    COLOURS,
    GRID,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Scale,
    box,
    disc,
    drawing,
    labels,
    line,
    linear_axes,
    linear_scale,
    log_scale,
    log_ticks_x,
    polyline,
    powers,
    ring,
    si,
    text,
    ticks,
    titled,
)

TERM_COLOURS: Mapping[str, str] = {
    "ideal": "#3f9b57",
    "efficiency": "#2f7ed8",
    "launch": "#8a63c9",
    "host": "#c98ac0",
    "communication": "#b5a03a",
    "sharing": "#4aa3b8",
    "unexplained": "#c9582a",
    "unpredicted": "#b8578f",
    "waiting": "#9a9a9a",
    "between": "#8c7b6b",
    "measured": "#6b7480",
}
GENERATORS, LEARNER, TOGETHER, PRESENT = "#c9582a", "#2f7ed8", "#3f9b57", "#d98c2b"
FACTOR = 2.0
"""Dashed lines of the scatter: predictions off by so much."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """One span of the Gantt chart."""

    label: str
    colour: str
    start_s: float
    end_s: float
    row: int = 0
    """Within the lane, where spans overlap."""
    idle: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class GanttLane:
    """One lane: bars, or where too many overlap how many run at once."""

    name: str
    bars: Sequence[Bar] = ()
    rows: int = 1
    """Bars on top of each other; with `level`, its largest value."""
    level: Sequence[tuple[float, int]] = ()
    """(time, spans under way from then on)."""
    colour: str = ""


def roofline(
    rows: Sequence[PhaseRow], flops_per_s: float, bytes_per_s: float, reached: tuple[float, float]
) -> str:
    """Log-log: roofs as lines, dashed where programs reach but a share of the peaks (`reached`, of flops
    and of bytes); each phase hollow where predicted and filled where measured, the larger the more of a
    step it takes."""
    height, ridge = 420, flops_per_s / bytes_per_s
    points = [
        (row, row.intensity, row.cost.flops / row.shared_s, row.cost.flops / row.median_s)
        for row in rows
        if row.intensity and row.cost and row.shared_s and row.median_s > 0
    ]
    rates = [rate for _, _, *both in points for rate in both]
    low, high = min(ridge, *(p[1] for p in points)) / 6, max(ridge, *(p[1] for p in points)) * 6
    x = log_scale(low, high, LEFT, WIDTH - RIGHT)
    y = log_scale(min([*rates, flops_per_s]) / 3, flops_per_s * 2, height - BOTTOM, TOP)
    body = log_ticks_x(x, height, "arithmetic intensity [flop/byte]")
    for value in powers(y.low, y.high):
        body.append(line(LEFT, y(value), WIDTH - RIGHT, y(value), GRID))
        body.append(text(LEFT - 8, y(value) + 4, si(value, "flop/s"), "end"))
    start = max(low, y.low / bytes_per_s)
    roof = [(start, start * bytes_per_s), (ridge, flops_per_s), (high, flops_per_s)]
    body.append(polyline([(x(a), y(b)) for a, b in roof], 'class="roof"'))
    flat, slant = flops_per_s * reached[0], bytes_per_s * reached[1]
    below = [(max(low, y.low / slant), max(low * slant, y.low)), (flat / slant, flat), (high, flat)]
    if min(reached) < 0.98:
        body.append(
            polyline([(x(a), y(b)) for a, b in below], 'class="roof" stroke-dasharray="5 5"')
        )
    top = y(flops_per_s) - 8
    body.append(text(x(high) - 4, top, f"peak {si(flops_per_s, 'flop/s')}", "end"))
    slope = f"memory {si(bytes_per_s, 'B/s')}, ridge at {ridge:.3g} flop/byte"
    body.append(text(x(ridge) - 12, top, slope, "end"))
    for row, intensity, predicted, measured in points:
        colour, at = COLOURS[row.phase], x(intensity)
        tip = (
            f"{row.phase}: {intensity:.3g} flop/byte, predicted {si(predicted, 'flop/s')}, "
            f"measured {si(measured, 'flop/s')}"
        )
        joined = line(at, y(predicted), at, y(measured), f'stroke="{colour}"')
        size = 4 + 8 * math.sqrt(row.step_share or 0.0)
        both = ring(at, y(predicted), colour, size), disc(at, y(measured), colour, size)
        body.append(titled(tip, joined, *both))
    marks = [(x(i), y(p) + (y(m) - y(p)) * part / 8) for _, i, p, m in points for part in range(9)]
    body += labels([(x(i), y(m), row.phase.value) for row, i, _, m in points], marks)
    return drawing(height, body, "Roofline: predicted and measured rate of each phase")


def times(rows: Sequence[PhaseRow]) -> str:
    """Log time axis; per phase the bound (tick), the prediction with its interval (ring on a bar),
    and the measured median with p10 to p90 (disc on a line)."""
    shown = [row for row in rows if row.shared_s and row.median_s > 0]
    height, gap = TOP + BOTTOM + 34 * len(shown), 34
    values = [
        value for row in shown
        for value in (row.lower_s, row.low_s, row.high_s, row.shared_s, row.p10_s, row.p90_s)
        if value
    ]  # fmt: skip
    x = log_scale(min(values) / 1.5, max(values) * 1.5, LEFT, WIDTH - RIGHT)
    body = log_ticks_x(x, height, "time of a call", "s")
    for index, row in enumerate(shown):
        y, colour = TOP + gap * index + 14, COLOURS[row.phase]
        expected = row.shared_s or 0.0
        low, high = row.low_s or expected, row.high_s or expected
        tip = (
            f"{row.phase}: bound {si(row.lower_s or 0, 's')}, predicted {si(expected, 's')} "
            f"({si(low, 's')} to {si(high, 's')}), measured {si(row.median_s, 's')} "
            f"({si(row.p10_s, 's')} to {si(row.p90_s, 's')})"
        )
        parts = [
            box(x(low), y - 5, x(high) - x(low), 10, f'fill="{colour}" opacity=".28"'),
            ring(x(expected), y, colour),
            line(x(row.p10_s), y + 12, x(row.p90_s), y + 12, f'stroke="{colour}" stroke-width="3"'),
            disc(x(row.median_s), y + 12, colour),
        ]
        if row.lower_s:
            at = x(row.lower_s)
            parts.append(line(at, y - 8, at, y + 16, f'stroke="{colour}" stroke-width="2"'))
        body += [text(LEFT - 8, y + 10, row.phase.value, "end"), titled(tip, *parts)]
    return drawing(height, body, "Bound, predicted and measured time of a call")


def waterfall(fall: Waterfall) -> str:
    """Terms of one lane's mean step, each starting where the one before ended."""
    terms = [(n, fall.terms_s[n]) for n in TERMS if abs(fall.terms_s[n]) >= 5e-4 * fall.step_s]
    row, left = 26, LEFT + 30
    height = TOP + BOTTOM + row * (len(terms) + 1)
    ends, at_s = [], 0.0
    for _, seconds in terms:
        ends.append((at_s, at_s + seconds))
        at_s += seconds
    most = max([fall.step_s, *(max(pair) for pair in ends)])
    x = linear_scale(0.0, most * 1.17, left, WIDTH - RIGHT)
    body = []
    for value in ticks(0.0, most):
        body.append(line(x(value), TOP, x(value), height - BOTTOM, GRID))
        body.append(text(x(value), height - BOTTOM + 18, si(value, "s"), "middle"))
    body.append(text(WIDTH - RIGHT, height - 6, "time of an optimizer step", "end"))
    bars = [*zip(terms, ends, strict=True), (("measured", fall.step_s), (0.0, fall.step_s))]
    for index, ((name, seconds), (start, end)) in enumerate(bars):
        y, low, high = TOP + row * index, min(start, end), max(start, end)
        colour = TERM_COLOURS[name]
        look = f'fill="{colour}"' if seconds >= 0 else (
            f'fill="{colour}" fill-opacity=".25" stroke="{colour}"'
        )  # fmt: skip
        says = f"{si(seconds, 's')}, {seconds / fall.step_s:.0%}"
        body.append(text(left - 8, y + 15, name, "end"))
        body.append(
            titled(f"{name}: {says}", box(x(low), y + 3, max(1.0, x(high) - x(low)), row - 7, look))
        )
        body.append(text(x(high) + 6, y + 15, says, "start"))
        if index < len(terms):
            body.append(line(x(end), y + row - 4, x(end), y + row + 3, GRID))
    return drawing(height, body, f"Where the {fall.lane} lane's mean step went")


def gantt(lanes: Sequence[GanttLane], start_s: float, end_s: float, marks: Sequence[float]) -> str:
    """Lanes over time; `marks` are publications, drawn through all lanes [s into the run]."""
    gap, sizes = 12, [34 if lane.level else max(34, 14 * lane.rows) for lane in lanes]
    height = TOP + BOTTOM + sum(sizes) + gap * len(lanes)
    x = linear_scale(start_s, end_s, LEFT, WIDTH - RIGHT)
    body = []
    for tick in ticks(0.0, end_s - start_s):
        at = x(start_s + tick)
        body.append(line(at, TOP, at, height - BOTTOM, GRID))
        body.append(text(at, height - BOTTOM + 18, si(tick, "s"), "middle"))
    body.append(text(WIDTH - RIGHT, height - 6, f"from {start_s:.4g} s into the run", "end"))
    top = float(TOP)
    for lane, size in zip(lanes, sizes, strict=True):
        body.append(text(LEFT - 8, top + size / 2 + (-3 if lane.level else 4), lane.name, "end"))
        if lane.level:
            body.append(text(LEFT - 8, top + size / 2 + 12, f"up to {lane.rows}", "end"))
        body += _level(lane, x, top, size) if lane.level else _bars(lane, x, top, size)
        top += size + gap
    for mark in marks:
        body.append(line(x(mark), TOP - 6, x(mark), top - gap + 6, 'class="mark"'))
    return drawing(height, body, "What each lane did")


def _bars(lane: GanttLane, x: Scale, top: float, size: float) -> list[str]:
    high = size / lane.rows
    body = []
    for bar in lane.bars:
        wide = max(0.5, x(bar.end_s) - x(bar.start_s))
        look = 'class="idle"' if bar.idle else f'fill="{bar.colour}"'
        drawn = box(x(bar.start_s), top + high * bar.row, wide, high - (lane.rows > 1), look)
        body.append(titled(f"{bar.label}: {si(bar.end_s - bar.start_s, 's')}", drawn))
    return body


def _level(lane: GanttLane, x: Scale, top: float, size: float) -> list[str]:
    """How many spans are under way, as an area."""
    points, at = [(x(x.low), top + size)], top + size
    for time_s, count in lane.level:
        points.append((x(time_s), at))
        at = top + size * (1 - count / lane.rows)
        points.append((x(time_s), at))
    points += [(x(x.high), at), (x(x.high), top + size)]
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
    area = f'<polygon points="{path}" fill="{lane.colour}" stroke="{lane.colour}"/>'
    return [titled(f"{lane.name}: at most {lane.rows} at once", area)]


def scatter(seen: Validation, spread: float | None) -> str:
    """Predicted over measured time of single calls; the diagonal is a perfect prediction, the band
    the 90 % interval, the dashed lines a factor of FACTOR."""
    height, left, right = 460, LEFT, LEFT + 540
    values = [v for call in seen.calls for v in (call.expected_s, call.measured_s)]
    low, high = min(values) / 1.5, max(values) * 1.5
    x = log_scale(low, high, left, right)
    y = log_scale(low, high, height - BOTTOM, TOP)
    body = []
    for value in powers(low, high):
        body.append(line(x(value), TOP, x(value), height - BOTTOM, GRID))
        body.append(line(left, y(value), right, y(value), GRID))
        body.append(text(x(value), height - BOTTOM + 18, si(value, "s"), "middle"))
        body.append(text(left - 8, y(value) + 4, si(value, "s"), "end"))
    if spread is not None:
        wide = math.exp(1.6449 * spread)
        corners = [(low * wide, low), (high, high / wide), (high / wide, high), (low, low * wide)]
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in corners)
        body.append(f'<polygon points="{path}" class="band"/>')
    body.append(line(x(low), y(low), x(high), y(high), 'class="mark"'))
    for a, b in ((low * FACTOR, low), (low, low * FACTOR)):
        end = (high, high / FACTOR) if a > b else (high / FACTOR, high)
        dashed = 'class="mark" stroke-dasharray="5 5"'
        body.append(line(x(a), y(b), x(end[0]), y(end[1]), dashed))
    for call in seen.calls:
        colour = COLOURS[call.phase]
        tip = f"{call.phase}: predicted {si(call.expected_s, 's')}, measured {si(call.measured_s, 's')}"
        at = f'cx="{x(call.measured_s):.1f}" cy="{y(call.expected_s):.1f}"'
        body.append(titled(tip, f'<circle {at} r="3" fill="{colour}" opacity=".55"/>'))
    body.append(text(right, height - 6, "measured time of a call", "end"))
    body.append(text(left + 6, TOP + 12, "predicted", "start"))
    body.append(text(right + 24, TOP + 12, "median error", "start"))
    for index, error in enumerate(seen.errors):
        words = f"{error.phase}: {error.ours:.0%}, {error.calls} calls"
        paint = {phase.value: colour for phase, colour in COLOURS.items()}.get(error.phase, "")
        body.append(text(right + 24, TOP + 34 + 20 * index, words, "start", paint))
    return drawing(height, body, "Predicted over measured time of single calls")


def split(curve: SplitCurve) -> str:
    """Step time over the learner's share of the devices, with the present point."""
    height, most = 320, 3 * max(curve.best.step_s, curve.present_s)
    x = linear_scale(0.0, 1.0, LEFT, WIDTH - RIGHT)
    y = linear_scale(0.0, most, height - BOTTOM, TOP)
    body = linear_axes(x, y, height, "learner's share of the devices", "{:.0%}".format)
    body.append(text(LEFT + 6, TOP + 10, "step [s]", "start"))
    lines = {
        GENERATORS: [(p.learner_share, p.generators_s) for p in curve.points],
        LEARNER: [(p.learner_share, p.learner_s) for p in curve.points],
        TOGETHER: [(p.learner_share, p.step_s) for p in curve.points],
    }
    for colour, points in lines.items():
        inside = [(x(a), y(b)) for a, b in points if b <= most]
        body.append(polyline(inside, f'stroke="{colour}"'))
    body.append(ring(x(curve.best.learner_share), y(curve.best.step_s), TOGETHER))
    body.append(disc(x(curve.present_share), y(curve.present_s), PRESENT))
    return drawing(height, body, "Step time over the split of the devices")


def staleness(shares: Mapping[str, tuple[float, float]]) -> str:
    """Share of consumed samples, measured and simulated, by versions in between."""
    height = 240
    y = linear_scale(0.0, 1.0, height - BOTTOM, TOP + 14)
    slot = (WIDTH - LEFT - RIGHT) / len(shares)
    wide = min(slot * 0.35, 70)
    body = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        body.append(line(LEFT, y(tick), WIDTH - RIGHT, y(tick), GRID))
        body.append(text(LEFT - 8, y(tick) + 4, f"{tick:.0%}", "end"))
    for index, (name, both) in enumerate(shares.items()):
        middle = LEFT + slot * (index + 0.5)
        for share, at, kind in zip(both, (middle - wide - 2, middle + 2), ("measured", "simulated"),
                                   strict=True):  # fmt: skip
            drawn = box(at, y(share), wide, y(0.0) - y(share), f'class="{kind}"')
            body.append(titled(f"{name}: {kind} {share:.2%}", drawn))
            body.append(text(at + wide / 2, y(share) - 5, f"{share:.1%}", "middle"))
        body.append(text(middle, height - BOTTOM + 18, name, "middle"))
    body.append(text(WIDTH - RIGHT, height - 6, "versions between birth and consumption", "end"))
    return drawing(height, body, "Staleness of consumed samples")
