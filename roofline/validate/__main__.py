"""Scores predictions on measured cases, beside the book's bound, a constant MFU and peers."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from roofline.choose import report_errors
from roofline.progress import tracked
from roofline.validate.end_to_end import DECODE_STEP, SERVING_STEP, TRAIN_STEP
from roofline.validate.kernels import ATTENTION_DECODE, ATTENTION_PREFILL, COLLECTIVE, GEMM
from roofline.validate.kinds import Kind, Row
from roofline.validate.score import PREDICTORS, SEED, Errors, Score, pooled, score_kind

KINDS: tuple[Kind, ...] = (
    GEMM, ATTENTION_PREFILL, ATTENTION_DECODE, COLLECTIVE, DECODE_STEP, SERVING_STEP, TRAIN_STEP,
)  # fmt: skip
TITLES: Mapping[str, str] = {
    "bound": "book bound", "constant_mfu": "constant MFU", "ours": "ours", "peer": "peer",
    "calibrated": "ours, calibrated",
}  # fmt: skip


def main() -> None:
    """Parse the command line, score, print."""
    parser = argparse.ArgumentParser(prog="python -m roofline.validate", description=__doc__)
    parser.add_argument(
        "--cases", type=Path, required=True, help="folder of *.jsonl with one case per line"
    )
    parser.add_argument(
        "--calibrate-rows", type=int, default=8, help="rows per stack to calibrate on (0: none)"
    )
    parser.add_argument("--kind", choices=[kind.name for kind in KINDS], help="score only these")
    parser.add_argument("--json", action="store_true", help="print the scores as JSON")
    options = parser.parse_args()
    report_errors(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    if options.calibrate_rows < 0:
        raise ValueError(f"--calibrate-rows={options.calibrate_rows} must be at least 0")
    rows = read_cases(options.cases)
    kinds = [kind for kind in KINDS if options.kind in (None, kind.name)]
    scores, ignored = score_cases(rows, kinds, calibrate_rows=options.calibrate_rows)
    if options.json:
        print(json.dumps(to_json(scores, ignored, options.calibrate_rows), indent=1))
    else:
        print(describe(scores, ignored, options.calibrate_rows))


def read_cases(folder: Path) -> list[Row]:
    """All rows of all *.jsonl files of a folder.

    Raises:
        ValueError: no such files, or a line that is no case; the message names file and line.
    """
    paths = sorted(folder.glob("*.jsonl"))
    if not paths:
        raise ValueError(f"--cases {folder} holds no *.jsonl file; give the folder of the tables")
    rows: list[Row] = []
    for path in paths:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if line.strip():
                rows.append(_case(line, f"{path}:{number}"))
    return rows


def _case(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    needed = ("id", "kind", "hardware", "stack", "measured_s")
    missing = [name for name in needed if not isinstance(row, dict) or name not in row]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}; a case needs {', '.join(needed)}")
    if not isinstance(row["measured_s"], int | float) or not row["measured_s"] > 0:
        raise ValueError(f"{where}: measured_s={row['measured_s']!r} must be a time above 0 [s]")
    return row


def score_cases(
    rows: Sequence[Row], kinds: Sequence[Kind], *, calibrate_rows: int
) -> tuple[dict[str, list[Score]], dict[str, int]]:
    """Scores by kind, and how many rows were left aside, by reason.

    Raises:
        ValueError: a row lacks a field of its kind.
    """
    readable: dict[str, list[Row]] = {kind.name: [] for kind in kinds}
    by_name = {kind.name: kind for kind in kinds}
    ignored: dict[str, int] = {}
    for row in tracked(rows, "predicting"):
        reason = _unreadable(by_name.get(row["kind"]), row)
        if reason:
            ignored[reason] = ignored.get(reason, 0) + 1
        else:
            readable[row["kind"]].append(row)
    scores = {
        name: score_kind(by_name[name], own, calibrate_rows=calibrate_rows)
        for name, own in tracked(list(readable.items()), "scoring")
        if own
    }
    return scores, ignored


def _unreadable(kind: Kind | None, row: Row) -> str | None:
    """Why a row cannot be scored; None when it can."""
    if kind is None:
        return f"kind {row['kind']!r} is not scored"
    try:
        kind.predict(row)
        kind.bound(row)
    except KeyError as error:
        raise ValueError(f"row {row['id']} of kind {row['kind']} lacks field {error}") from error
    except ValueError as error:
        return f"{row['kind']}: {error}"
    return None


def describe(scores: Mapping[str, Sequence[Score]], ignored: Mapping[str, int], rows: int) -> str:
    """Scores as text, percentages of the measured time."""
    lines = [
        "error = predicted / measured - 1, in percent of the measured time; rows never fitted",
        f"calibrated, constant MFU: {rows} rows per stack, drawn by seed {SEED} and not scored",
    ]
    for name, of_kind in scores.items():
        for score in of_kind:
            lines += _table(f"{name} / {score.stack}", score.errors, _left_out(score))
        if len(of_kind) > 1:
            lines += _table(f"{name}, all {len(of_kind)} stacks", pooled(of_kind), "")
    lines += ["", "mean (median) error by kind, all stacks"]
    lines.append(" " * 20 + "".join(f"{TITLES[name]:>18}" for name in PREDICTORS))
    for name, of_kind in scores.items():
        errors = pooled(of_kind)
        cells = (
            f"{100 * e.mean:.1f} ({100 * e.median:.1f})" if (e := errors.get(p)) else ""
            for p in PREDICTORS
        )
        lines.append(f"{name:<20}" + "".join(f"{cell:>18}" for cell in cells))
    for reason, count in ignored.items():
        lines.append(f"left aside, {count} rows: {reason}")
    return "\n".join(lines)


def _left_out(score: Score) -> str:
    parts = [f"{score.rows} rows: {score.fitted} fitted, {len(score.calibration)} for calibration"]
    if score.unpredicted:
        parts.append(f"{score.unpredicted} not predicted")
    if score.inside is not None:
        parts.append(f"{100 * score.inside:.0f} % inside the 90 % interval")
    return ", ".join(parts)


def _table(title: str, errors: Mapping[str, Errors], note: str) -> list[str]:
    lines = ["", title + (f"  ({note})" if note else "")]
    lines.append(f"  {'':<17}{'n':>5}{'mean':>9}{'median':>9}{'p90':>9}{'bias':>9}{'rank':>7}")
    for name in PREDICTORS:
        if name in errors:
            e = errors[name]
            rank = "" if e.rank is None else f"{e.rank:.3f}"
            lines.append(
                f"  {TITLES[name]:<17}{e.n:>5}{100 * e.mean:>9.1f}{100 * e.median:>9.1f}"
                f"{100 * e.p90:>9.1f}{100 * e.bias:>+9.1f}{rank:>7}"
            )
    return lines


def to_json(
    scores: Mapping[str, Sequence[Score]], ignored: Mapping[str, int], calibrate_rows: int
) -> dict[str, Any]:
    """Everything `describe` says, and the ids of calibration rows; errors as shares, not
    percent."""

    def plain(errors: Mapping[str, Errors]) -> dict[str, Any]:
        return {name: dataclasses.asdict(e) for name, e in errors.items()}

    return {
        "calibrate_rows": calibrate_rows,
        "seed": SEED,
        "kinds": {
            name: {
                "all": plain(pooled(of_kind)),
                "stacks": {
                    score.stack: {
                        "rows": score.rows,
                        "fitted": score.fitted,
                        "unpredicted": score.unpredicted,
                        "calibration": list(score.calibration),
                        "inside_interval": score.inside,
                        "errors": plain(score.errors),
                    }
                    for score in of_kind
                },
            }
            for name, of_kind in scores.items()
        },
        "left_aside": dict(ignored),
    }


if __name__ == "__main__":
    main()
