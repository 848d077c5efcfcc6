"""Magistral's reward as a task of a configuration gives it, parts apart, correctness as it was."""

import dataclasses
import json
from pathlib import Path

import pytest

from jaxrl.cli import load_config
from jaxrl.config import Config, GrpoConfig, ShapingConfig, TaskConfig
from jaxrl.errors import UserError
from jaxrl.rewards.pool import RewardPool
from jaxrl.rewards.worker import Item, judge
from jaxrl.tasks import make_task
from jaxrl.tasks.files import FileTask

ROOT = Path(__file__).parents[2]
SHAPING = ShapingConfig(kind="magistral", max_tokens=100, soft_tokens=20)
RIGHT = "<think>Two and two are taken together, which gives four.</think> The sum of them is \\boxed{4}."
ENGLISH = "Tell me, what do you get if you add the number two to itself once?"
ROUNDING = 1e-12  # sums of tenths


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TaskConfig:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [{"prompt": ENGLISH + " " * i, "answer": "4"} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TaskConfig(name="jsonl", path=path, verifier="math", shaping=SHAPING)


@pytest.fixture(scope="module")
def judged(config: TaskConfig):
    """Rewards of (completion, tokens) through a verifier process, as training gets them."""
    task = make_task(config, 0)
    problem = task.problems("train")[0]
    cases = [
        (RIGHT, 50), (RIGHT, 90), (RIGHT, 100), (RIGHT.replace("4", "5"), 50),
        (RIGHT.removeprefix("<think>"), 50), ("<think>.</think> \\boxed{4}", 50),
    ]  # fmt: skip
    with RewardPool(config, 0, 1, 60.0, 0.0) as pool:
        items = [(problem, text, True, tokens) for text, tokens in cases]
        cut = pool.submit_many([(problem, RIGHT, False, 100)]).result()
        return [*pool.submit_many(items).result(), *cut]


@pytest.mark.parametrize(
    ("case", "total", "correct"),
    [
        (0, 0.1 + 0.9 + 0.1, True),
        (1, 1.1 - 0.05, True),
        (2, 1.1 - 0.1, True),
        (3, 0.1 + 0.1, False),
        (4, 0.0, True),  # without the form the reward is 0, and filters still see a right answer
        (5, 0.1 + 0.9, True),  # too little prose to have a language
        (6, 0.1 + 0.1 - 0.1, False),  # cut off at the limit
    ],
)
def test_the_reward_is_magistrals_and_correctness_the_verifiers(judged, case, total, correct):
    reward = judged[case]
    assert reward.total == pytest.approx(total, abs=ROUNDING)
    assert reward.correct is correct
    summands = ("format", "correct", "length", "language")
    assert sum(reward.parts[name] for name in summands) == pytest.approx(total, abs=ROUNDING)


def test_the_template_around_a_problem_does_not_count_for_its_language(config: TaskConfig):
    french = "Dis-moi donc combien font deux et deux, mon cher ami?"
    answer = (
        "<think>Deux et deux font quatre, cela se voit tout de suite.</think> "
        "La réponse que tu cherches est donc \\boxed{4}."
    )
    template = (
        "{problem}\n\nPlease reason step by step in as many words as you like, and then answer."
    )
    task = make_task(dataclasses.replace(config, verifier="exact", prompt_template=template), 0)
    assert isinstance(task, FileTask)
    problem = task.problems("train")[0]
    prompt = template.replace("{problem}", french)
    verdict = judge(task, Item(dataclasses.replace(problem, prompt=prompt), answer, True, 1))
    assert verdict.reward is not None
    assert verdict.reward.parts["language"] == 0.1


def test_two_penalties_of_length_and_tasks_without_a_file_are_refused(config: TaskConfig):
    with pytest.raises(UserError, match=r"set grpo\.length_reward=none"):
        Config(task=config, grpo=GrpoConfig(length_reward="soft_overlong", overlong_buffer=2))
    with pytest.raises(UserError, match=r"task\.shaping\.kind=magistral, but task arithmetic"):
        make_task(TaskConfig(shaping=ShapingConfig(kind="magistral")), 0)


def test_the_configuration_of_eight_gpus_names_it():
    config = load_config(ROOT / "configs" / "qwen3_4b_magistral_8gpu.yaml")
    assert config.task.shaping.kind == "magistral"
    assert config.grpo.advantage_scale == "minibatch_std"
