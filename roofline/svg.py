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
    Phase.COMPILE: "#7d8f3a",
    Phase.WAIT_BATCH: "#9a9a9a",
    Phase.WAIT_LEARNER: "#9a9a9a",
}
"""One colour per phase, in every chart."""

WIDTH = 880
LEFT, RIGHT, TOP, BOTTOM = 92, 18, 16, 44
TEXT_PX, LETTER_PX, MARK_PX = 12, 7, 7
"""Height of a line of text, width of a letter, radius of a mark."""
GRID = 'class="grid"'


def si(value: float, unit: str = "") -> str:
    """Three significant digits with a prefix: 1.23 G, 45.6 m."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g} {unit}".strip()
    power = max(-4, min(5, math.floor(math.log10(abs(value)) / 3)))
    prefix = {-4: "p", -3: "n", -2: "u", -1: "m", 0: "", 1: "k", 2: "M", 3: "G", 4: "T", 5: "P"}[
        power
    ]
    return f"{value / 10 ** (3 * power):.3g} {prefix}{unit}".strip()


def curves(series: Mapping[str, Sequence[tuple[float, float]]], x_label: str) -> str:
    """Lines over a common linear axis; the legend above them carries the last value."""
    height, top = 280, TOP + 20
    points = [point for one in series.values() for point in one]
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    low, high = min([*ys, 0.0]), max(ys)
    high = high if high > low else low + 1
    x = linear_scale(min(xs), max(xs), LEFT, WIDTH - RIGHT)
    y = linear_scale(low, high, height - BOTTOM, top)
    body = linear_axes(x, y, height, x_label)
    palette = list(dict.fromkeys(COLOURS.values()))
    room = (WIDTH - LEFT - RIGHT) / max(1, len(series))
    for index, (name, one) in enumerate(series.items()):
        colour = palette[(index * 5 + 5) % len(palette)]
        body.append(polyline([(x(a), y(b)) for a, b in one], f'stroke="{colour}"'))
        last = f"{name}: {one[-1][1]:.3g} at the end"
        body.append(text(LEFT + room * index, TOP + 4, last, "start", colour))
    return drawing(height, body, ", ".join(series))


def legend(phases: Sequence[Phase]) -> str:
    """Colour keys, as HTML."""
    return "".join(
        f'<span class="key"><i style="background:{COLOURS[p]}"></i>{p}</span>' for p in phases
    )


@dataclass(frozen=True, slots=True)
class Scale:
    """Values of an axis to pixels; outside [low, high] the nearest end."""

    low: float
    high: float
    place: Callable[[float], float]

    def __call__(self, value: float) -> float:
        """Where `value` lies [px]."""
        return self.place(min(max(value, self.low), self.high))


def linear_scale(low: float, high: float, start: float, end: float) -> Scale:
    """[low, high] to the pixels [start, end]."""
    span = high - low if high > low else 1.0
    return Scale(low, low + span, lambda value: start + (value - low) / span * (end - start))


def log_scale(low: float, high: float, start: float, end: float) -> Scale:
    """[low, high], both above 0, to the pixels [start, end]."""
    span = math.log(high / low)
    return Scale(low, high, lambda value: start + math.log(value / low) / span * (end - start))


def powers(low: float, high: float) -> list[float]:
    """At most ten powers of ten in [low, high]; where there are fewer than three, also their 2 and
    5 fold."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    step = max(1, math.ceil((last - first) / 10))
    tens = [10.0**power for power in range(first, last + 1, step)]
    if sum(low <= value <= high for value in tens) < 3:
        tens = [value * factor for value in tens for factor in (1, 2, 5)]
    return [value for value in tens if low <= value <= high]


def linear_axes(
    x: Scale, y: Scale, height: float, x_label: str, tick: Callable[[float], str] = "{:g}".format
) -> list[str]:
    """Grid, ticks and the label of the abscissa, whose values `tick` writes."""
    body = []
    for value in ticks(y.low, y.high):
        body.append(line(LEFT, y(value), WIDTH - RIGHT, y(value), GRID))
        body.append(text(LEFT - 8, y(value) + 4, f"{value:g}", "end"))
    for value in ticks(x.low, x.high):
        body.append(text(x(value), height - BOTTOM + 18, tick(value), "middle"))
    body.append(text(WIDTH - RIGHT, height - 6, x_label, "end"))
    return body


def log_ticks_x(x: Scale, height: float, label: str, unit: str = "") -> list[str]:
    """Vertical grid at powers of ten, and the label below."""
    body = []
    for value in powers(x.low, x.high):
        at = x(value)
        body.append(line(at, TOP, at, height - BOTTOM, GRID))
        body.append(
            text(at, height - BOTTOM + 18, si(value, unit) if unit else f"{value:g}", "middle")
        )
    body.append(text(WIDTH - RIGHT, height - 8, label, "end"))
    return body


def labels(
    wanted: Sequence[tuple[float, float, str]], marks: Sequence[tuple[float, float]]
) -> list[str]:
    """Words beside their points (x, y, words): the nearest place that covers no mark and no other
    words, with a line to the point where that is not beside it."""
    taken = [(x - MARK_PX, x + MARK_PX, y - MARK_PX, y + MARK_PX) for x, y in marks]
    body = []
    for x, y, words in wanted:
        wide = LETTER_PX * len(words)
        places = [
            (x + right if right > 0 else x + right - wide, y + down)
            for down in (4, 18, -10, 34, -26, 50, -42, 66, -58)
            for right in (10, -10, 26, -26)
        ]
        left, base = next(
            (place for place in places if not any(_cover(box, *place, wide) for box in taken)),
            places[0],
        )
        taken.append((left, left + wide, base - TEXT_PX, base + 2))
        near = left if left > x else left + wide
        if abs(base - 4 - y) > TEXT_PX:
            body.append(line(x, y, near, base - 4, GRID))
        body.append(text(left, base, words, "start"))
    return body


def _cover(box: tuple[float, float, float, float], left: float, base: float, wide: float) -> bool:
    low, high, top, bottom = box
    return left < high and low < left + wide and base - TEXT_PX < bottom and top < base + 2


def ticks(low: float, high: float) -> list[float]:
    """Five to ten round values in [low, high]."""
    rough = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough)
    first = math.ceil(low / step - 1e-9)
    return [
        round((first + i) * step, 12) for i in range(int((high - first * step) / step + 1e-9) + 1)
    ]


def line(x1: float, y1: float, x2: float, y2: float, look: str) -> str:
    """A straight line; `look` holds further attributes."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {look}/>'


def polyline(points: Sequence[tuple[float, float]], look: str) -> str:
    """A line through pixels; `look` holds its stroke or class."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke-width="2" {look}/>'


def box(x: float, y: float, width: float, height: float, look: str) -> str:
    """A rectangle; `look` holds its fill, stroke or class."""
    return f'<rect x="{x:.2f}" y="{y:.1f}" width="{width:.2f}" height="{height:.1f}" {look}/>'


def ring(x: float, y: float, colour: str, radius: float = 6) -> str:
    """A prediction."""
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" fill="none" stroke="{colour}" '
        'stroke-width="2"/>'
    )


def disc(x: float, y: float, colour: str, radius: float = 5) -> str:
    """A measurement."""
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" fill="{colour}"/>'


def titled(title: str, *parts: str) -> str:
    """Parts that show `title` under the pointer."""
    return f"<g><title>{escape(title)}</title>{''.join(parts)}</g>"


def text(x: float, y: float, words: str, anchor: str, colour: str = "") -> str:
    """Words with their start, middle or end at x; without a colour that of the page."""
    paint = f' style="fill:{colour}"' if colour else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{paint}>{escape(words)}</text>'


def drawing(height: float, body: Sequence[str], title: str) -> str:
    """One chart; `title` is what a screen reader says."""
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(body)}</svg>'
    )
