"""Countdown: reach the target from the given numbers, each used exactly once (the rule of
TinyZero).

    3 5 7=38:  ->  3+5*7

Allowed are + - * /, parentheses, and one space between all tokens or between none; intermediate
results may be negative or fractions. Everything else (unary signs, powers, other digits, leading
zeros, text around the expression, division by zero, brackets more than 16 deep) is no expression
and gets 0. The parser is the module's own: nothing that a model writes is ever evaluated by Python.
"""

from __future__ import annotations

import operator
import random
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache

from jaxrl.config import TaskConfig
from jaxrl.errors import UserError
from jaxrl.tasks.base import Split, most_problems, problem_id, split_of, uniform
from jaxrl.types import Problem, Reward

_LARGEST_NUMBER = 20
_LARGEST_TARGET = 99
_NUMBERS = (2, 6)
"""Fewest and most given numbers."""
_MOST_FRUITLESS_DRAWS = 20_000
"""Draws in a row without a new problem after which a split counts as exhausted."""
_GUESSES = 20_000
"""Guesses behind chance_rate: its standard error is sqrt(rate / 20000), 0.0007 at a rate of 0.01.
"""
_MOST_CHARACTERS = 200
_MOST_DEPTH = 16
_OPERATIONS: dict[str, Callable[[Fraction, Fraction], Fraction]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}
_TOKEN = re.compile(r"0|[1-9][0-9]{0,5}|[-+*/()]")


class CountdownTask:
    """Reward 1 for an expression that uses each number exactly once and hits the target, else 0.

    Parts: `correct`; `format`, a finished expression with exactly the given numbers and some value.
    """

    name = "countdown"
    alphabet = "0123456789 =:+-*/()"

    def __init__(self, config: TaskConfig, seed: int) -> None:
        """Raises: UserError unless task.numbers lies in 2..6."""
        fewest, most = _NUMBERS
        if not fewest <= config.numbers <= most:
            raise UserError(
                f"task.numbers={config.numbers} must lie in {fewest}..{most}; usual: 3 or 4"
            )
        self._config = config
        self._seed = seed

    @property
    def chance_rate(self) -> float:
        """Share of guesses that hit: random order, operators and brackets, each number once.

        Estimated from 20 000 guesses on the test split, always the same ones.
        """
        config = self._config
        return _chance_rate(config.numbers, self._seed, most_problems(config, "test"))

    def problems(self, split: Split) -> Sequence[Problem]:
        """Problems of a split: numbers 1..20 in ascending order, target 1..99."""
        return _problems(
            self._config.numbers, self._seed, split, most_problems(self._config, split)
        )

    def verify(self, problem: Problem, completion: str, finished: bool) -> Reward:
        """Parse and evaluate the completion with exact fractions; unfinished is wrong."""
        numbers, target = given(problem.prompt)
        value = value_of(completion, numbers) if finished else None
        formatted, correct = value is not None, value == target
        parts = {"correct": float(correct), "format": float(formatted)}
        return Reward(total=float(correct), parts=parts, correct=correct)


def given(prompt: str) -> tuple[tuple[int, ...], int]:
    """The numbers, ascending, and the target of a prompt such as "3 5 7=38:"."""
    numbers, target = prompt.removesuffix(":").split("=")
    return tuple(sorted(int(n) for n in numbers.split(" "))), int(target)


def value_of(text: str, numbers: tuple[int, ...]) -> Fraction | None:
    """Value of an expression that uses each of `numbers` (ascending) once; None if it is none.

    The numbers are compared before anything is computed, so that values and work stay small.
    """
    if len(text) > _MOST_CHARACTERS:
        return None
    tokens = _TOKEN.findall(text)
    if " ".join(tokens) != text and "".join(tokens) != text:
        return None
    if sorted(int(token) for token in tokens if token.isdigit()) != list(numbers):
        return None
    try:
        return _Parser(tokens).value()
    except (_NoExpression, ZeroDivisionError):
        return None


class _NoExpression(Exception):
    """The tokens are no expression of the grammar."""


class _Parser:
    """Recursive descent: sum = product (+|- product)*; product = atom (*|/ atom)*; atom = number |
    (sum).
    """

    def __init__(self, tokens: list[str]) -> None:
        self._tokens = tokens
        self._at = 0
        self._depth = 0

    def value(self) -> Fraction:
        value = self._sum()
        if self._at != len(self._tokens):
            raise _NoExpression
        return value

    def _accept(self, choices: str) -> str | None:
        token = self._tokens[self._at] if self._at < len(self._tokens) else ""
        if not token or token not in choices:
            return None
        self._at += 1
        return token

    def _sum(self) -> Fraction:
        value = self._product()
        while symbol := self._accept("+-"):
            value = _OPERATIONS[symbol](value, self._product())
        return value

    def _product(self) -> Fraction:
        value = self._atom()
        while symbol := self._accept("*/"):
            value = _OPERATIONS[symbol](value, self._atom())
        return value

    def _atom(self) -> Fraction:
        if self._accept("("):
            self._depth += 1
            if self._depth > _MOST_DEPTH:
                raise _NoExpression
            value = self._sum()
            if not self._accept(")"):
                raise _NoExpression
            self._depth -= 1
            return value
        if self._at == len(self._tokens) or not self._tokens[self._at].isdigit():
            raise _NoExpression
        self._at += 1
        return Fraction(int(self._tokens[self._at - 1]))


@lru_cache(maxsize=12)
def _problems(count: int, seed: int, split: Split, most: int) -> tuple[Problem, ...]:
    rng = random.Random(seed)
    found: dict[int, Problem] = {}
    fruitless = 0
    while len(found) < most and fruitless < _MOST_FRUITLESS_DRAWS:
        fruitless += 1
        problem = _draw(rng, count)
        if problem and problem.id not in found and split_of(problem.id) == split:
            found[problem.id] = problem
            fruitless = 0
    return tuple(found.values())


def _draw(rng: random.Random, count: int) -> Problem | None:
    """A problem whose solution has positive integers throughout; None if the draw has none."""
    numbers = sorted(uniform(rng, 1, _LARGEST_NUMBER) for _ in range(count))
    terms = [(n, str(n), "") for n in numbers]  # value, text, outermost symbol
    while len(terms) > 1:
        left = terms.pop(uniform(rng, 0, len(terms) - 1))
        right = terms.pop(uniform(rng, 0, len(terms) - 1))
        joined = _join(left, "+-*/"[uniform(rng, 0, 3)], right)
        if joined is None:
            return None
        terms.append(joined)
    (target, solution, _), prompt_numbers = terms[0], " ".join(str(n) for n in numbers)
    if target > _LARGEST_TARGET:
        return None
    prompt = f"{prompt_numbers}={target}:"
    identity = problem_id(f"countdown {prompt}")
    return Problem(id=identity, prompt=prompt, answer=str(target), solution=solution)


_Term = tuple[int, str, str]


def _join(left: _Term, symbol: str, right: _Term) -> _Term | None:
    """`left symbol right` with the fewest brackets; None unless the value is a positive integer."""
    (a, a_text, a_outer), (b, b_text, b_outer) = left, right
    if (symbol == "-" and a <= b) or (symbol == "/" and a % b):
        return None
    value = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[symbol]
    if symbol in "*/" and a_outer in ("+", "-"):
        a_text = f"({a_text})"
    weaker = {"+": "", "-": "+-", "*": "+-", "/": "+-*/"}[symbol]
    if b_outer and b_outer in weaker:
        b_text = f"({b_text})"
    return value, f"{a_text}{symbol}{b_text}", symbol


@lru_cache(maxsize=4)
def _chance_rate(count: int, seed: int, most: int) -> float:
    problems = _problems(count, seed, "test", max(most, 1))
    rng = random.Random(0)
    hits = 0
    for guess in range(_GUESSES):
        numbers, target = given(problems[guess % len(problems)].prompt)
        hits += _guess(rng, [Fraction(n) for n in numbers]) == target
    return hits / _GUESSES


def _guess(rng: random.Random, terms: list[Fraction]) -> Fraction | None:
    """Value of a random expression over the terms; None for a division by zero."""
    terms = list(terms)
    while len(terms) > 1:
        a = terms.pop(uniform(rng, 0, len(terms) - 1))
        b = terms.pop(uniform(rng, 0, len(terms) - 1))
        symbol = "+-*/"[uniform(rng, 0, 3)]
        if symbol == "/" and not b:
            return None
        terms.append(_OPERATIONS[symbol](a, b))
    return terms[0]
