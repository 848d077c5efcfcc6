"""report.html: the report as one document without outside references."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from html import escape

from roofline import svg
from roofline.analyse import story
from roofline.phases import Phase
from roofline.predict import LANES
from roofline.read_run import Run, Span
from roofline.report import charts, text
from roofline.report.account import concurrency, subrows
from roofline.report.content import Report
from roofline.report.text import Table

GANTT_STEPS, GANTT_BARS = 4, 3000
"""Optimizer steps that the Gantt chart shows, and the most bars it draws."""
MOST_SUBROWS = 4
"""Lanes with more spans at once show how many there are instead."""
CURVES = ("reward/mean", "reward/correct", "eval/pass_at_1")
"""Curves of the learning chart, where the run logged them."""

STYLE = """
:root { color-scheme: light dark; --fg: #1d2126; --bg: #ffffff; --dim: #626b76; --line: #dfe3e8;
  --soft: #f5f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --fg: #e3e6ea; --bg: #14171b; --dim: #9aa3ae; --line: #30363e; --soft: #1b1f25; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--fg); background: var(--bg);
  max-width: 1120px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin: 2.4rem 0 .5rem; }
h3 { font-size: .95rem; margin: 1.2rem 0 0; }
.scroll { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 12.5px; }
th, td { text-align: right; padding: .3rem .5rem; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th { font-weight: 600; white-space: normal; vertical-align: bottom; background: var(--soft); }
th:first-child, td:first-child { text-align: left; }
th.why, td.why { text-align: left; white-space: normal; min-width: 15rem; }
td small { color: var(--dim); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; }
dt, .dim { color: var(--dim); } dd { margin: 0; } .dim { font-size: 13.5px; max-width: 60rem; }
svg { width: 100%; max-width: 960px; height: auto; display: block; margin: .6rem 0; }
svg text { font: 12px system-ui, sans-serif; fill: var(--fg); }
.grid { stroke: var(--line); } .roof { stroke: var(--fg); }
.mark { stroke: var(--dim); opacity: .7; } .band { fill: var(--dim); opacity: .16; }
.idle { fill: none; stroke: #9a9a9a; stroke-dasharray: 3 3; }
.measured { fill: #2f7ed8; } .simulated { fill: #d98c2b; }
.key { margin-right: 1rem; white-space: nowrap; font-size: 13px; }
.key i { display: inline-block; width: .8em; height: .8em; margin-right: .35em; }
"""


def html(run: Run, report: Report) -> str:
    """The report with its charts."""
    facts = "".join(f"<dt>{escape(n)}</dt><dd>{escape(v)}</dd>" for n, v in text.header(report))
    name = escape(report.run)
    sections = [
        f"<h1>Roofline report: {name}</h1><dl>{facts}</dl>{_dim(report.flop_convention)}",
        _section("Where the time went", _list(story(run, report.phases))),
        _waterfalls(report),
        _roofline(report),
        _section("Phases", _table(text.phase_table(report))),
        _times(report),
        _gantt(run),
        _validation(report),
        _staleness(report),
        _split(report),
        _what_if(report),
        _learning(run),
    ]
    if report.notes:
        sections.append(_section("Notes", _list(report.notes)))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Roofline report: {name}</title><style>{STYLE}</style></head>"
        f"<body>{''.join(sections)}</body></html>\n"
    )


def _section(title: str, *body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{''.join(body)}</section>"


def _dim(words: str) -> str:
    return f'<p class="dim">{escape(words)}</p>'


def _list(sentences: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(sentence)}</li>' for sentence in sentences)}</ul>"


def _table(table: Table) -> str:
    looks = [' class="why"' if i in table.prose else "" for i in range(len(table.columns))]
    head = "".join(
        f"<th{look}>{escape(name)}</th>" for name, look in zip(table.columns, looks, strict=True)
    )
    body = "".join("<tr>" + "".join(map(_cell, row, looks)) + "</tr>" for row in table.rows)
    note = _dim(table.note) if table.note else ""
    return f'{note}<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _cell(words: str, look: str) -> str:
    first, _, rest = words.partition("\n")
    small = f"<br><small>{escape(rest)}</small>" if rest else ""
    return f"<td{look}>{escape(first)}{small}</td>"


def _keys(named: Sequence[tuple[str, str]]) -> str:
    keys = (
        f'<span class="key"><i style="background:{colour}"></i>{escape(name)}</span>'
        for name, colour in named
    )
    return f"<p>{''.join(keys)}</p>"


def _waterfalls(report: Report) -> str:
    if not report.waterfalls:
        return ""
    drawn = "".join(
        f"<h3>{escape(fall.lane)} lane, mean of {fall.steps} steps</h3>{charts.waterfall(fall)}"
        for fall in report.waterfalls
    )
    table = _table(text.waterfall_table(report))
    return _section("A step, term by term", table, drawn)


def _times(report: Report) -> str:
    if not any(row.shared_s and row.median_s > 0 for row in report.phases):
        return _section("Time of a call", "<p>No span carries a prediction.</p>")
    note = (
        "Upright tick: roofline bound. Ring on a bar: predicted, with its 90 % interval. Disc on a "
        "line: measured median, p10 to p90."
    )
    return _section("Time of a call", _dim(note), charts.times(report.phases))


def _roofline(report: Report) -> str:
    seen = [row for row in report.phases if row.cost and row.shared_s and row.median_s > 0]
    shown = [row for row in seen if row.intensity]
    if not shown:
        return ""
    dtype = statistics.mode(row.cost.dtype for row in shown if row.cost)
    note = f"Peak of {dtype}. Ring: predicted. Disc: measured median."
    if left_out := [row.phase.value for row in seen if not row.intensity]:
        note += f" Not shown, because they multiply no matrices: {', '.join(left_out)}."
    hardware, general = report.hardware, report.hardware.efficiency
    note += " Area: share of a step. Dashed: what products and copies alone reach of the peaks."
    drawn = charts.roofline(
        shown, hardware.peak(dtype), hardware.hbm_bytes_per_s, (general.compute, general.memory)
    )
    return _section("Roofline", _dim(note), drawn)


def _window(run: Run) -> tuple[float, float]:
    """The consecutive steps whose length is nearest the usual: between publications, or the run."""
    ends = sorted(span.end_s for span in run.spans if span.phase is Phase.PUBLISH)
    steps = min(GANTT_STEPS, len(ends) - 1)
    if steps < 1:
        return min(s.start_s for s in run.spans), max(s.end_s for s in run.spans)
    windows = list(zip(ends, ends[steps:], strict=False))
    usual = statistics.median(end - start for start, end in windows)
    middle = len(windows) // 2
    order = sorted(range(len(windows)), key=lambda i: abs(i - middle))
    return min((windows[i] for i in order), key=lambda w: abs(w[1] - w[0] - usual))


def _gantt(run: Run) -> str:
    start_s, end_s = _window(run)
    inside = [s for s in run.spans if s.start_s < end_s and s.end_s > start_s and s.lane in LANES]
    if not inside or end_s <= start_s:
        return ""
    lanes = [_lane(lane, [s for s in inside if s.lane == lane], start_s, end_s) for lane in LANES]
    marks = [s.end_s for s in inside if s.phase is Phase.PUBLISH and start_s <= s.end_s <= end_s]
    shown = [phase for phase in svg.COLOURS if any(s.phase == phase for s in inside if s.computes)]
    keys = _keys([(phase.value, svg.COLOURS[phase]) for phase in shown])
    note = "Upright lines: publications. Dashed outlines: waiting."
    if any(lane.level for lane in lanes):
        note += " The height of the reward lane is the number of groups in verification."
    steps = sorted({s.step for s in inside if s.phase is Phase.PUBLISH and s.step is not None})
    title = f"Steps {steps[0]} to {steps[-1]}, as they ran" if steps else "The run"
    drawn = charts.gantt([lane for lane in lanes if lane.bars or lane.level], start_s, end_s, marks)
    return _section(title, _dim(note), keys, drawn)


def _lane(lane: str, spans: Sequence[Span], start_s: float, end_s: float) -> charts.GanttLane:
    rows = subrows(spans)
    if rows and max(rows) >= MOST_SUBROWS:
        level = [(min(max(time_s, start_s), end_s), count) for time_s, count in concurrency(spans)]
        most = max(count for _, count in level)
        return charts.GanttLane(
            name=lane, rows=most, level=level, colour=svg.COLOURS[spans[0].phase]
        )
    bars = [
        charts.Bar(
            label=f"{span.phase.value}, step {span.step}, version {span.version}",
            colour=svg.COLOURS[span.phase],
            start_s=max(span.start_s, start_s),
            end_s=min(span.end_s, end_s),
            row=row,
            idle=not span.computes,
        )
        for span, row in list(zip(spans, rows, strict=True))[:GANTT_BARS]
    ]
    return charts.GanttLane(name=lane, bars=bars, rows=max(rows, default=0) + 1)


def _validation(report: Report) -> str:
    if report.validation is None:
        return ""
    note = (
        "Each point is a call of this run, predicted in the company it had. Line: a perfect "
        "prediction. Band: the stated interval. Dashed: a factor of two."
    )
    body = [
        _dim(note), charts.scatter(report.validation, report.spread),
        _table(text.errors_table(report)),
    ]  # fmt: skip
    if report.validation.held_out:
        body.append(_table(text.held_out_table(report)))
    return _section("How good the predictions were", *body)


def _staleness(report: Report) -> str:
    shares = text.staleness_shares(report)
    if not shares:
        return ""
    keys = [("measured", "#2f7ed8")]
    keys += [("simulated", "#d98c2b")] if report.simulated else []
    note = text.simulation_note(report)
    return _section(
        "Staleness of consumed samples", _dim(note) if note else "", _keys(keys),
        charts.staleness(shares),
    )  # fmt: skip


def _split(report: Report) -> str:
    curve = report.split
    if curve is None:
        return ""
    note = (
        f"Simulated with each lane's measured time scaled linearly by its share of the "
        f"{curve.devices} devices. Ring: fastest. Disc: this run, measured."
    )
    if report.hardware.devices_share_cores:
        note += " These devices share cores, so here the shares stand for shares of real devices."
    keys = _keys([
        ("generators alone", charts.GENERATORS), ("learner alone", charts.LEARNER),
        (f"step, together; best at {curve.best.learner_share:.0%}: "
         f"{svg.si(curve.best.step_s, 's')}", charts.TOGETHER),
        (f"this run, {curve.present_share:.0%}: measured {svg.si(curve.present_s, 's')}",
         charts.PRESENT),
    ])  # fmt: skip
    return _section("Generators or learner: the split", _dim(note), keys, charts.split(curve))


def _what_if(report: Report) -> str:
    tables = []
    if report.changes:
        tables.append(_section("What if: this machine", _table(text.changes_table(report))))
    if report.elsewhere:
        tables.append(_section("What if: other hardware", _table(text.elsewhere_table(report))))
    return "".join(tables)


def _learning(run: Run) -> str:
    series = {}
    for name in CURVES:
        line = [
            (float(row["step"]), float(row[name]))
            for row in run.metrics
            if isinstance(row.get(name), int | float) and isinstance(row.get("step"), int)
        ]
        if len(line) > 1:
            series[name] = line
    return _section("Learning", svg.curves(series, "optimizer step")) if series else ""
