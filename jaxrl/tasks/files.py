"""Tasks whose problems come from a file or a data set, and whose verifier has a name.

    path alone            a problem's hash decides: 80 % train, 10 % validation, 10 % test
    path and test_path    test_path is the test split; the rest of path: 90 % train, 10 % validation

The hash is of the problem itself, not of the prompt made from it, of the file or of the seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from jaxrl.config import TaskConfig
from jaxrl.errors import UserError
from jaxrl.rewards.combine import Magistral
from jaxrl.rewards.verifiers import configured, score_exact
from jaxrl.tasks.base import Split, most_problems, problem_id, shuffled, split_of
from jaxrl.tasks.rows import Row, check_source, read_rows
from jaxrl.types import Problem, Reward


@dataclass(frozen=True, kw_only=True, slots=True)
class Parsed:
    """One row, understood."""

    problem: str
    answer: str = ""
    solution: str = ""
    """A worked solution, empty where there is none."""
    row: Row
    """What the verifier reads."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """How the rows of a task look."""

    name: str
    parse: Callable[[Row, str, str], Parsed]
    """Row, where it stands, name of the verifier -> problem. Raises UserError for a row it cannot use."""
    template: str
    """The prompt, with {problem} in it."""
    verifiers: tuple[str, ...] = ("math", "exact")
    """Built-in verifiers that can judge it; functions of the user's own always can."""
    from_scratch: bool = False
    """A model of characters can learn it."""


class FileTask:
    """Reward 1 for exactly the answer and a stop token, else 0. Part: `correct`."""

    def __init__(self, config: TaskConfig, seed: int, form: Form) -> None:
        """The file is read when problems are first asked for; verifying does not need it.

        Raises: UserError if no file is named or it does not exist.
        """
        self.name = form.name
        if config.path is None:
            raise UserError(
                f"task.name={form.name} needs problems; set task.path to a file of one JSON object per "
                "line, to a parquet file, or to owner/name:split of the hub"
            )
        if (name := config.judge or "") not in form.verifiers and ":" not in name:
            raise UserError(
                f"task.verifier={name} cannot judge task {form.name}; use {' or '.join(form.verifiers)}, "
                "or a function of your own: my_rewards.py:score"
            )
        check_source("task.path", config.path)
        if config.test_path is not None:
            check_source("task.test_path", config.test_path)
        self._config, self._path, self._seed, self._form = config, config.path, seed, form
        self.num_repeated = 0
        """Rows left out because an earlier one is the same problem; known once problems were asked for."""
        self._shaping = None
        if config.shaping.kind == "magistral":
            self._shaping = Magistral(config, config.prompt_template or form.template)

    @property
    def chance_rate(self) -> float:
        """1 / (number of different answers); 0 where the answers are tests."""
        answers = {p.answer for split in self._splits.values() for p in split} - {""}
        return 1 / len(answers) if answers else 0.0

    @property
    def alphabet(self) -> str | None:
        """Every character of prompts, answers and solutions, for tasks that a model can learn from
        scratch.
        """
        return self._characters if self._form.from_scratch else None

    @cached_property
    def _characters(self) -> str:
        problems = [problem for split in self._splits.values() for problem in split]
        return "".join(sorted({c for p in problems for c in p.prompt + p.answer + p.solution}))

    @cached_property
    def _splits(self) -> dict[Split, list[Problem]]:
        """All problems that are short enough, by split."""
        problems, test_path = self._read(self._path), self._config.test_path
        splits: dict[Split, list[Problem]] = {"train": [], "validation": [], "test": []}
        if test_path is None:
            for problem in problems:
                splits[split_of(problem.id)].append(problem)
        else:
            splits["test"] = self._read(test_path)
            held_out = {problem.id for problem in splits["test"]}
            for problem in problems:
                if problem.id not in held_out:
                    inner = split_of(problem.id) == "validation"
                    splits["validation" if inner else "train"].append(problem)
        most = self._config.max_chars
        if most > 0:
            for name, problems in splits.items():
                splits[name] = [p for p in problems if max(len(p.prompt), len(p.solution)) <= most]
        return splits

    def problems(self, split: Split) -> Sequence[Problem]:
        """Problems of a split. Raises: UserError for a malformed file, or one that leaves the split
        empty.
        """
        chosen = self._splits[split]
        if not chosen:
            known = ", ".join(f"{len(p)} {name}" for name, p in self._splits.items())
            raise UserError(
                f"{self._path}: none of its problems falls into the {split} split ({known}; by hash of "
                f"the problem; task.max_chars={self._config.max_chars}); add more lines, about 50 or more"
            )
        return shuffled(chosen, self._seed)[: most_problems(self._config, split)]

    def verify(self, problem: Problem, completion: str, finished: bool) -> Reward:
        """Compare stripped texts; unfinished is wrong."""
        return _unless_cut(score_exact(problem.prompt, completion, problem.row), finished)

    def shape(self, problem: Problem, completion: str, num_tokens: int, verdict: Reward) -> Reward:
        """The verdict, combined as task.shaping says; see jaxrl.tasks.base.ShapedTask."""
        if self._shaping is None:
            return verdict
        return self._shaping(problem.prompt, completion, num_tokens, verdict)

    def _read(self, source: Path) -> list[Problem]:
        """Problems in the order of the file; one that stands there again is left out and counted.

        Raises: UserError naming file, line, fault and remedy.
        """
        found: dict[int, tuple[Problem, str]] = {}
        for where, row in read_rows(source):
            problem = self._problem(row, where)
            first, place = found.setdefault(problem.id, (problem, where))
            if place == where:
                continue
            if self._judged_by(first) != self._judged_by(problem):
                raise UserError(
                    f"{where} repeats the prompt of {place.rpartition(', ')[2]}, but is judged by "
                    "something else; remove one of them"
                )
            self.num_repeated += 1
        if not found:
            raise UserError(f"{source} holds no problem; write one JSON object per line")
        return [problem for problem, _ in found.values()]

    def _judged_by(self, problem: Problem) -> object:
        """What the verifier reads: the answer, or for those that read more the whole row."""
        return problem.answer if self._config.judge in ("exact", "math") else problem.row

    def _problem(self, row: Row, where: str) -> Problem:
        parsed = self._form.parse(row, where, self._config.judge or "")
        template = self._config.prompt_template or self._form.template
        return Problem(
            id=problem_id(f"{self.name} {parsed.problem}"),
            prompt=template.replace("{problem}", parsed.problem),
            answer=parsed.answer,
            solution=parsed.solution,
            row=parsed.row,
        )


class JudgedFileTask(FileTask):
    """Reward and parts of the configured verifier, in verifier processes.

    A built-in verifier's reward is 0 for a completion that the length limit cut off; similarity, which
    has less than 0 for a wrong form, and a function of the user's own judge it as any other.
    """

    def __init__(self, config: TaskConfig, seed: int, form: Form) -> None:
        """Raises: as FileTask; UserError if there is no such verifier."""
        super().__init__(config, seed, form)
        name = config.judge or ""
        self._verifier = configured(config, name)
        self._judges_cut = ":" in name or name == "similarity"

    def load_verifier(self) -> None:
        """Make `verify` ready; see jaxrl.tasks.base.IsolatedTask."""
        self._verifier.load()

    def verify(self, problem: Problem, completion: str, finished: bool) -> Reward:
        """Judge with the verifier."""
        reward = self._verifier(problem.prompt, completion, problem.row)
        return _unless_cut(reward, finished or self._judges_cut)


def _unless_cut(reward: Reward, finished: bool) -> Reward:
    if finished:
        return reward
    return Reward(total=0.0, parts={**reward.parts, "correct": 0.0}, correct=False)


def answer_text(row: Row, where: str) -> str:
    """The row's `answer` as a text; a number counts as one. Raises: as `text`."""
    answer = row.get("answer")
    if isinstance(answer, int | float) and not isinstance(answer, bool) and math.isfinite(answer):
        return str(answer)
    return text(row, ("answer",), where)


def text(row: Row, keys: Sequence[str], where: str) -> str:
    """The first of the fields `keys` that the row has, a text with content; null is as good as absent.

    Raises: UserError naming the place if there is none, or it holds something else.
    """
    key = next((key for key in keys if row.get(key) is not None), None)
    if key is None:
        raise UserError(
            f"{where}: {keys[0]!r} is missing; the row has the fields {', '.join(map(str, row))}"
        )
    if not isinstance(row[key], str) or not row[key].strip():
        raise UserError(f"{where}: {key!r} is {row[key]!r:.80}, not a text with content")
    return row[key]
