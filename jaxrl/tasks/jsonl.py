"""Problems from a file of your own, one JSON object per line.

    {"prompt": "2+2=", "answer": "4"}
    {"prompt": "capital of France?", "answer": "Paris", "solution": "Paris"}

A completion is right when, stripped of white space at both ends, it equals the answer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from jaxrl.config import TaskConfig
from jaxrl.errors import UserError
from jaxrl.tasks.base import Split, most_problems, problem_id, shuffled, split_of
from jaxrl.types import Problem, Reward

_REQUIRED = ("prompt", "answer")
_OPTIONAL = ("solution",)


class JsonlTask:
    """Reward 1 for exactly the answer and a stop token, else 0. Part: `correct`."""

    name = "jsonl"

    def __init__(self, config: TaskConfig, seed: int) -> None:
        """The file is read when problems are first asked for; verifying does not need it.

        Raises: UserError if no file is named or it does not exist.
        """
        if config.path is None:
            raise UserError(
                "task.name=jsonl needs a file; set task.path to one JSON object per line"
            )
        if not config.path.is_file():
            raise UserError(f"task.path={config.path} is no file; give the path of an existing one")
        self._config = config
        self._path = config.path
        self._seed = seed

    @cached_property
    def _all(self) -> tuple[Problem, ...]:
        return read_problems(self._path)

    @property
    def chance_rate(self) -> float:
        """1 / (number of different answers in the file)."""
        return 1 / len({problem.answer for problem in self._all})

    @property
    def alphabet(self) -> str:
        """Every character of the file's prompts, answers and solutions."""
        return self._characters

    @cached_property
    def _characters(self) -> str:
        return "".join(sorted({c for p in self._all for c in p.prompt + p.answer + p.solution}))

    def problems(self, split: Split) -> Sequence[Problem]:
        """Problems of a split. Raises: UserError for a malformed file, or one that leaves the split
        empty.
        """
        chosen = [problem for problem in self._all if split_of(problem.id) == split]
        if not chosen:
            raise UserError(
                f"{self._path}: none of its {len(self._all)} problems falls into the {split} split "
                "(80/10/10, by hash of the prompt); add more lines, about 50 or more"
            )
        return shuffled(chosen, self._seed)[: most_problems(self._config, split)]

    def verify(self, problem: Problem, completion: str, finished: bool) -> Reward:
        """Compare stripped texts; unfinished is wrong."""
        correct = finished and completion.strip() == problem.answer.strip()
        return Reward(total=float(correct), parts={"correct": float(correct)}, correct=correct)


def read_problems(path: Path) -> tuple[Problem, ...]:
    """All problems of a file in its order; empty lines are skipped.

    Raises: UserError naming file, line, what is wrong and the remedy.
    """
    problems: list[Problem] = []
    lines: dict[str, int] = {}
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        problem = _problem(line, f"{path}, line {number}")
        if problem.prompt in lines:
            raise UserError(
                f"{path}, line {number} repeats the prompt of line {lines[problem.prompt]}; "
                "remove one of them"
            )
        lines[problem.prompt] = number
        problems.append(problem)
    if not problems:
        raise UserError(f"{path} holds no problem; write one JSON object per line: prompt, answer")
    return tuple(problems)


def _problem(line: str, where: str) -> Problem:
    form = 'write {"prompt": "...", "answer": "..."} and, if wanted, "solution"'
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}, column {error.colno}: not JSON ({error.msg}); {form}") from error
    if not isinstance(record, dict):
        raise UserError(f"{where}: a JSON {type(record).__name__} instead of an object; {form}")
    if missing := [key for key in _REQUIRED if key not in record]:
        raise UserError(f"{where}: {missing[0]!r} is missing; {form}")
    if unknown := sorted(set(record) - set(_REQUIRED) - set(_OPTIONAL)):
        raise UserError(f"{where}: unknown field {unknown[0]!r}; {form}")
    for key, value in record.items():
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{where}: {key!r} is {value!r}, not a text with content; {form}")
    solution = record.get("solution", record["answer"])
    if solution.strip() != record["answer"].strip():
        raise UserError(
            f"{where}: the solution is not the answer, so the verifier (exact match of stripped "
            "text) would reject it; make them equal or drop the solution"
        )
    return Problem(
        id=problem_id(f"jsonl {record['prompt']}"),
        prompt=record["prompt"],
        answer=record["answer"],
        solution=solution,
    )
