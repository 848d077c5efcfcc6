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
LEAST_RANK = 0.9
"""Wanted correlation of predicted and measured order within one stack."""
RANKED_ROWS = 6
"""Stacks with fewer rows have no order to speak of."""
PREDICTORS = ("bound", "constant_mfu", "ours", "calibrated", "peer")


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """One figure to reach: a mean or median error of one predictor over the stacks of a kind."""

    kind: str
    stack: str
    """Parts, between " / ", that the stack's name must all hold."""
    predictor: Literal["ours", "calibrated"] = "ours"
    most: float
    of: Literal["mean", "median"] = "mean"

    def errors(self, scores: Mapping[str, Sequence[Score]]) -> dict[str, Errors]:
        """Pooled over the stacks."""
        parts = self.stack.split(" / ")
        return pooled([s for s in scores[self.kind] if all(part in s.stack for part in parts)])


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
    Wanted(kind="train_step", stack="Megatron-core", most=0.12),
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
        _ranking(scores),
        "",
        "Every stack: mean (median).",
        "",
        _stacks(scores),
    ]
    return "\n".join(lines)


def _wanted(scores: Mapping[str, Sequence[Score]]) -> str:
    head = ["figure", "wanted", *map(_title, PREDICTORS), "rows", "short by"]
    rows = []
    for one in WANTED:
        errors = one.errors(scores)
        sizes = {name: 100 * _size(e, one.of) for name, e in errors.items()}
        name = " ".join(filter(None, (one.kind, one.stack.replace(" /", ","), one.of)))
        measured = errors.get(one.predictor)
        short = None if measured is None else sizes[one.predictor] - 100 * one.most
        rows.append([
            f"{name}, {_title(one.predictor)}", f"{100 * one.most:.0f}",
            *(f"{sizes[p]:.1f}" if p in sizes else "-" for p in PREDICTORS),
            str(measured.n if measured else 0),
            "no rows" if short is None else f"{short:.1f}" if short > 0 else "holds",
        ])  # fmt: skip
    return record.table(head, rows)


def _ranking(scores: Mapping[str, Sequence[Score]]) -> str:
    """Which stacks are ordered worse than wanted."""
    ranks = [
        (errors.rank, f"{score.kind}: {score.stack} ({errors.rank:.3f}, {errors.n} rows)")
        for of_kind in scores.values()
        for score in of_kind
        if (errors := score.errors.get("ours")) and errors.rank is not None
        if errors.n >= RANKED_ROWS
    ]
    short = [name for rank, name in ranks if rank < LEAST_RANK]
    return (
        f"Rank correlation within one stack, wanted {LEAST_RANK}: {len(ranks) - len(short)} of "
        f"{len(ranks)} stacks of at least {RANKED_ROWS} rows hold; short: {'; '.join(short) or 'none'}."
    )


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
