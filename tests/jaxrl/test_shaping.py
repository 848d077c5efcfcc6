"""Format gates, the length penalty, and their combination in Magistral."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl.errors import UserError
from jaxrl.rewards.format import Gate, has_box, passes, split_thoughts
from jaxrl.rewards.shaping import magistral_reward, soft_length_penalty

ROUNDING = 1e-12
"""A few float64 roundings of sums of tenths."""
MAX, SOFT = 20480, 4096
CODE = "<think>a</think>\n```python\nx = 1\n```"


@pytest.mark.parametrize(
    ("num_tokens", "penalty"),
    [(0, 0), (16384, 0), (16385, -1 / 4096), (18432, -0.5), (20480, -1), (20481, -1), (30000, -1)],
)
def test_the_length_penalty_of_dapo(num_tokens: int, penalty: float):
    assert soft_length_penalty(num_tokens, MAX, SOFT) == penalty


@pytest.mark.parametrize("soft", [0, -1, 20481])
def test_an_impossible_penalty_is_refused(soft: int):
    with pytest.raises(UserError, match=str(soft)):
        soft_length_penalty(10, MAX, soft)


@pytest.mark.parametrize(
    ("num_tokens", "length"), [(16384, 0.0), (18432, -0.05), (20480, -0.1), (30000, -0.1)]
)
def test_magistral_adds_a_tenth_of_the_penalty(num_tokens: int, length: float):
    penalty = soft_length_penalty(num_tokens, MAX, SOFT)
    assert magistral_reward(True, True, penalty, False).total == pytest.approx(
        1 + length, abs=ROUNDING
    )
    assert magistral_reward(True, True, penalty, True).parts["length"] == pytest.approx(length)


@given(st.booleans(), st.booleans(), st.integers(0, 40000), st.booleans())
def test_magistral_as_the_paper_writes_it(
    formatted: bool, correct: bool, num_tokens: int, same: bool
):
    """The pseudocode of arXiv:2506.10910 section 2.2, line by line."""
    expected = 0.0
    if formatted:
        expected += 0.1
        if correct:
            expected += 0.9
        if num_tokens > MAX:
            expected -= 0.1
        elif num_tokens > MAX - SOFT:
            expected -= 0.1 * (num_tokens - MAX + SOFT) / SOFT
        if same:
            expected += 0.1
    penalty = soft_length_penalty(num_tokens, MAX, SOFT)
    reward = magistral_reward(formatted, correct, penalty, same)
    assert reward.total == pytest.approx(expected, abs=ROUNDING)
    assert sum(reward.parts.values()) == reward.total
    assert set(reward.parts) == {"format", "correct", "length", "language"}
    assert reward.correct is correct  # before shaping, whatever became of the total


@pytest.mark.parametrize(
    ("completion", "gates"),
    [
        ("<think>a</think> so $\\boxed{4}$", {Gate.THINK, Gate.BOXED}),
        (CODE, {Gate.THINK, Gate.CODE}),
        ("<think>a</think>\n```\nx = 1\n```", {Gate.THINK}),  # the block names no language
        ("<think>a</think>\n```python\nx = 1", {Gate.THINK}),  # it is not closed
        ("<think>\\boxed{4}</think> four", {Gate.THINK}),
        ("<think>a</think> \\boxed{\\frac{1}{2}", {Gate.THINK}),
        ("<think>a</think>  \n", set()),
        (" <think>a</think> b", set()),
        ("a</think> b \\boxed{4}", set()),
        ("<think>a b \\boxed{4}", set()),
        ("<think><think>a</think> b \\boxed{4}", set()),
        ("<think>a</think> b </think> \\boxed{4}", set()),
        ("<think>a</think> <think>b</think> \\boxed{4}", set()),
        ("</think><think> \\boxed{4}", set()),
        ("", set()),
    ],
)
def test_gates(completion: str, gates: set[Gate]):
    assert {gate for gate in Gate if passes(completion, gate)} == gates


def test_where_the_prompt_opens_the_thoughts_the_completion_only_closes_them():
    assert passes("a</think> \\boxed{4}", Gate.BOXED, opened=True)
    assert not passes("<think>a</think> \\boxed{4}", Gate.BOXED, opened=True)
    assert split_thoughts("a</think>b", opened=True) == ("a", "b")


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        ("\\boxed{}", True), ("\\boxed{\\{}", True), ("{\\boxed{1}", True), ("\\boxed{a{b}", False),
        ("\\boxed{\\boxed{1}", True), ("\\boxed 1", False), ("boxed{1}", False), ("\\boxed{1\\}", False),
        ("\\boxed{{}" * 50_000, False), ("\\boxed{" * 100_000, False), ("}\\boxed{1}", True),
    ],
)  # fmt: skip
def test_a_box_counts_when_it_closes(text: str, boxed: bool):
    assert has_box(text) is boxed
