"""Countdown: the parser agrees with Python on what it accepts, and quickly rejects all else."""

import ast
import random
import re
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl.config import TaskConfig
from jaxrl.errors import UserError
from jaxrl.tasks.countdown import CountdownTask, value_of
from jaxrl.types import Problem

TASK = CountdownTask(TaskConfig(name="countdown", num_train=1000, num_eval=100), seed=0)
PROBLEM = Problem(id=0, prompt="3 5 7=38:", answer="38", solution="3+5*7")
QUICK_S = 0.1
"""Every verdict takes well under a millisecond; the bound leaves room for a busy machine."""


def _reward(completion: str, finished: bool = True) -> float:
    start_s = time.perf_counter()
    reward = TASK.verify(PROBLEM, completion, finished)
    assert time.perf_counter() - start_s < QUICK_S
    assert reward.total == float(reward.correct) == reward.parts["correct"]
    return reward.total


@pytest.mark.parametrize(
    "completion",
    ["3+5*7", "5*7+3", "7*5+3", "(5*7)+3", "3+(5*7)", "((3))+5*7", "3 + 5 * 7", "( 5 * 7 ) + 3"],
)
def test_equal_expressions_are_accepted(completion: str):
    assert _reward(completion) == 1.0
    assert _reward(completion, finished=False) == 0.0


@pytest.mark.parametrize(
    "completion",
    [
        "", " ", "38", "3+5*7=38", "=38", "3+5*7 ", " 3+5*7", "3+5*7\n", "3 +5*7", "3  + 5 * 7",
        "3+5*7;", "3+5*7#", "the answer is 3+5*7", "`3+5*7`", "3+5*7 or 7*5+3", "38:3+5*7",
    ],
)  # fmt: skip
def test_text_around_an_expression_is_rejected(completion: str):
    assert _reward(completion) == 0.0


@pytest.mark.parametrize(
    "completion",
    [
        "5*7", "35+3", "3+5*7+3-3", "3+5*7+0", "3+5*7*1", "7*5+3+5-5", "40-2", "57-19", "33+5",
        "3+5*7-0", "(3+5*7)*(5-5+1)",
    ],
)  # fmt: skip
def test_missing_extra_or_joined_numbers_are_rejected(completion: str):
    assert _reward(completion) == 0.0


@pytest.mark.parametrize(
    "completion",
    [
        "+3+5*7", "-3+5*7", "3--5*7", "3-(-5*7)", "3+-5*7", "5*7+(+3)", "3+5**7", "7//5+3", "3+5%7",
        "3+5x7", "3+5×7", "3+5·7", "3−5*7", "3^5*7", "3e0+5*7", "3.0+5*7", "03+5*7", "3_+5*7", "+",
        "-", "*", "()", "()3+5*7", "3+5*7()", "(3+5*7", "3+5*7)", ")3+5*7(", "3+5*", "3 5 7", "357",
        "3(5*7)", "(3+)5*7", "3+5,7", "3+5*7j", "int(3)+5*7", "__import__('os')", "3 if 5 else 7",
        "3;5;7", "3|5&7", "3<<5-7", "~3+5*7", "lambda:3+5*7", "max(3,5*7)", "3+5*7#", "'3'+5*7",
        "0x3+5*7", "3+5*7\x00",
    ],
)  # fmt: skip
def test_anything_outside_the_grammar_is_rejected(completion: str):
    assert _reward(completion) == 0.0
    assert TASK.verify(PROBLEM, completion, True).parts["format"] == 0.0


@pytest.mark.parametrize("completion", ["3+5*7", "３+５*７", "٣+٥*٧", "𝟑+𝟓*𝟕", "³+⁵*⁷", "三+五*七"])
def test_only_ascii_digits_are_digits(completion: str):
    assert _reward(completion) == float(completion.isascii())


@pytest.mark.parametrize("completion", ["3/(5-5)", "3/(5-7+2)", "(3+5)/(7-7)", "3/0"])
def test_division_by_zero_is_no_value(completion: str):
    assert _reward(completion) == 0.0
    assert value_of("5/(3-3)", (3, 3, 5)) is None


@pytest.mark.parametrize(
    "completion",
    [
        "(" * 10_000 + "3+5*7" + ")" * 10_000, "(" * 90 + "3+5*7" + ")" * 90, "(" * 1_000_000,
        "3+5*7" + "+3" * 100_000, "9" * 1_000_000, "3+5*7" + " " * 1_000_000, "-" * 1_000_000,
        "9**9**9**9", "3" + "*9999999999" * 15, "1/3" * 60, "((" * 95 + "3", ")" * 200, "3*" * 99,
    ],
)  # fmt: skip
def test_huge_and_deep_expressions_are_rejected_quickly(completion: str):
    assert _reward(completion) == 0.0


def test_nesting_is_accepted_to_the_stated_depth_and_no_further():
    assert _reward("(" * 16 + "3+5*7" + ")" * 16) == 1.0
    assert _reward("(" * 17 + "3+5*7" + ")" * 17) == 0.0


def test_fractions_are_exact():
    assert value_of("5/(1-1/7)*7", (1, 1, 5, 7, 7)) == Fraction(245, 6)
    assert value_of("8/(3-8/3)", (3, 3, 8, 8)) == 24  # no order of integers alone reaches 24
    assert value_of("1/3", (1, 3)) == Fraction(1, 3)


@st.composite
def expressions(draw: st.DrawFn) -> str:
    """Well-formed expressions over 1 to 6 numbers, some with more brackets than they need."""

    def build(size: int) -> str:
        if size == 1:
            text = str(draw(st.integers(1, 20)))
        else:
            left = draw(st.integers(1, size - 1))
            text = build(left) + draw(st.sampled_from("+-*/")) + build(size - left)
        return f"({text})" if draw(st.booleans()) else text

    return build(draw(st.integers(1, 6)))


@settings(max_examples=200, deadline=None)
@given(expressions())
def test_the_parser_agrees_with_python(text: str):
    numbers = tuple(sorted(int(n) for n in re.findall(r"\d+", text)))
    try:
        expected = eval(re.sub(r"(\d+)", r"Fraction(\1)", text))
    except ZeroDivisionError:
        expected = None
    assert value_of(text, numbers) == expected


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="357+-*/() .=", max_size=12))
def test_what_is_accepted_is_arithmetic_over_exactly_the_given_numbers(text: str):
    value = value_of(text, (3, 5, 7))
    if value is not None:
        assert sorted(re.findall(r"\d+", text)) == ["3", "5", "7"]
        assert "**" not in text
        assert "//" not in text
        assert eval(re.sub(r"(\d+)", r"Fraction(\1)", text)) == value


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=300))
def test_arbitrary_text_never_raises(text: str):
    _reward(text)


def test_problems_use_ascending_small_numbers_and_targets():
    for problem in TASK.problems("train"):
        numbers, target = problem.prompt.removesuffix(":").split("=")
        values = [int(n) for n in numbers.split(" ")]
        assert values == sorted(values)
        assert all(1 <= n <= 20 for n in values)
        assert 1 <= int(target) <= 99
        assert problem.answer == target


def test_solutions_carry_no_needless_brackets():
    """Dropping any innermost pair changes how the expression is read."""
    pairs = 0
    for problem in TASK.problems("train"):
        for pair in re.finditer(r"\(([^()]*)\)", problem.solution):
            pairs += 1
            bare = problem.solution[: pair.start()] + pair.group(1) + problem.solution[pair.end() :]
            assert ast.dump(ast.parse(bare)) != ast.dump(ast.parse(problem.solution))
    assert pairs > 50


def test_chance_rate_is_what_random_guesses_score():
    """Of two numbers 2/8 of guesses are a+b, 2/8 a*b, 1/8 each a-b, b-a, a/b and b/a."""
    task = CountdownTask(TaskConfig(name="countdown", numbers=2, num_eval=10_000), seed=0)
    shares = []
    for problem in task.problems("test"):
        numbers, target = problem.prompt.removesuffix(":").split("=")
        a, b = (Fraction(n) for n in numbers.split(" "))
        values = [a + b, a + b, a * b, a * b, a - b, b - a, a / b, b / a]
        shares.append(sum(value == int(target) for value in values) / 8)
    expected = sum(shares) / len(shares)
    # four standard errors of 20 000 guesses at a rate near 0.2
    assert abs(task.chance_rate - expected) < 4 * (0.2 * 0.8 / 20_000) ** 0.5


@pytest.mark.parametrize("numbers", [1, 0, 7])
def test_other_counts_of_numbers_are_refused(numbers: int):
    with pytest.raises(UserError, match=r"task\.numbers=.*2\.\.6"):
        CountdownTask(TaskConfig(name="countdown", numbers=numbers), seed=0)


def test_small_spaces_end_instead_of_searching_forever():
    task = CountdownTask(TaskConfig(name="countdown", numbers=2, num_train=10**6), seed=0)
    assert 300 < len(task.problems("train")) < 1000


def test_verifying_takes_no_state_from_one_item_to_the_next():
    rng = random.Random(0)
    texts = ["3+5*7", "(3+5*7", "3/(5-5)", "5*7", "((3+5)*7"] * 4
    rng.shuffle(texts)
    assert [_reward(text) for text in texts] == [float(text == "3+5*7") for text in texts]
