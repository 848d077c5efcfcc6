"""The code verifier: reference solutions pass, wrong ones do not, extraction and shapes of rows."""

import gzip
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxrl.errors import UserError
from jaxrl.rewards.code import (
    CodeVerifier,
    extract_code,
    fenced_blocks,
    make_score,
    read_tests,
    same_output,
)
from jaxrl.rewards.sandbox.client import Checks, Sandbox
from jaxrl.rewards.sandbox.limits import AdaptiveWall, Limits

SAMPLE = 40
"""Reference solutions of each data set in the default suite; the slow one runs all."""


@pytest.fixture(scope="module")
def verifier() -> Iterator[CodeVerifier]:
    verifier = CodeVerifier(Limits())
    yield verifier
    verifier.close()


def _rows(folder: Path, name: str, most: int | None) -> list[dict[str, Any]]:
    with gzip.open(folder / "code" / name, "rt") as file:
        rows = [json.loads(line) for line in file]
    return random.Random(1).sample(rows, most) if most else rows


@pytest.fixture(params=[SAMPLE, pytest.param(None, marks=pytest.mark.slow)], ids=["sample", "all"])
def most(request: pytest.FixtureRequest) -> int | None:
    return request.param


def test_humaneval_references_pass_as_block_and_as_continuation(verifier, shared_data, most):
    rows = _rows(shared_data, "HumanEval.jsonl.gz", most)
    assert most or len(rows) == 164
    for row in rows:
        tests, body = read_tests(row), row["canonical_solution"]
        block = f"<think>easy</think>So:\n```python\n{row['prompt']}{body}```\nDone."
        assert verifier.score(block, tests).total == 1, row["task_id"]
        assert verifier.score(body, tests).total == 1, row["task_id"]


def test_mbpp_references_pass(verifier, shared_data, most):
    rows = _rows(shared_data, "mbpp_sanitized_427.jsonl.gz", most)
    assert most or len(rows) == 427
    for row in rows:
        reward = verifier.score(f"```python\n{row['code']}\n```", read_tests(row))
        assert reward.total == 1, row["task_id"]


def test_the_data_sets_reject_programs_that_do_nothing_or_claim_everything(verifier, shared_data):
    anything = "class A:\n    def __eq__(self, other): return True\n    __hash__ = None\n"
    for row in _rows(shared_data, "mbpp_sanitized_427.jsonl.gz", SAMPLE // 2):
        tests = read_tests(row)
        assert tests.checks is not None
        (name,) = (e for e in tests.checks.entries)
        for body in ("return None", "return A()", "import os; os._exit(0)"):
            program = f"{anything}def {name}(*values):\n    {body}"
            assert not verifier.score(program, tests).correct, row["task_id"]
    for row in _rows(shared_data, "HumanEval.jsonl.gz", SAMPLE // 2):
        for body in ("return None", "return A()"):
            program = f"{anything}def {row['entry_point']}(*values):\n    {body}"
            assert not verifier.score(program, read_tests(row)).correct, row["task_id"]


SUM = {"inputs": ["1 2\n", "3 4\n", "5 6"], "outputs": ["3\n", "7", "11\n\n"]}


@pytest.mark.parametrize(
    ("program", "passed"),
    [
        ("print(sum(map(int, input().split())))", 1.0),
        ("import sys\na, b = sys.stdin.read().split()\nprint(int(a) + int(b), '  ')", 1.0),
        ("print(sum(map(int, open(0).read().split())))\nexit()", 1.0),
        ("import sys, threading\ndef main(): print(sum(map(int, input().split())))\n"
         "threading.Thread(target=main).start()", 1.0),
        ("import atexit\natexit.register(lambda: print(a + b))\na, b = map(int, input().split())", 1.0),
        ("if __name__ == '__main__':\n    print(sum(map(int, input().split())))", 1.0),
        ("from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\n    y: int\n"
         "p = P(*map(int, input().split()))\nprint(p.x + p.y)", 1.0),
        ("a, b = map(int, input().split())\nprint(3 if a < 3 else 7)", 2 / 3),
        ("print(3)\nraise SystemExit(1)", 0.0),
        ("print(3)\n1 / 0", 0.0),
        ("print(3, end='')\nimport os, sys\nsys.stdout.flush()\nos._exit(2)", 0.0),
        ("print('3 .')", 0.0),
        ("this is no python", 0.0),
        ("((((" * 50_000, 0.0),
        ("print('\ud800')", 0.0),
    ],
)  # fmt: skip
def test_programs_with_input_and_output(verifier, program: str, passed: float):
    reward = verifier.score(f"```python\n{program}\n```", read_tests(SUM))
    assert reward.parts["passed"] == pytest.approx(passed)
    assert (reward.total, reward.correct) == (float(passed == 1), passed == 1)
    assert reward.parts["code"] == 1


def test_a_large_input_arrives_and_a_slow_program_is_said_to_be_slow(verifier):
    row = {"inputs": ["7 " * 1_000_000], "outputs": ["7000000"]}
    assert verifier.score("print(sum(map(int, input().split())))", read_tests(row)).total == 1
    slow = CodeVerifier(Limits(wall_s=0.2))
    reward = slow.score("while True: pass", read_tests(SUM))
    slow.close()
    assert (reward.total, reward.parts["slow"]) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("value", "same"),
    [
        ("(1, [2.5, {'a': {3}}], None, True)", "(1, [2.5, {'a': {3}}], None, True)"),
        ("(1, 2)", "(1, 2)"),
        ("frozenset({1})", "{1}"),
        ("b'x'", "b'x'"),
        ("3 + 4j", "3 + 4j"),
        ("range(3)", "range(3)"),
        ("10 ** 5000", "10 ** 5000"),
        ("__import__('collections').Counter('aab')", "{'a': 2, 'b': 1}"),
        ("__import__('collections').deque([1])", "__import__('collections').deque([1])"),
        ("__import__('fractions').Fraction(1, 2)", "0.5"),
        ("__import__('enum').IntEnum('E', 'A').A", "1"),
    ],
)
def test_values_come_back_as_they_are(verifier, value: str, same: str):
    checks = (f"assert f() == {same}", f"assert f(x={value}) == {same}")
    tests = read_tests({"test_list": checks})
    assert verifier.score(f"def f(x=None): return {value} if x is None else x", tests).total == 1
    different = read_tests({"test_list": [f"assert f() != {same}"]})
    assert verifier.score(f"def f(): return {value}", different).total == 0


def test_checks_may_use_classes_constants_iterators_and_exceptions(verifier):
    program = """
LIMIT = 3
class Pair:
    def __init__(self, a, b): self.a, self.b = a, b
    def total(self): return self.a + self.b
def largest(pairs): return max(pairs, key=lambda pair: pair.a)
def count(): yield from range(LIMIT)
def fail(): raise ValueError("no")
"""
    checks = [
        "assert Pair(1, 2).total() == 3",
        "assert largest([Pair(1, 2), Pair(3, 4)]).b == 4",
        "assert list(count()) == [0, 1, 2] and LIMIT == 3",
        "try:\n    fail()\n    assert False\nexcept ValueError as error:\n    assert str(error) == 'no'",
        "assert math.isclose(largest([Pair(1, 2)]).a, 1.0)",
    ]
    assert verifier.score(program, read_tests({"test_list": checks})).parts["passed"] == 1


def test_a_program_cannot_replace_what_the_checks_call(verifier):
    row = {"test_list": ["assert sorted(f(2)) == sorted([1, 2])", "assert len(f(3)) == 3"]}
    program = "def sorted(x): return 0\ndef len(x): return 3\ndef f(n): return []"
    assert verifier.score(program, read_tests(row)).parts["passed"] == 0
    assert verifier.score("def f(n): return list(range(n, 0, -1))", read_tests(row)).total == 1
    own = {"test_list": ["assert sum(10, 15) == 25"]}
    assert verifier.score("def sum(a, b): return a + b", read_tests(own)).total == 1


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"question": "?"}, "inputs and outputs, or test_list"),
        ({"inputs": ["1"], "outputs": []}, "outputs"),
        ({"inputs": ["1", "2"], "outputs": ["1"]}, "2 inputs and 1 outputs"),
        ({"inputs": [1], "outputs": ["1"]}, "no text"),
        ({"test_list": []}, "at least one"),
        ({"test_list": ["assert f("]}, "not Python"),
        ({"test_list": ["assert len(set([1])) == 1"]}, "unclear"),
    ],
)
def test_a_row_without_usable_tests_is_an_error_that_says_so(row: dict[str, Any], says: str):
    with pytest.raises(UserError, match=says):
        read_tests(row)


@pytest.mark.parametrize(
    ("completion", "code"),
    [
        ("x = 1", "x = 1"),
        ("Sure:\n```python\nx = 1\n```\nand\n```python\nx = 2\n```", "x = 1\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```bash\nls\n```\n```Python3\nx = 1\n```", "x = 1\n"),
        ("<think>```python\nx = 0\n```</think>```python\nx = 1\n```", "x = 1\n"),
        ("<think>```python\nx = 0\n```", None),
        ("```python\nx = 1", None),
        ("```python title='a'\nx = '''\n```inner\n'''\n```", "x = '''\n```inner\n'''\n"),
        ("  ```py\n  x = 1\n  ```", "  x = 1\n"),
        ("", None),
    ],
)
def test_extraction(completion: str, code: str | None):
    assert extract_code(completion) == code


def test_extraction_is_linear_in_hostile_text():
    assert extract_code("```a\n" * 200_000) is None
    assert len(fenced_blocks("```a\n```\n" * 100_000)) == 100_000


@pytest.mark.parametrize(
    ("output", "expected", "same"),
    [
        ("1\n2\n", "1\n2", True), ("1  \n2", "1\n2\n\n", True), ("1\r\n2", "1\n2", True),
        ("1\n\n2", "1\n2", False), (" 1", "1", False), ("1 2", "1  2", False), ("", "0", False),
    ],
)  # fmt: skip
def test_outputs_are_equal_up_to_white_space_at_ends(output: str, expected: str, same: bool):
    assert same_output(output, expected) is same


def test_the_adaptive_limit_follows_the_slowest_correct_run():
    wall = AdaptiveWall(ceiling_s=10.0)
    assert wall.wall_s(1) == 10.0
    wall.passed(1, 0.1)
    assert wall.wall_s(1) == 2.0
    wall.passed(1, 4.0)
    wall.passed(1, 0.1)
    assert (wall.wall_s(1), wall.wall_s(2)) == (6.0, 10.0)
    wall.passed(1, 9.0)
    assert wall.wall_s(1) == 10.0


def test_an_adaptive_verifier_gives_a_known_test_less_time():
    given: list[float] = []

    class Watched(Sandbox):
        def check(self, program: str, checks: Checks, limits: Limits):
            given.append(limits.wall_s)
            return super().check(program, checks, limits)

    verifier = CodeVerifier(Limits(), adaptive=True)
    verifier._sandbox = Watched()
    tests = read_tests({"test_list": ["assert f() == 1"]})
    for value in (2, 1, 1):
        verifier.score(f"def f(): return {value}", tests)
    verifier.close()
    assert given == [10.0, 10.0, 2.0]


def test_the_pools_function_scores_prompt_completion_and_row():
    reward = make_score(10.0, adaptive=False)(
        "unused", "```python\ndef f(): return 1\n```", {"test_list": ["assert f() == 1"]}
    )
    assert reward.correct
    assert dict(reward.parts) == {"correct": 1.0, "code": 1.0, "passed": 1.0, "slow": 0.0}
