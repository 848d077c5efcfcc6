"""Sums: exact answers, worked columns, chance rate, refused settings."""

import re

import pytest

from jaxrl.config import TaskConfig
from jaxrl.errors import UserError
from jaxrl.tasks.arithmetic import ArithmeticTask, columns
from jaxrl.types import Problem


def _all(config: TaskConfig) -> list[Problem]:
    task = ArithmeticTask(config, seed=0)
    return [p for split in ("train", "validation", "test") for p in task.problems(split)]


@pytest.mark.parametrize("worked", [False, True])
def test_every_answer_of_the_whole_space_is_right(worked: bool):
    problems = _all(TaskConfig(operators="+-*", worked=worked, num_train=10**6, num_eval=10**6))
    assert len(problems) == 3 * 10**4
    for problem in problems:
        a, op, b = re.fullmatch(r"(\d\d)([-+*])(\d\d)=", problem.prompt).groups()  # type: ignore
        value = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[op]
        assert problem.answer == str(value)


@pytest.mark.parametrize(
    ("a", "op", "b", "digits", "expected"),
    [
        (47, "+", 85, 2, "7+5=12,4+8+1=13"),
        (99, "+", 99, 2, "9+9=18,9+9+1=19"),
        (52, "-", 37, 2, "12-7=5,5-3-1=1"),
        (37, "-", 52, 2, "12-7=5,5-3-1=1"),
        (100, "-", 1, 3, "10-1=9,10-0-1=9,1-0-1=0"),
        (47, "*", 85, 2, "47*5=235,47*80=3760"),
        (99, "*", 99, 2, "99*9=891,99*90=8910"),
    ],
)
def test_columns_show_carries_borrows_and_partial_products(a, op, b, digits, expected):
    assert ",".join(columns(a, op, b, digits)) == expected


def test_every_step_of_every_worked_solution_is_true():
    config = TaskConfig(operators="+-*", worked=True, num_train=10**6, num_eval=10**6)
    for problem in _all(config):
        steps, answer = problem.solution.split(";")
        assert answer == problem.answer
        for step in steps.split(","):
            left, right = step.split("=")
            assert re.fullmatch(r"\d+([-+*]\d+){1,2}", left)
            assert eval(left) == int(right)


def test_worked_two_digit_solutions_have_at_most_24_characters():
    config = TaskConfig(operators="+-*", worked=True, num_train=10**6, num_eval=10**6)
    assert max(len(problem.solution) for problem in _all(config)) == 24


def test_mirrored_sums_share_their_split_and_differences_need_not():
    split = {}
    task = ArithmeticTask(TaskConfig(operators="+-", num_train=10**6, num_eval=10**6), seed=0)
    for name in ("train", "validation", "test"):
        split |= {problem.prompt: name for problem in task.problems(name)}
    assert len(split) == 2 * 10**4
    pairs = [(a, b) for a in range(100) for b in range(a)]
    assert all(split[f"{a:02}+{b:02}="] == split[f"{b:02}+{a:02}="] for a, b in pairs)
    assert any(split[f"{a:02}-{b:02}="] != split[f"{b:02}-{a:02}="] for a, b in pairs)


@pytest.mark.parametrize(
    "completion", ["", "0132", "+132", "132 ", " 132", "131", "13", "1320", "132;", "١٣٢", "132.0"]
)
def test_only_the_exact_answer_counts(completion: str):
    task = ArithmeticTask(TaskConfig(), seed=0)
    problem = Problem(id=0, prompt="47+85=", answer="132", solution="132")
    assert task.verify(problem, "132", True).correct
    assert task.verify(problem, completion, True).total == 0.0


@pytest.mark.parametrize(
    ("completion", "correct", "formatted"),
    [
        ("7+5=12,4+8+1=13;132", True, True),
        (";132", True, True),
        ("nonsense;132", True, True),
        ("132", False, False),
        ("7+5=12;131", False, True),
        ("131;132", True, True),
        ("131;132;", False, False),
        (";131;132", False, False),
    ],
)
def test_worked_answers_follow_exactly_one_marker(completion, correct, formatted):
    task = ArithmeticTask(TaskConfig(worked=True), seed=0)
    problem = Problem(id=0, prompt="47+85=", answer="132", solution="")
    reward = task.verify(problem, completion, True)
    assert (reward.correct, reward.parts["format"]) == (correct, float(formatted))
    assert reward.total == reward.parts["correct"] == float(correct)
    assert task.verify(problem, completion, False).parts == {"correct": 0.0, "format": 0.0}


def test_chance_is_one_over_the_number_of_possible_results():
    assert ArithmeticTask(TaskConfig(digits=1), 0).chance_rate == 1 / 19  # 0..18
    assert ArithmeticTask(TaskConfig(digits=1, operators="-"), 0).chance_rate == 1 / 19  # -9..9
    assert ArithmeticTask(TaskConfig(digits=1, operators="*"), 0).chance_rate == 1 / 82  # 0..81
    mixed = ArithmeticTask(TaskConfig(digits=1, operators="+*"), 0).chance_rate
    assert mixed == pytest.approx((1 / 19 + 1 / 82) / 2)


@pytest.mark.parametrize("operators", ["", "/", "+/", "++", "+-%"])
def test_unknown_or_repeated_operators_are_refused(operators: str):
    with pytest.raises(UserError, match=r"task\.operators"):
        ArithmeticTask(TaskConfig(operators=operators), seed=0)


@pytest.mark.parametrize("digits", [0, -1, 10])
def test_digits_outside_1_to_9_are_refused(digits: int):
    with pytest.raises(UserError, match=r"task\.digits=.*1\.\.9"):
        ArithmeticTask(TaskConfig(digits=digits), seed=0)


def test_large_spaces_are_drawn_up_to_the_configured_size():
    task = ArithmeticTask(TaskConfig(digits=9, num_train=300, num_eval=20), seed=0)
    assert [len(task.problems(s)) for s in ("train", "validation", "test")] == [300, 20, 20]
