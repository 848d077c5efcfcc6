"""Sums, differences and products of numbers with a fixed number of digits: "47+85=" -> "132".

Operands are zero-padded to `digits`, so that a digit's place in the prompt is its place value;
results are plain integers. With `worked`, a completion carries the columns from the right, a marker
and the result:

    47+85=  7+5=12,4+8+1=13;132       each column with the carry from the one before
    52-37=  12-7=5,5-3-1=1;15         each column with 10 borrowed where needed, 1 paid back
    37-52=  12-7=5,5-3-1=1;-15        the larger minus the smaller, then the sign
    47*85=  47*5=235,47*80=3760;3995  one product per digit of the second operand

(no spaces; shown after the prompt). Only what follows the marker is judged.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from functools import lru_cache

from jaxrl.config import TaskConfig
from jaxrl.errors import UserError
from jaxrl.tasks.base import Split, drawable, most_problems, problem_id, shuffled, split_of, uniform
from jaxrl.types import Problem, Reward

MARKER = ";"
"""Between a worked solution's columns and its result."""

_MOST_ENUMERATED = 100_000
"""Problem spaces up to this size are listed in full; larger ones are drawn from."""
_MOST_DIGITS = 9
"""Keeps a worked product under about 250 characters."""


class ArithmeticTask:
    """Reward 1 for exactly the right result and a stop token, else 0.

    Parts: `correct`; with `worked` also `format`, whether there was exactly one marker and a stop
    token.
    """

    name = "arithmetic"

    def __init__(self, config: TaskConfig, seed: int) -> None:
        """Raises: UserError for operators outside '+-*' or repeated, or digits outside 1..9."""
        operators = config.operators
        if not operators or set(operators) - set("+-*") or len(set(operators)) < len(operators):
            raise UserError(
                f"task.operators={operators!r} must hold one or more of '+', '-' and '*', each "
                "once; for example task.operators='+-'"
            )
        if not 1 <= config.digits <= _MOST_DIGITS:
            raise UserError(f"task.digits={config.digits} must lie in 1..{_MOST_DIGITS}; usual: 2")
        self._config = config
        self._seed = seed

    @property
    def chance_rate(self) -> float:
        """Mean over the operators of 1 / (number of integers from the least to the greatest
        result).
        """
        largest = 10**self._config.digits - 1
        spans = {"+": 2 * largest + 1, "-": 2 * largest + 1, "*": largest**2 + 1}
        return sum(1 / spans[op] for op in self._config.operators) / len(self._config.operators)

    @property
    def alphabet(self) -> str:
        """Digits, operators, '=', the minus sign of results, and the marks of worked solutions."""
        marks = "," + MARKER if self._config.worked else ""
        return "0123456789" + self._config.operators + "=" + marks

    def problems(self, split: Split) -> Sequence[Problem]:
        """Problems of a split, operators mixed evenly; mirrored sums and products share a split."""
        config = self._config
        return _problems(
            config.digits,
            config.operators,
            config.worked,
            self._seed,
            split,
            most_problems(config, split),
        )

    def verify(self, problem: Problem, completion: str, finished: bool) -> Reward:
        """Compare the text, or what follows its one marker, with the answer; unfinished: wrong."""
        if not self._config.worked:
            correct = finished and completion == problem.answer
            return Reward(
                total=float(correct), parts={"correct": float(correct)}, correct=correct,
                answer=completion if finished else "",
            )  # fmt: skip
        _, *results = completion.split(MARKER)
        formatted = finished and len(results) == 1
        correct = formatted and results[0] == problem.answer
        parts = {"correct": float(correct), "format": float(formatted)}
        answer = results[0] if formatted else ""
        return Reward(total=float(correct), parts=parts, correct=correct, answer=answer)


@lru_cache(maxsize=12)
def _problems(
    digits: int, operators: str, worked: bool, seed: int, split: Split, most: int
) -> tuple[Problem, ...]:
    """At most `most` problems of a split; the cache spares the three splits of one run a second
    listing.
    """
    space = len(operators) * 10 ** (2 * digits)
    if space <= _MOST_ENUMERATED:
        operands = range(10**digits)
        triples = itertools.product(operands, operators, operands)
        everything = (_problem(a, op, b, digits, worked) for a, op, b in triples)
        return tuple(shuffled((p for p in everything if split_of(p.id) == split), seed)[:most])
    found: dict[int, Problem] = {}
    draws = _draws(digits, operators, seed)
    while len(found) < min(most, drawable(space, split)):
        problem = _problem(*next(draws), digits, worked)
        if split_of(problem.id) == split:
            found[problem.id] = problem
    return tuple(found.values())


def _draws(digits: int, operators: str, seed: int) -> Iterator[tuple[int, str, int]]:
    rng = random.Random(seed)
    largest = 10**digits - 1
    while True:
        a, b = uniform(rng, 0, largest), uniform(rng, 0, largest)
        yield a, operators[uniform(rng, 0, len(operators) - 1)], b


def _problem(a: int, op: str, b: int, digits: int, worked: bool) -> Problem:
    prompt = f"{a:0{digits}d}{op}{b:0{digits}d}="
    twin = f"{b:0{digits}d}{op}{a:0{digits}d}="
    family = prompt if op == "-" else min(prompt, twin)
    answer = str(a + b if op == "+" else a - b if op == "-" else a * b)
    steps = ",".join(columns(a, op, b, digits)) + MARKER if worked else ""
    return Problem(
        id=problem_id(f"arithmetic {prompt}", f"arithmetic {family}"),
        prompt=prompt,
        answer=answer,
        solution=steps + answer,
    )


def columns(a: int, op: str, b: int, digits: int) -> list[str]:
    """The columns of a worked solution, lowest place first."""
    if op == "*":
        places = [(b // 10**i % 10) * 10**i for i in range(digits)]
        return [f"{a}*{place}={a * place}" for place in places]
    if op == "-":
        a, b = max(a, b), min(a, b)
    steps, carry = [], 0
    for i in range(digits):
        x, y = a // 10**i % 10, b // 10**i % 10
        carried = f"{op}1" if carry else ""
        if op == "+":
            result = x + y + carry
            steps.append(f"{x}+{y}{carried}={result}")
            carry = result // 10
        else:
            borrowed = x < y + carry
            x += 10 * borrowed
            steps.append(f"{x}-{y}{carried}={x - y - carry}")
            carry = int(borrowed)
    return steps
