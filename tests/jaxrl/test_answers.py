"""Where the final answer of a completion is found, and that finding it is linear in the text."""

import time

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from jaxrl.rewards.answers import MAX_ANSWER, final_answer

LINEAR_S = 2.0
"""A megabyte takes 0.2 s at most; anything quadratic takes minutes."""

FOUND = [
    (r"so \boxed{7}.", "7", "boxed"),
    (r"\fbox{x} and \boxed 7.", "x, 7", "boxed"),
    (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}", "boxed"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}", "boxed"),
    (r"\boxed{\boxed{7}}", "7", "boxed"),
    (r"\boxed{1}, then \boxed{7}", "7", "boxed"),
    (r"$\boxed{3} \quad \text{and} \quad \boxed{7}$", "3, 7", "boxed"),
    ("<think>\\boxed{1}</think> \\boxed{7}\n#### 8 <answer>9</answer>", "7", "boxed"),
    ("Some steps.\n#### 7", "7", "hashes"),
    ("####: 7", "7", "hashes"),
    ("It costs #### 7 dollars.", "7 dollars.", "hashes"),
    ("#### $1,234.50\n\nHope that helps!", "$1,234.50", "hashes"),
    ("#### 5\n#### 7\n<answer>8</answer>", "7", "hashes"),
    ("#### Step 1: add 3\nThe answer is 7.", "7", "said"),
    ("<answer>6</answer> no <answer>\n7\n</answer>", "7", "tag"),
    ("<answer>The answer is 7 apples</answer>", "7 apples", "tag"),
    ("Therefore, the **answer is: 7**.", "7", "said"),
    ("Answer: 7<|im_end|>", "7", "said"),
    ("the answer is 6. No, the answer is 7\nGood.", "7", "said"),
    (" 7 \n", "7", "plain"),
    ("3 + 4 = 7", "3 + 4 = 7", "plain"),
]


@pytest.mark.parametrize(("completion", "text", "mark"), FOUND)
def test_the_final_answer_is_found(completion: str, text: str, mark: str):
    found = final_answer(completion)
    assert found is not None
    assert (found.text, found.mark) == (text, mark)


NOTHING = ["", " \n", "<think>\\boxed{7}", "</think><think> 7", r"\boxed{7", r"\boxed{6} \boxed{7", r"\boxed{}",
           r"\boxed{" + "1" * (MAX_ANSWER + 1) + "}", "#### " + "1" * (MAX_ANSWER + 1)]  # fmt: skip


@pytest.mark.parametrize("completion", NOTHING)
def test_no_answer_is_no_answer(completion: str):
    assert final_answer(completion) is None


@given(st.text(alphabet=r"ab{}\$ 7", max_size=20), st.text(alphabet="ab 7.\n", max_size=30))
def test_a_box_comes_back_as_it_was_written(inside: str, before: str):
    assume(_balanced(inside) and inside.strip())
    found = final_answer(f"{before}\\boxed{{{inside}}}{before}")
    assert found is not None
    assert (found.text, found.mark) == (inside.strip(), "boxed")


def _balanced(text: str) -> bool:
    depth = 0
    for at, character in enumerate(text):
        escaped = text[at - 1 : at] == "\\"
        depth += 0 if escaped else (character == "{") - (character == "}")
        if depth < 0:
            return False
    return depth == 0 and not text.endswith("\\")


@pytest.mark.parametrize(
    "part",
    [r"\boxed{", r"\boxed{1},", r"\boxed ", "#### 1\n", "####", "<answer>", "</answer>", "<think>",
     "</think>", "answer is ", "{", "$", "\\", "7 ", "\n", "\\boxed{1} and "],
)  # fmt: skip
def test_a_megabyte_of_anything_is_searched_in_linear_time(part: str):
    text = part * (1_000_000 // len(part))
    start_s = time.process_time()
    final_answer(text)
    assert time.process_time() - start_s < LINEAR_S
