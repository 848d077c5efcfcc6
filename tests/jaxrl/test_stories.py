"""Stories: each rule on its own, sentence splitting, and openings that fit the real checkpoint."""

from pathlib import Path

import pytest

from jaxrl.config import TaskConfig
from jaxrl.tasks.stories import StoriesTask, occurs, split_sentences
from jaxrl.tokenizer import load_tokenizer
from jaxrl.types import Problem

TASK = StoriesTask(TaskConfig(name="stories", num_train=300, num_eval=30), seed=0)
PROBLEM = Problem(id=0, prompt="...", answer="Tim ball", solution="")
GOOD = " They played. The dog ran. The ball was big. Tim was happy."


def _failed(completion: str, finished: bool = True) -> set[str]:
    """Names of the rules that the completion breaks."""
    reward = TASK.verify(PROBLEM, completion, finished)
    assert reward.total == float(reward.correct) == min(reward.parts.values())
    return {name for name, value in reward.parts.items() if not value}


def test_a_story_that_keeps_all_rules_is_right():
    assert _failed(GOOD) == set()


@pytest.mark.parametrize(
    ("completion", "finished", "broken"),
    [
        (GOOD, False, {"ended"}),
        (" Tim ran. The ball was big. They played. The dog ran.", True, {"name"}),
        (" They played. The dog ran. The box was big. Tim was happy.", True, {"thing"}),
        (" The ball was big. They ran. Tim was happy.", True, {"length"}),
        (" They played. The dog ran. The ball was big. Timmy was happy.", True, {"name"}),
        (" They played. The dog ran. The ballet was big. Tim was happy.", True, {"thing"}),
        (" They played. The dog ran. The ball was big. tim was happy.", True, {"name"}),
        ("", True, {"name", "thing", "length"}),
    ],
)
def test_each_rule_is_judged_on_its_own(completion: str, finished: bool, broken: set[str]):
    assert _failed(completion, finished) == broken


def test_the_name_may_stand_in_either_of_the_last_two_sentences():
    assert _failed(" The ball was big. They played. Tim was happy. They all ran.") == set()
    assert _failed(" The ball was big. Tim was happy. They all ran. They slept.") == {"name"}


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("  \n", 0),
        ("One. Two! Three? Four...", 4),
        ('"Hi!" said Tim. "Go," said Tom.', 3),
        ("One.\nTwo.", 2),
        ("One. and an end without a mark", 2),
        ("3.5 is one.", 1),
        ("“Hi.” He ran.", 2),
    ],
)
def test_sentences_end_at_marks_before_space_or_end(text: str, count: int):
    assert len(split_sentences(text)) == count


def test_words_count_as_wholes_with_plural_and_possessive():
    assert all(occurs("ball", text) for text in ("ball", "balls", "ball's", "the ball."))
    assert not any(occurs("ball", text) for text in ("balloon", "football", "Ball", ""))


def test_openings_ask_for_what_they_name_and_end_with_the_turn():
    for problem in TASK.problems("train"):
        name, thing = problem.answer.split(" ")
        assert f"named {name}." in problem.prompt
        assert occurs(thing, problem.prompt)
        assert problem.prompt.endswith(f'{name} said, "Thank you!"')


def test_default_sizes_are_filled():
    task = StoriesTask(TaskConfig(name="stories"), seed=0)
    assert len(task.problems("train")) == TaskConfig().num_train
    assert len(task.problems("test")) == TaskConfig().num_eval


def test_openings_and_solutions_fit_the_stories260k_checkpoint(shared_data: Path):
    tokenizer = load_tokenizer(shared_data / "weights" / "stories260K")
    for problem in TASK.problems("train"):
        assert 80 <= len(tokenizer.encode(problem.prompt)) <= 120
        assert len(tokenizer.encode(problem.solution)) <= 100
        assert tokenizer.decode(tokenizer.encode(problem.prompt)) == problem.prompt
