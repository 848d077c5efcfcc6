"""`python -m jaxrl.score`: judge a file of answers with a verifier, in the processes that training uses.

python -m jaxrl.score --verifier math --cases answers.jsonl
python -m jaxrl.score --verifier my_rewards.py:score --cases rollouts.jsonl.gz --out scores.jsonl

Each line of the file is one JSON object: {"gold", "pred"} or {"prompt", "completion", "answer"}, and any
further fields, which the verifier sees as its row. Each line of the result is one object, in the same
order: row (line number, from 1), reward, correct, parts; for a row whose verifier failed reward is null and
error says why. A row that ran into the time limit has reward 0 and no parts.
"""

from __future__ import annotations

import gzip
import json
import sys
import time
import zlib
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import tyro
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from jaxrl.cli import user_errors
from jaxrl.config import TaskConfig
from jaxrl.errors import UserError
from jaxrl.rewards.pool import RewardPool, RewardStats, VerifierError
from jaxrl.rewards.verifiers import VerifierTask
from jaxrl.telemetry.progress import make_console
from jaxrl.types import Problem, Reward

_IN_FLIGHT = 256
"""Rows that are read ahead of the row to be written next."""
_ERRORS_SHOWN = 3
_COMPLETION_FIELDS = ("completion", "pred", "response")
_ANSWER_FIELDS = ("answer", "gold")
EXIT_ROW_ERRORS = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreArgs:
    """Judge the rows of a file with a verifier."""

    verifier: str
    """math, code, exact, or your own function: my_rewards.py:score or package.module:score."""
    cases: Path
    """JSON lines, also gzipped: {gold, pred} or {prompt, completion, answer}, with any further fields."""
    out: Path | None = None
    """Result, one line per row; default: the name of the cases with .scores.jsonl, in this folder."""
    workers: int = 2
    """Verifier processes."""
    timeout_s: float = 15.0
    """Longest a row may take [s]; past it the reward is 0."""
    debug: bool = False
    """Show the traceback of an error as well as its message."""


@dataclass(kw_only=True, slots=True)
class Outcome:
    """What the summary shows."""

    rows: int = 0
    """Rows of the file, those whose verifier failed included."""
    rewards: float = 0.0
    """Sum over the rows that were judged."""
    correct: int = 0
    parts: Counter[str] = field(default_factory=Counter)
    """Sums by name."""
    part_rows: Counter[str] = field(default_factory=Counter)
    """Rows that have a part, by name."""
    errors: list[str] = field(default_factory=list)
    """One text per row whose verifier failed."""
    labelled: int = 0
    """Judged rows with a field `expected`."""
    disagreements: list[int] = field(default_factory=list)
    """Line numbers of labelled rows where correct is not expected >= 1."""


def main(argv: Sequence[str] | None = None) -> None:
    """Read, judge, write, print; exit code 1 if the verifier failed on some row."""
    argv = sys.argv[1:] if argv is None else argv
    with user_errors(debug="--debug" in argv):
        args = tyro.cli(ScoreArgs, args=list(argv), prog="python -m jaxrl.score")
        out = args.out or Path(args.cases.name.split(".")[0] + ".scores.jsonl")
        console = make_console()
        start_s = time.perf_counter()
        outcome, stats = score_file(args, out, console)
        _print(outcome, stats, time.perf_counter() - start_s, out, console)
    if outcome.errors:
        raise SystemExit(EXIT_ROW_ERRORS)


def score_file(args: ScoreArgs, out: Path, console: Console) -> tuple[Outcome, RewardStats]:
    """Judge every row of `args.cases` and write `out`, in order.

    Raises: UserError for a file that cannot be read or written, a malformed row (with its line number), or
    a verifier that does not exist or cannot start.
    """
    if args.workers < 1:
        raise UserError(f"--workers={args.workers} must be at least 1; usual: one per core")
    if out.resolve() == args.cases.resolve():
        raise UserError(f"--out {out} would overwrite the cases; name another file")
    total = sum(1 for _ in _rows(args.cases))  # a malformed row is found before any is judged
    config = TaskConfig(verifier=args.verifier, reward_timeout_s=args.timeout_s)
    pool = RewardPool(config, 0, args.workers, args.timeout_s, 0.0, make=VerifierTask)
    outcome = Outcome()
    waiting: deque[tuple[int, Mapping[str, Any], Future[Reward]]] = deque()
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn())
    progress = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)
    with closing(pool):
        try:
            pool.wait_ready()
        except VerifierError as error:
            raise UserError(str(error)) from error
        with _opened(out) as file, progress:
            bar = progress.add_task("scoring", total=total)
            for number, row in _rows(args.cases):
                problem = _problem(number, row, args.verifier)
                waiting.append((number, row, pool.submit(problem, _completion(row), True)))
                if len(waiting) >= _IN_FLIGHT:
                    _write(file, outcome, *waiting.popleft())
                    progress.advance(bar)
            while waiting:
                _write(file, outcome, *waiting.popleft())
                progress.advance(bar)
        return outcome, pool.stats()


def _opened(out: Path) -> IO[str]:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        return out.open("w", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{out} cannot be written ({error.strerror}); name another file with --out=FILE"
        ) from error


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of each line that is not empty."""
    form = "write one JSON object per line: gold and pred, or prompt, completion and answer"
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, _row(line, f"{path}, line {number}", form)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"--cases {path} cannot be read: {error}; {form}") from error


def _row(line: str, where: str, form: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg}); {form}") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: a {type(row).__name__}; {form}")
    if not any(isinstance(row.get(name), str) for name in _COMPLETION_FIELDS):
        fields = ", ".join(_COMPLETION_FIELDS)
        raise UserError(f"{where}: no text in any of the fields {fields}; {form}")
    return row


def _completion(row: Mapping[str, Any]) -> str:
    return next(row[name] for name in _COMPLETION_FIELDS if isinstance(row.get(name), str))


def _problem(number: int, row: Mapping[str, Any], verifier: str) -> Problem:
    """The row as a problem whose `row` has `answer`, under whichever name the file gave it.

    For verifiers of texts a number is its text, as in training.
    """
    answer = next((row[name] for name in _ANSWER_FIELDS if row.get(name) is not None), None)
    if verifier in ("exact", "math") and type(answer) in (int, float):
        answer = str(answer)
    return Problem(
        id=number,
        prompt=str(row.get("prompt", "")),
        answer=str(answer),
        solution="",
        row={**row, "answer": answer},
    )


def _write(
    file: IO[str], outcome: Outcome, number: int, row: Mapping[str, Any], future: Future[Reward]
) -> None:
    """Wait for a verdict, write its line and count it."""
    outcome.rows += 1
    try:
        reward = future.result()
    except VerifierError as error:
        outcome.errors.append(f"line {number}: {error}")
        line = {"row": number, "reward": None, "correct": None, "parts": {}, "error": str(error)}
    else:
        outcome.rewards += reward.total
        outcome.correct += reward.correct
        outcome.parts.update(reward.parts)
        outcome.part_rows.update(reward.parts.keys())
        if isinstance(row.get("expected"), (bool, int, float)):
            outcome.labelled += 1
            if reward.correct != (row["expected"] >= 1):
                outcome.disagreements.append(number)
        line = {"row": number, "reward": reward.total, "correct": reward.correct}
        line["parts"] = dict(reward.parts)
    file.write(json.dumps(line) + "\n")


def _print(
    outcome: Outcome, stats: RewardStats, seconds: float, out: Path, console: Console
) -> None:
    judged = max(outcome.rows - len(outcome.errors), 1)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("rows", f"{outcome.rows} in {seconds:.1f} s, {outcome.rows / seconds:.0f} rows/s")
    table.add_row("reward", f"{outcome.rewards / judged:.4f} on average")
    table.add_row("correct", f"{outcome.correct} ({100 * outcome.correct / judged:.1f} %)")
    for name, total in sorted(outcome.parts.items()):
        table.add_row(f"  {name}", f"{total / outcome.part_rows[name]:.4f} on average")
    if outcome.labelled:
        same = outcome.labelled - len(outcome.disagreements)
        where = ", ".join(map(str, outcome.disagreements[:10]))
        share = f"{same} of {outcome.labelled} ({100 * same / outcome.labelled:.2f} %)"
        table.add_row("as expected", share + (f"; not on lines {where}" if where else ""))
    table.add_row("timeouts", str(stats.timeouts))
    table.add_row("errors", str(len(outcome.errors)))
    table.add_row("written to", str(out))
    console.print(table)
    for error in outcome.errors[:_ERRORS_SHOWN]:
        console.print(f"\n{error.rstrip()}", markup=False, style="red", soft_wrap=True)
    if len(outcome.errors) > _ERRORS_SHOWN:
        console.print(f"\n{len(outcome.errors) - _ERRORS_SHOWN} more errors are in {out}")


if __name__ == "__main__":
    main()
