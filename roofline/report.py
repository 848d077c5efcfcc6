"""Predicted beside measured for one run: report.md and a self-contained report.html.

    python -m roofline.report RUN_DIR

Reads only the run folder's files (see `roofline.read_run`); loads no jax. The HTML holds its style
and its charts inline and asks the network for nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path

from roofline import svg
from roofline.analyse import PhaseRow, phase_rows, story
from roofline.predict import LANES
from roofline.read_run import Run, read_run

GANTT_STEPS, GANTT_BARS = 4, 1500
"""Optimizer steps that the Gantt chart shows, and the most bars it draws."""
CURVES = ("reward/mean", "reward/correct", "eval/pass_at_1")
"""Curves of the learning chart, where the run logged them."""
FLOP_CONVENTION = (
    "Flops are those of matrix products, a multiply-add counted as two, as many as the program "
    "executes: attention over the whole packed row or cache window with nothing saved by the "
    "causal mask, the head on every scored token, recomputation included. MFU is these flops, MBU "
    "the memory bytes, over peak times measured time."
)
COLUMNS = (
    "phase", "calls", "bound [s]", "expected alone [s]", "expected shared [s]", "measured [s]",
    "p10-p90 [s]", "measured / expected", "binds", "MFU", "MBU", "overlap", "share of wall",
)  # fmt: skip

STYLE = """
:root { color-scheme: light dark; --fg: #1d2126; --bg: #ffffff; --dim: #6b7480; --line: #d9dee4; }
@media (prefers-color-scheme: dark) {
  :root { --fg: #e3e6ea; --bg: #14171b; --dim: #929ba6; --line: #343a42; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--fg); background: var(--bg);
  max-width: 1000px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
th, td { text-align: right; padding: .3rem .6rem; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th { font-weight: 600; white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; }
dt, .dim { color: var(--dim); } dd { margin: 0; }
svg { width: 100%; height: auto; } svg text { font: 12px system-ui, sans-serif; fill: var(--fg); }
.grid { stroke: var(--line); } .roof { fill: none; stroke: var(--fg); stroke-width: 2; }
.column { fill: #2f7ed8; } .key { margin-right: 1rem; white-space: nowrap; }
.key i { display: inline-block; width: .8em; height: .8em; margin-right: .35em; }
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Write both reports; 0, or 2 with one line on stderr when the folder cannot be read."""
    parser = argparse.ArgumentParser(
        prog="python -m roofline.report", description="Predicted beside measured for one run."
    )
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="folder that training wrote")
    folder = parser.parse_args(arguments).run
    try:
        paths = write(folder)
    except (OSError, ValueError) as error:
        print(f"roofline.report: {error}", file=sys.stderr)
        return 2
    for path in paths:
        print(path)
    return 0


def write(folder: Path) -> tuple[Path, Path]:
    """Write report.md and report.html into a run folder and return their paths.

    Raises:
        ValueError: the folder is not a run folder; see `roofline.read_run.read_run`.
    """
    run = read_run(folder)
    rows = phase_rows(run)
    paths = folder / "report.md", folder / "report.html"
    for path, text in zip(paths, (markdown(run, rows), html(run, rows)), strict=True):
        partial = path.with_name(path.name + ".partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    return paths


def header(run: Run) -> list[tuple[str, str]]:
    """What ran, on what, and how it was calibrated."""
    hardware, config = run.hardware, run.config
    sizes = ("width", "num_layers", "num_heads", "num_kv_heads", "head_size", "ffw_size", "dtype")
    shape = ", ".join(
        f"{name} {config[f'model.{name}']}" for name in sizes if f"model.{name}" in config
    )
    path = config.get("model.path", "null")
    model = shape if path in ("null", "None", "~") else path
    peaks = ", ".join(
        f"{dtype} {svg.si(peak, 'flop/s')}" for dtype, peak in hardware.peak_flops_per_s.items()
    )
    how = f"calibrated {hardware.date}" if hardware.calibrated else f"datasheet {hardware.date}"
    software = ", ".join(f"{name} {version}" for name, version in hardware.versions.items())
    entries = [
        ("run", str(run.folder)),
        ("model", model or "not recorded"),
        ("machine", hardware.name),
        ("peaks", f"{peaks}; memory {svg.si(hardware.hbm_bytes_per_s, 'B/s')}"),
        ("hardware numbers", f"{how}; {software}" if software else how),
    ]
    if hardware.devices_share_cores:
        slower = f"devices share cores: a phase is {hardware.contention:.2f} times slower beside"
        entries.append(("contention", f"{slower} another lane that computes"))
    if hardware.held_out:
        checks = ", ".join(f"{name} {ratio:.2f}" for name, ratio in hardware.held_out.items())
        entries.append(("held-out shapes", f"predicted / measured: {checks}"))
    entries.append(("wall time", f"{run.wall_s:.1f} s"))
    for key in ("pass_at_1_before", "pass_at_1_after", "samples_per_s"):
        if isinstance(run.summary.get(key), int | float):
            entries.append((key.replace("_", " "), f"{run.summary[key]:.4g}"))
    return entries


def cells(row: PhaseRow) -> list[str]:
    """One line of the table, in the order of COLUMNS."""
    return [
        row.phase.value,
        str(row.calls),
        _number(row.lower_s),
        _number(row.alone_s),
        _number(row.shared_s),
        _number(row.median_s),
        f"{row.p10_s:.3g}-{row.p90_s:.3g}",
        "-" if row.ratio is None else f"{row.ratio:.2f}",
        row.bound or "-",
        _percent(row.mfu),
        _percent(row.mbu),
        f"{row.overlap:.0%}",
        f"{row.wall_share:.1%}",
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def markdown(run: Run, rows: Sequence[PhaseRow]) -> str:
    """The report as Markdown, without charts."""
    lines = ["# Roofline report", ""]
    lines += [f"- {name}: {value}" for name, value in header(run)]
    lines += ["", f"{FLOP_CONVENTION}", "", "## Where the time went", ""]
    lines += [f"- {sentence}" for sentence in story(run, rows)]
    lines += ["", "## Phases", "", TABLE_NOTE, ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "|" + "|".join(["---", *["--:"] * 12]) + "|"]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    if histogram := _staleness(run):
        lines += ["", "## Staleness of consumed samples", ""]
        lines += [f"- {name}: {count:g}" for name, count in histogram.items()]
    if run.notes:
        lines += ["", "## Notes", "", *(f"- {note}" for note in run.notes)]
    return "\n".join([*lines, ""])


TABLE_NOTE = (
    "Times are medians per call. bound: no program can be faster on these peaks. expected alone: "
    "calibrated, nothing else running. expected shared: with the other lane computing for the "
    "share of the call given under overlap. measured / expected compares the sums over all calls "
    "with the shared expectation."
)


def html(run: Run, rows: Sequence[PhaseRow]) -> str:
    """The report with its charts, as one HTML document without outside references."""
    facts = "".join(f"<dt>{escape(n)}</dt><dd>{escape(v)}</dd>" for n, v in header(run))
    sections = [
        f"<h1>Roofline report</h1><dl>{facts}</dl><p class=dim>{escape(FLOP_CONVENTION)}</p>",
        _section("Where the time went", _list(story(run, rows))),
        _section("Phases", f"<p class=dim>{escape(TABLE_NOTE)}</p>{_table(rows)}"),
        _times(rows),
        _roofline(run, rows),
        _gantt(run),
        _learning(run),
    ]
    if histogram := _staleness(run):
        chart = svg.columns(histogram, "optimizer steps between weights and use", "samples")
        sections.append(_section("Staleness of consumed samples", chart))
    if run.notes:
        sections.append(_section("Notes", _list(run.notes)))
    name = escape(run.folder.resolve().name)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Roofline report: {name}</title><style>{STYLE}</style></head>"
        f"<body>{''.join(sections)}</body></html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def _list(sentences: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(sentence)}</li>' for sentence in sentences)}</ul>"


def _table(rows: Sequence[PhaseRow]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in COLUMNS)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells(row)) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _times(rows: Sequence[PhaseRow]) -> str:
    drawn = [
        (row.phase.value, svg.COLOURS[row.phase], row.lower_s or 0.0, row.shared_s, row.median_s)
        for row in rows
        if row.shared_s and row.median_s > 0
    ]
    if not drawn:
        return _section("Time of a call", "<p>No span carries a prediction.</p>")
    note = "<p class=dim>Tick: roofline bound. Ring: expected. Disc: measured median.</p>"
    return _section("Time of a call", note + svg.dumbbells(drawn))


def _roofline(run: Run, rows: Sequence[PhaseRow]) -> str:
    points, left_out, dtype = [], [], "float32"
    for row in rows:
        work = row.cost
        if work is None or not row.shared_s or row.median_s <= 0:
            continue
        if work.flops <= 0 or work.hbm_bytes <= 0:
            left_out.append(row.phase.value)
            continue
        dtype = work.dtype
        points.append(
            svg.Point(
                label=row.phase.value,
                colour=svg.COLOURS[row.phase],
                intensity=work.flops / work.hbm_bytes,
                predicted_flops_per_s=work.flops / row.shared_s,
                measured_flops_per_s=work.flops / row.median_s,
            )
        )
    if not points:
        return ""
    note = f"Peak of {dtype}. Ring: expected. Disc: measured median."
    if left_out:
        note += f" Not shown, because they multiply no matrices: {', '.join(left_out)}."
    chart = svg.roofline(points, run.hardware.peak(dtype), run.hardware.hbm_bytes_per_s)
    return _section("Roofline", f"<p class=dim>{escape(note)}</p>{chart}")


def _gantt(run: Run) -> str:
    steps = sorted({span.step for span in run.spans if span.step is not None})
    middle = max(0, (len(steps) - GANTT_STEPS) // 2)
    shown = set(steps[middle : middle + GANTT_STEPS])
    chosen = [s for s in run.spans if not shown or s.step in shown][:GANTT_BARS]
    bars = [
        svg.Bar(
            lane=span.lane,
            label=f"{span.phase.value}, step {span.step}, version {span.version}",
            colour=svg.COLOURS[span.phase],
            start_s=span.start_s,
            end_s=span.end_s,
            idle=not span.computes,
        )
        for span in chosen
        if span.lane in LANES
    ]
    if not bars:
        return ""
    lanes = [lane for lane in LANES if any(bar.lane == lane for bar in bars)]
    keys = svg.legend([p for p in svg.COLOURS if any(s.phase == p for s in chosen)])
    title = f"Steps {min(shown)} to {max(shown)}" if shown else "The run"
    return _section(title, f"<p>{keys}</p>{svg.gantt(bars, lanes)}")


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


def _staleness(run: Run) -> dict[str, float]:
    histogram = run.summary.get("staleness_histogram")
    if not isinstance(histogram, dict):
        return {}
    return {str(name): float(count) for name, count in histogram.items()}


if __name__ == "__main__":
    sys.exit(main())
