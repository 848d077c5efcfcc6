"""The report in words and tables, and report.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from roofline.analyse import PhaseRow, story
from roofline.read_run import Run
from roofline.report.account import TERMS
from roofline.report.content import NO_PATH, SHAPE, Report
from roofline.report.outlook import Elsewhere
from roofline.svg import si

MEANINGS = {
    "ideal": "matrix products and memory at the peaks, perfectly overlapped",
    "efficiency": "what real programs add, by calibration",
    "launch": "fixed times of dispatches and kernels",
    "host": "a call's own host time, by calibration: Python, transfers, waiting",
    "communication": "transfers and collectives, none hidden",
    "sharing": "the other lane and the verifiers were at work on the same cores",
    "unexplained": "measured less predicted",
    "unpredicted": "evaluation, checkpoints, compilation",
    "waiting": "for the other lane",
    "between": "Python, packing, logging: time in no span",
}
"""What each term of the waterfall holds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Rows of text, the first column left-aligned."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    prose: Sequence[int] = ()
    """Columns of sentences, left-aligned too. Within a cell what follows a line break is small."""


def header(report: Report) -> list[tuple[str, str]]:
    """What ran, on what, and how it was calibrated."""
    hardware, model = report.hardware, report.model
    path, dtype = model.get("path", "null"), model.get("dtype", "")
    named = [] if path in NO_PATH else [Path(path).name]
    shape = ("family", *SHAPE, "vocab_size", "dtype")
    named += [f"{model['parameters']:,} parameters"] if "parameters" in model else []
    named += [f"{name.replace('_', ' ')} {model[name]}" for name in shape if name in model]
    peaks = ", ".join(
        f"{name} {si(peak, 'flop/s')}" for name, peak in hardware.peak_flops_per_s.items()
    )
    how = f"calibrated {hardware.date}" if hardware.calibrated else f"datasheet {hardware.date}"
    how += f"; disturbed: {hardware.disturbance}" if hardware.disturbance else ""
    software = ", ".join(f"{name} {version}" for name, version in hardware.versions.items())
    ridge = (
        f"; ridge at {hardware.critical_intensity(dtype):.3g} flop/byte ({dtype})"
        if dtype in hardware.peak_flops_per_s
        else ""
    )
    entries = [
        ("model", ", ".join(named) or "not recorded"),
        ("machine", hardware.name),
        ("peaks", f"{peaks}; memory {si(hardware.hbm_bytes_per_s, 'B/s')}{ridge}"),
        ("hardware numbers", f"{how}; {software}" if software else how),
        ("fixed times", f"dispatch {si(hardware.dispatch_s, 's')}, kernel "
                        f"{si(hardware.kernel_s, 's')}, collective {si(hardware.link_latency_s, 's')}"),
        ("intervals", _interval_note(report)),
    ]  # fmt: skip
    if hardware.devices_share_cores:
        each = ", ".join(f"{name} {by:.2f}" for name, by in hardware.phase_contention.items())
        slower = f"devices share cores: a phase is {hardware.contention:.2f} times slower beside"
        entries.append(
            ("contention", f"{slower} another lane at work{f' ({each})' if each else ''}")
        )
        if hardware.verifier_contention:
            by = ", ".join(f"{name} {by:.2f}" for name, by in hardware.verifier_contention.items())
            entries.append(("beside verifiers", f"times slower while groups are verified: {by}"))
    wall = si(report.wall_s, "s") if report.wall_s < 1 else f"{report.wall_s:.1f} s"
    entries.append(("wall time", f"{wall} from the first span to the last; a cold start has none"))
    for key in ("pass_at_1_before", "pass_at_1_after", "samples_per_s"):
        if report.results.get(key, 0) > 0 or (key in report.results and "pass" in key):
            unit = " samples/s" if key == "samples_per_s" else ""
            name = "throughput" if unit else key.replace("_", " ").replace("at 1", "@ 1")
            value = report.results[key]
            entries.append((name, f"{value:.4g}{unit}" if unit else f"{value:.1%}"))
    return entries + _curriculum(report)


def _curriculum(report: Report) -> list[tuple[str, str]]:
    """Where the problems of an edge curriculum stood at the end; what probes cost and found."""
    now = {
        name.removeprefix("curriculum/"): value
        for name, value in report.results.items()
        if name.startswith("curriculum/")
    }
    if "active" not in now:
        return []
    places = ("active", "solved", "unsolved", "unseen")
    stood = ", ".join(f"{now[name]:,.0f} {name}" for name in places)
    if now["probes"] == 0:
        return [("problems", stood)]
    tokens, found = now["probe_tokens"], now["promoted"]
    share = tokens / max(report.results.get("perf/generated_tokens", 0.0), tokens, 1.0)
    each = f", one for every {tokens / found:,.0f} tokens" if found else ""
    cost = (
        f"{now['probes']:,.0f} of unsolved problems took {tokens:,.0f} tokens, {share:.1%} of all that were "
        f"sampled; {now['probe_samples']:,.0f} samples were judged, {now['probe_cancelled']:,.0f} cut short "
        f"because the batch wanted their slots; {found:,.0f} problems were promoted{each}"
    )
    return [("problems", stood), ("probes", cost)]


def _interval_note(report: Report) -> str:
    if report.spread is None:
        return "none: nobody calibrated this hardware"
    checks = len(report.hardware.held_out)
    if checks:
        return f"90 %, log error {report.spread:.2f} from {checks} shapes that calibration held out"
    return (
        f"90 %, log error {report.spread:.2f} assumed: this calibration held no shape out "
        "(python -m roofline.calibrate does)"
    )


def phase_table(report: Report) -> Table:
    """One row per phase."""
    columns = (
        "phase", "calls", "bound", "alone", "predicted", "measured", "measured / predicted",
        "bound by", "flop / byte", "MFU", "MBU", "overlap", "share of step", "of wall",
    )  # fmt: skip
    note = (
        "Times are medians per call. bound: no program can be faster on these peaks. alone: "
        "calibrated, nothing else running; predicted: with the other lane and the verifiers at work as "
        "they were, and the 90 % interval; measured: and p10 - p90. "
        "measured / predicted compares the sums over all calls. Shares count time covered by at "
        "least one call: of a step (between the first and the last publication), of the run."
    )
    return Table(columns=columns, rows=[_phase_cells(row) for row in report.phases], note=note)


def _phase_cells(row: PhaseRow) -> list[str]:
    ends = "" if row.low_s is None else f"\n{_s(row.low_s)} - {_s(row.high_s)}"
    return [
        row.phase.value, str(row.calls), _s(row.lower_s), _s(row.alone_s), f"{_s(row.shared_s)}{ends}",
        f"{_s(row.median_s)}\n{_s(row.p10_s)} - {_s(row.p90_s)}",
        "-" if row.ratio is None else f"{row.ratio:.2f}", row.bound or "-",
        "-" if row.intensity is None else f"{row.intensity:.3g}", _percent(row.mfu),
        _percent(row.mbu), f"{row.overlap:.0%}", _percent(row.step_share), f"{row.wall_share:.1%}",
    ]  # fmt: skip


def waterfall_table(report: Report) -> Table:
    """Terms of the mean step, one column per lane."""
    lanes = [fall.lane for fall in report.waterfalls]
    rows = [
        [name, *(f"{_s(fall.terms_s[name])} ({fall.terms_s[name] / fall.step_s:.0%})"
                 for fall in report.waterfalls), MEANINGS[name]]
        for name in TERMS
        if any(abs(fall.terms_s[name]) > 0 for fall in report.waterfalls)
    ]  # fmt: skip
    rows.append(["measured", *(_s(fall.step_s) for fall in report.waterfalls), "mean step"])
    note = "Mean optimizer step between the first and the last publication; terms add up exactly."
    return Table(columns=("term", *lanes, "what"), rows=rows, note=note, prose=(len(lanes) + 1,))


def errors_table(report: Report) -> Table:
    """Median errors by phase and predictor."""
    columns = ("phase", "calls", "median call", "each call", "alone", "bound", "constant MFU")
    seen = report.validation
    rows = [
        [e.phase, str(e.calls), _percent(e.of_median), _percent(e.ours), _percent(e.alone),
         _percent(e.bound), _percent(e.constant_mfu)]
        for e in (seen.errors if seen else ())
    ]  # fmt: skip
    reached = f" ({seen.mfu:.1%})" if seen and seen.mfu else ""
    note = (
        "median call: the median prediction against the median time; all: the median over phases. "
        "Others: median of |predicted / measured - 1| over calls, beside the other lane (each call) "
        "and as if nothing else ran (alone). Baselines: the roofline bound, and flops "
        f"at one share of the peak{reached} taken from the first calls of each phase, which no "
        "column is scored on; it says nothing about calls without flops, which its last row leaves out."
    )
    return Table(columns=columns, rows=rows, note=note)


def held_out_table(report: Report) -> Table:
    """Calibration's own check."""
    rows = [[name, f"{ratio:.2f}"] for name, ratio in report.hardware.held_out.items()]
    note = "Predicted over measured, of shapes that calibration ran but did not fit."
    return Table(columns=("shape", "predicted / measured"), rows=rows, note=note)


def changes_table(report: Report) -> Table:
    """The run's pipeline with one thing changed."""
    columns = ("change", "step", "samples/s", "generators idle", "learner idle", "mean staleness",
               "speed-up")  # fmt: skip
    rows = [
        [c.change, _s(c.step_s), _rate(c.samples_per_s), _percent(c.rollout_idle),
         _percent(c.learner_idle), f"{c.staleness:.2f}", f"{c.speedup:.2f} x"]
        for c in report.changes
    ]  # fmt: skip
    source = report.simulated.lengths if report.simulated else ""
    note = f"Simulated from this run's measured phases; {source}."
    return Table(columns=columns, rows=rows, note=note)


def elsewhere_table(report: Report) -> Table:
    """The same work on other hardware."""
    columns = ("hardware", "GPUs", "fastest split", "step", "samples/s", "staleness", "idle",
               "memory per GPU", "against this run")  # fmt: skip
    note = (
        "Planned from the cost model with datasheet peaks and shares, never measured there. A small "
        "model's step is mostly fixed times of kernels, in which a larger card need not be faster. d data, "
        "f fsdp, t tensor parallel."
    )
    rows = [_elsewhere(e) for e in report.elsewhere]
    return Table(columns=columns, rows=rows, note=note, prose=(2,))


def _elsewhere(one: Elsewhere) -> list[str]:
    if one.step_s is None:
        return [one.hardware, str(one.devices), one.split, *["-"] * 6]
    return [
        one.hardware, str(one.devices), one.split, _s(one.step_s), _rate(one.samples_per_s),
        f"{one.staleness:.2f}", _percent(one.idle), f"{one.device_gib:.2f} GiB",
        f"{one.speedup:.1f} x",
    ]  # fmt: skip


def staleness_shares(report: Report) -> dict[str, tuple[float, float]]:
    """(measured, simulated) share of consumed samples by versions in between."""
    total = sum(report.staleness.values())
    found = {k: n / total for k, n in report.staleness.items()} if total else {}
    played = report.simulated.staleness if report.simulated else {}
    names = sorted({*found, *played}, key=lambda name: (not name.isdigit(), name.zfill(9)))
    return {name: (found.get(name, 0.0), played.get(name, 0.0)) for name in names}


def simulation_note(report: Report) -> str:
    """Simulated against measured step, in one sentence."""
    seen = report.simulated
    if seen is None:
        return ""
    return (
        f"Simulated from the run's own phases, a step takes {_s(seen.step_s)}. Measured: "
        f"{_s(seen.measured_step_s)} in the median, {_s(seen.measured_mean_s)} in the mean, which "
        "holds pauses for evaluation and checkpoints, as the simulation does not."
    )


def markdown(run: Run, report: Report) -> str:
    """The report as Markdown, without charts."""
    lines = ["# Roofline report", ""]
    lines += [f"- {name}: {value}" for name, value in [("run", report.run), *header(report)]]
    lines += ["", report.flop_convention, "", "## Where the time went", ""]
    lines += [f"- {sentence}" for sentence in story(run, report.phases)]
    tables = {
        "Phases": phase_table(report),
        "A step, term by term": waterfall_table(report) if report.waterfalls else None,
        "Predictions of this run's calls": errors_table(report) if report.validation else None,
        "Calibration's own check": held_out_table(report) if report.hardware.held_out else None,
        "What if: this machine": changes_table(report) if report.changes else None,
        "What if: other hardware": elsewhere_table(report) if report.elsewhere else None,
    }
    for title, table in tables.items():
        if table is not None:
            lines += ["", f"## {title}", "", table.note, "", *_markdown(table)]
    if shares := staleness_shares(report):
        lines += ["", "## Staleness of consumed samples", "", simulation_note(report), ""]
        lines += [f"- {k}: measured {a:.1%}, simulated {b:.1%}" for k, (a, b) in shares.items()]
    if report.notes:
        lines += ["", "## Notes", "", *(f"- {note}" for note in report.notes)]
    return "\n".join([*lines, ""])


def _markdown(table: Table) -> list[str]:
    rule = "|" + "|".join(["---", *["--:"] * (len(table.columns) - 1)]) + "|"
    body = [
        "| " + " | ".join(cell.replace("|", "/").replace("\n", ", ") for cell in row) + " |"
        for row in table.rows
    ]
    return ["| " + " | ".join(table.columns) + " |", rule, *body]


def _s(value: float | None) -> str:
    return "-" if value is None else si(value, "s")


def _rate(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
