"""What samples of a problem say about it, and the log in which `jaxrl.curate` keeps that.

The first line of a log says what makes two starts the same; every other is the grade of one problem.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxrl.cli import config_of_tree, plain
from jaxrl.config import Config
from jaxrl.errors import UserError
from jaxrl.tasks.base import stable_hash
from jaxrl.telemetry.jsonl import dump_line, read_records
from jaxrl.types import Problem, Reward

KEPT, WRONG_LABEL, UNSOLVED, EASY = (
    "kept", "majority disagrees with the label", "never solved", "nearly always solved",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Grade:
    """What k samples of one problem say. Answers as the verifier reads them; empty: there was none."""

    id: int
    samples: int
    correct: int
    truncated: int
    """Completions cut off by the limit."""
    majority: str
    votes: int
    majority_correct: bool


def graded(problem_id: int, rewards: Sequence[Reward], truncated: int) -> Grade:
    """The counts of one problem; the first seen of several most frequent answers is the majority."""
    answers = Counter(reward.answer for reward in rewards if reward.answer)
    majority, votes = answers.most_common(1)[0] if answers else ("", 0)
    return Grade(
        id=problem_id, samples=len(rewards), correct=sum(r.correct for r in rewards),
        truncated=truncated, majority=majority, votes=votes,
        majority_correct=any(r.correct for r in rewards if majority and r.answer == majority),
    )  # fmt: skip


def decide(grade: Grade, *, min_correct: int, max_share: float, majority_share: float) -> str:
    """KEPT, or why the problem is dropped. The label is doubted first: its pass rate means nothing then."""
    if not grade.majority_correct and 0 < majority_share * grade.samples <= grade.votes:
        return WRONG_LABEL
    if grade.correct < min_correct:
        return UNSOLVED
    return EASY if grade.correct > max_share * grade.samples else KEPT


def header_of(
    config: Config, weights: str, problems: Sequence[Problem], samples: int
) -> dict[str, Any]:
    """What makes two starts the same; the first line of the log."""
    return {
        "task": plain(dataclasses.asdict(config.task)),
        "problems": _fingerprint(problems),
        "weights": weights,
        "samples": samples,
        "temperature": config.eval.temperature,
        "max_new_tokens": config.rollout.max_new_tokens,
        "seed": config.run.seed,
    }


def _fingerprint(problems: Sequence[Problem]) -> int:
    return stable_hash(" ".join(str(problem.id) for problem in problems))


def _first_header(log: Path) -> dict[str, Any]:
    """First line of an earlier pass's log."""
    header = next(iter(read_records(log)), {}) if log.is_file() else {}
    if not {"task", "problems", "seed"} <= set(header):
        raise UserError(
            f"--first-pass {log} is no log of an earlier pass; give its OUT.graded.jsonl"
        )
    return header


def with_task_of(config: Config, log: Path) -> Config:
    """The configuration with the task of an earlier pass, and the seed that chose its problems."""
    header = _first_header(log)
    return config_of_tree({"task": header["task"], "run": {"seed": header["seed"]}}, log, config)


def first_grades(log: Path, problems: Sequence[Problem]) -> dict[int, Grade]:
    """The first pass's grades of the problems that are now to be graded.

    Raises: UserError if they are others, or it did not get to the end.
    """
    if _first_header(log)["problems"] != _fingerprint(problems):
        raise UserError(
            f"--first-pass {log} graded other problems than these {len(problems)}; give the --split that it "
            "had, and restore its task's file if that has changed"
        )
    grades = read_grades(log, None)
    if missing := sum(problem.id not in grades for problem in problems):
        raise UserError(
            f"--first-pass {log} lacks {missing} of {len(problems)} problems; start that pass again, it "
            "goes on where it stopped"
        )
    return grades


def read_grades(log: Path, header: Mapping[str, Any] | None) -> dict[int, Grade]:
    """Grades in a log by problem; a torn last line is cut off. None for a header accepts any.

    Raises: UserError if the log belongs to other problems, weights or settings, or is no log.
    """
    records = [*read_records(log)]
    if not records:
        log.unlink(missing_ok=True)
        return {}
    if header is not None and (differing := _differing(records[0], header)):
        key, stored, here = differing[0]
        step = " name the run's step with --checkpoint," if key == "weights" else ""
        raise UserError(
            f"{log} was made with {key}={stored}, but this start has {key}={here};{step} choose another "
            "--out, or remove that file"
        )
    if header is not None:
        partial = log.with_name(log.name + ".partial")
        partial.write_text("".join(map(dump_line, records)), encoding="utf-8")
        partial.replace(log)
    try:
        return {record["id"]: Grade(**record) for record in records[1:]}
    except (KeyError, TypeError) as error:
        raise UserError(f"{log} is no log of jaxrl.curate ({error}); remove it") from error


def _differing(
    stored: Mapping[str, Any], here: Mapping[str, Any]
) -> list[tuple[str, object, object]]:
    """(name, stored, now) of what is not the same; how verifier processes run does not count."""
    one, two = _flat(stored), _flat(here)
    return [
        (name, one.get(name), value)
        for name, value in two.items()
        if one.get(name) != value and not name.startswith("task.reward_")
    ]


def _flat(header: Mapping[str, Any]) -> dict[str, Any]:
    of_task = {f"task.{name}": value for name, value in header.get("task", {}).items()}
    return of_task | {name: value for name, value in header.items() if name != "task"}


def grade_record(grade: Grade) -> dict[str, Any]:
    """The grade as a line of the log."""
    return {name: getattr(grade, name) for name in Grade.__slots__}
