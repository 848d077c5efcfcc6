"""The math verifier against published verdicts, its own rules, and text that is meant to hang it."""

import gzip
import json
import random
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from jaxrl.config import TaskConfig
from jaxrl.rewards.answers import final_answer
from jaxrl.rewards.format import Gate, passes
from jaxrl.rewards.math import score_math
from jaxrl.rewards.pool import RewardPool
from jaxrl.rewards.verifiers import VerifierTask
from jaxrl.types import Problem

RULES = Path(__file__).resolve().parents[2] / "jaxrl" / "rewards" / "README.md"
RESULT_S = 60.0


def correct(gold: str, completion: str) -> bool:
    return score_math("", completion, {"answer": gold}).correct


def _rows(path: Path) -> list[dict]:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_at_least_99_percent_of_the_labelled_qwen_rollouts_agree(shared_data: Path):
    """All 800: the one disagreement is a verdict of theirs, 10{,}000 against 10000, that is wrong."""
    rows = _rows(shared_data / "math/qwen_math_labelled_rollouts.jsonl.gz")
    wrong = [row for row in rows if correct(row["gold"], row["response"]) != row["expected"]]
    assert [(row["idx"], row["sample"], row["gold"]) for row in wrong] == [(72, 7, "10{,}000")]
    assert len(rows) == 800


def test_the_labelled_gsm8k_rollouts_agree(shared_data: Path):
    """A sample, and every row whose last line is not 'A: integer'."""
    rows = _rows(shared_data / "gsm8k/gsm8k_labelled_rollouts.jsonl.gz")
    hard = [r for r in rows if not re.search(r"(?:^|\n)A: \d+$", r["response"]) or "," in r["gold"]]
    assert len(hard) > 300
    for row in [*hard, *random.Random(0).sample(rows, 700)]:
        assert correct(row["gold"], row["response"]) == row["expected"], row


@pytest.mark.slow
def test_all_labelled_gsm8k_rollouts_agree(shared_data: Path):
    rows = _rows(shared_data / "gsm8k/gsm8k_labelled_rollouts.jsonl.gz")
    assert len(rows) == 5276
    assert [r for r in rows if correct(r["gold"], r["response"]) != r["expected"]] == []


def test_every_math500_answer_pair_is_accepted_in_any_mark(shared_data: Path):
    for row in _rows(shared_data / "goldens/math500_answer_pairs.jsonl"):
        for text in (row["pred"], rf"so \boxed{{{row['pred']}}}.", f"So.\n#### {row['pred']}"):
            assert correct(row["gold"], text), (row["gold"], text)


def _unshared() -> dict[int, str]:
    """Case -> rule, from the table in the rules."""
    lines = RULES.read_text(encoding="utf-8").splitlines()
    tables = [line.strip("|").split("|") for line in lines if re.match(r"\| .* \| [\d ]+ \|", line)]
    return {int(case): rule.strip() for rule, cases, *_ in tables for case in cases.split()}


def _agrees(case: dict) -> bool:
    """Our verdict is the case's: right or wrong, an extracted text, an equivalent normal form, or form."""
    expected, kind = case["expected"], case["kind"]
    if kind == "format":
        full = case.get("config", {}).get("full_reward", 1.0)
        return passes(case["pred"], Gate.THINK) == (expected == full)
    if kind in ("equivalence", "reward", "multiple_choice"):
        gold = case["gold"]
        full = isinstance(expected, (int, float)) and expected == 1
        return isinstance(gold, str) and correct(gold, case["pred"] or "") == full
    answer = final_answer(case["input"] or "")
    if expected is None:
        return answer is None or answer.mark == "plain"
    if kind == "extract" and isinstance(expected, str):
        return answer is not None and answer.text == getattr(final_answer(expected), "text", None)
    expected = ", ".join(expected) if isinstance(expected, list) else str(expected)
    return correct(expected, case["input"])


def test_every_golden_case_agrees_but_those_whose_rule_is_listed_as_not_shared(shared_data: Path):
    cases = _rows(shared_data / "goldens/verifier_cases.jsonl")
    assert len(cases) == 438
    disagreeing = {case["id"] for case in cases if not _agrees(case)}
    assert disagreeing == set(_unshared())


ACCEPTED = [
    ("1/2", r"\frac12"), ("0.5", r"\frac{1}{2}"), (r"\frac{1}{2}", "0.5"), ("10", "1e1"),
    ("1000", "1,000"), ("1000", r"1\,000"), ("1000", "1{,}000"), ("1000000", "1 000 000"),
    (r"2\sqrt{3}", r"\sqrt{12}"), ("x^2-1", "(x-1)(x+1)"), ("x=5", "5"), ("5", "x=5"),
    (r"\text{even}", "Even"), (r"\text{no solution}", "no solution"), ("C", r"\text{(C)}"),
    ("12", r"12 \text{ cm}"), ("12", "12 square units"), ("30", "30°"), ("30", r"30^\circ"),
    (r"30\%", "30%"), ("0.75", r"75\%"), ("18", "$18"), ("18", r"\$18.00"), ("-3", "−3"),
    ("(1,2)", "( 1 , 2 )"), ("1,2", "2,1"), (r"\{1,2\}", "1,2"), (r"8\text{ and }9", "8, 9"),
    ("[0,1)", r"0 \le x < 1"), (r"x \in [1,2]", "[1,2]"), ("2^{10}", "1024"), (r"\pi", "pi"),
    (r"\infty", "infinity"), ("3+4i", "4i+3"), (r"1 - \frac{1}{e}", r"\frac{e-1}{e}"),
]  # fmt: skip
REFUSED = [
    ("1/3", "0.33"), ("420", "421"), ("5", "-5"), ("0", r"1\,000"), ("12", "1 2"),
    ("10", "9 or 10"), ("10", r"9 \text{ or } 10"), ("4", r"\{2,4\}"), ("2", "2, 3"),
    ("7", r"\pm 7"), ("(1,2)", "(2,1)"), ("[0,1]", "[0,1)"), ("x+1", "y+1"), ("5", "5x"),
    ("x", "5"), ("1", "1:2"), ("3", r"3 \pi"), (r"\text{no solution}", "0"), ("yes", "no"),
    ("A", "B"), ("1", ""), ("0", r"\infty"), (r"\ln 2", r"\log 2"),
]  # fmt: skip
MARKS = [r"so \boxed{%s}", "%s", "So:\n#### %s", "<answer>%s</answer>", "The answer is %s."]


@pytest.mark.parametrize("mark", MARKS)
def test_equal_answers_are_accepted_and_unequal_ones_refused(mark: str):
    for gold, answer in ACCEPTED:
        assert correct(gold, mark % answer), (gold, answer)
    for gold, answer in REFUSED:
        assert not correct(gold, mark % answer), (gold, answer)


def test_several_answers_are_one_list_and_never_a_choice():
    assert correct("2, 1", r"\boxed{1} and \boxed{2}")
    assert not correct("2", r"\boxed{1} and \boxed{2}")
    assert not correct("1", r"first \boxed{1}, but on reflection \boxed{2}")


@pytest.mark.parametrize("mark", MARKS)
def test_no_separator_makes_two_answers_both_right(mark: str):
    for separator in [" ", ";", ":", "|", "/", "=", "~", "...", " or ", r"\\", r"\quad ", r"\cup ",
                      r"\approx ", r"\pm ", r"\text{ or }", "} \\boxed{", "} or maybe \\boxed{"]:  # fmt: skip
        text = mark % f"41{separator}42"
        assert not (correct("41", text) and correct("42", text)), text


def test_a_reference_that_is_no_text_is_an_error():
    with pytest.raises(TypeError, match="reference answer is 42"):
        score_math("", r"\boxed{42}", {"answer": 42})


HANGING = [r"\boxed{9^{9^{9^9}}}", r"\boxed{99999999!}"]
QUICK = [
    "9**9**9**9", r"\boxed{9**9**9**9}", r"\boxed{" + "1+" * 500_000 + "1}", "1+" * 500_000 + "1",
    r"\boxed{" * 150_000, r"\boxed{1}," * 100_000, "answer $x " * 100_000,
    '__import__("os").system("touch pwned")', r"\boxed{" + r"\sqrt{2+" * 30 + "2" + "}" * 31,
]  # fmt: skip


def test_bombs_get_nothing_within_the_time_limit_and_the_pool_goes_on():
    limit_s = 3.0  # the quick ones take half a second at most
    problem = Problem(id=1, prompt="", answer="420", solution="", row={"answer": "420"})
    config = TaskConfig(verifier="math")
    with RewardPool(config, 0, 2, limit_s, 0.0, make=VerifierTask) as pool:
        pool.wait_ready()
        futures = [pool.submit(problem, bomb, True) for bomb in [*HANGING, *QUICK]]
        rewards = [future.result(timeout=RESULT_S) for future in futures]
        after = pool.submit(problem, r"\boxed{420}", True).result(timeout=RESULT_S)
        stats = pool.stats()
    assert [reward.total for reward in rewards] == [0.0] * len(rewards)
    assert stats.timeouts == len(HANGING)
    assert stats.errors == 0
    assert after.total == 1.0


def test_the_process_that_trains_never_loads_sympy():
    code = """
        import sys
        from jaxrl.config import TaskConfig
        from jaxrl.rewards.pool import RewardPool
        from jaxrl.rewards.verifiers import VerifierTask
        from jaxrl.types import Problem
        problem = Problem(id=1, prompt="", answer="", solution="", row={"answer": "1/2"})
        with RewardPool(TaskConfig(verifier="math"), 0, 1, 30.0, 0.0, make=VerifierTask) as pool:
            print(pool.submit(problem, "so 0.5", True).result().total)
        print({"sympy", "math_verify", "jax"} & sys.modules.keys())
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=RULES.parents[2], stdout=subprocess.PIPE, timeout=RESULT_S, text=True, check=True,
    )  # fmt: skip
    assert result.stdout.split("\n")[:2] == ["1.0", "set()"]
