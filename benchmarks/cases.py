"""The predictor scored on measured cases, beside its baselines, as committed figures:

python -m benchmarks.cases ../shared/data/measured
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks import record
from roofline.validate.__main__ import KINDS, read_cases, score_cases, to_json
from roofline.validate.score import SEED, Errors, Score, pooled

CALIBRATE_ROWS = 8
PREDICTORS = ("bound", "constant_mfu", "ours", "calibrated", "peer")


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """One figure to reach: a mean or median error of one predictor over the stacks of a kind."""

    kind: str
    stack: str
    """Words that the stack's name must all hold."""
    predictor: Literal["ours", "calibrated"] = "ours"
    most: float
    of: Literal["mean", "median"] = "mean"

    def errors(self, scores: Mapping[str, Sequence[Score]]) -> dict[str, Errors]:
        """Pooled over the stacks."""
        return pooled(
            [s for s in scores[self.kind] if all(w in s.stack for w in self.stack.split())]
        )


WANTED = (
    Wanted(kind="gemm", stack="h100", most=0.08),
    Wanted(kind="gemm", stack="a100", most=0.10),
    Wanted(kind="attention_prefill", stack="", most=0.14),
    Wanted(kind="attention_decode", stack="", most=0.12),
    *(
        Wanted(kind="collective", stack=f"h100 / {name} / 8 GPUs", most=most)
        for name, most in (
            ("all_gather", 0.06), ("reduce_scatter", 0.06), ("all_reduce", 0.06), ("alltoall", 0.12)
        )
    ),
    Wanted(kind="decode_step", stack="gpt-fast", most=0.10),
    Wanted(kind="serving_step", stack="", most=0.11, of="median"),
    Wanted(kind="serving_step", stack="", most=0.09, of="median", predictor="calibrated"),
    Wanted(kind="train_step", stack="Megatron-style", most=0.08, predictor="calibrated"),
    Wanted(kind="train_step", stack="llm-foundry", most=0.06, predictor="calibrated"),
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Write benchmarks/results/roofline_cases.json and .md."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cases", description=__doc__)
    parser.add_argument("cases", type=Path, help="folder of *.jsonl with one case per line")
    rows = read_cases(parser.parse_args(argv).cases)
    scores, ignored = score_cases(rows, KINDS, calibrate_rows=CALIBRATE_ROWS)
    content = {
        "provenance": record.provenance(timed=False),
        **to_json(scores, ignored, CALIBRATE_ROWS),
    }
    record.write("roofline_cases", content, describe(scores))


def describe(scores: Mapping[str, Sequence[Score]]) -> str:
    """The figures to reach, then every stack, in Markdown; errors in percent of the measured time."""
    lines = [
        "# Predictions scored on measured cases",
        "",
        "Error: |predicted / measured - 1| in percent, on rows that nothing was fitted on. Calibrated and "
        f"constant MFU: {CALIBRATE_ROWS} rows per stack (at most half of it), drawn by seed {SEED} and not "
        "scored. Peer: the prediction that comes with a row.",
        "",
        _wanted(scores),
        "",
        "Every stack: mean (median).",
        "",
        _stacks(scores),
    ]
    return "\n".join(lines)


def _wanted(scores: Mapping[str, Sequence[Score]]) -> str:
    head = ["figure", "wanted", *map(_title, PREDICTORS), "rows", "holds"]
    rows = []
    for one in WANTED:
        errors = {name: _size(e, one.of) for name, e in one.errors(scores).items()}
        name = " ".join(filter(None, (one.kind, one.stack.replace(" /", ","), one.of)))
        rows.append([
            f"{name}, {_title(one.predictor)}", f"{100 * one.most:.0f}",
            *(f"{100 * errors[p]:.1f}" if p in errors else "-" for p in PREDICTORS),
            str(one.errors(scores)[one.predictor].n),
            "yes" if errors[one.predictor] <= one.most else "no",
        ])  # fmt: skip
    return record.table(head, rows)


def _size(errors: Errors, of: Literal["mean", "median"]) -> float:
    return errors.median if of == "median" else errors.mean


def _stacks(scores: Mapping[str, Sequence[Score]]) -> str:
    head = ["stack", *map(_title, PREDICTORS), "rank", "inside 90 %", "rows"]
    rows = []
    for kind, of_kind in scores.items():
        for score in of_kind:
            cells = (
                f"{100 * e.mean:.1f} ({100 * e.median:.1f})" if (e := score.errors.get(p)) else "-"
                for p in PREDICTORS
            )
            ours = score.errors.get("ours")
            rank = "-" if ours is None or ours.rank is None else f"{ours.rank:.3f}"
            inside = "-" if score.inside is None else f"{100 * score.inside:.0f}"
            rows.append(
                [f"{kind}: {score.stack}", *cells, rank, inside, str(ours.n if ours else 0)]
            )
    return record.table(head, rows)


def _title(predictor: str) -> str:
    return predictor.replace("_", " ").replace("mfu", "MFU")


if __name__ == "__main__":
    main()
