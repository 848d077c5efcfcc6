"""The majority vote as reward: who votes, who is paid, what is logged, what may not be combined with it."""

import numpy as np
import pytest

from jaxrl.algorithms.votes import majority, pay_majority, vote_curves
from jaxrl.config import Config, GrpoConfig, TaskConfig
from jaxrl.errors import UserError
from jaxrl.rewards.verifiers import score_exact
from jaxrl.tasks import make_task
from jaxrl.types import Completion, Finish, Problem, Prompt, Reward, Rollout, RolloutGroup

RIGHT = "7"


def group(*answers: str) -> RolloutGroup:
    one = Completion(
        tokens=np.array([1], np.int32), sampler_logprobs=np.zeros(1, np.float32),
        versions=np.zeros(1, np.int32), finish=Finish.STOP, sample_index=0,
    )  # fmt: skip
    problem = Problem(id=0, prompt="", answer=RIGHT, solution="")
    rollouts = tuple(
        Rollout(
            completion=one, text=a,
            reward=Reward(total=float(a == RIGHT), correct=a == RIGHT, answer=a),
        )
        for a in answers
    )  # fmt: skip
    return RolloutGroup(
        prompt=Prompt(index=0, problem=problem, tokens=(1,)), birth_version=0, rollouts=rollouts
    )


def paid(answers: tuple[str, ...], group_size: int) -> list[float]:
    return [r.reward.total for r in pay_majority(group(*answers), group_size).rollouts]


@pytest.mark.parametrize(
    ("answers", "label", "rewards"),
    [
        (("3", "7", "3", "3"), ("3", 3), [1, 0, 1, 1]),
        (("7", "3", "3", "7"), ("7", 2), [1, 0, 0, 1]),  # a tie goes to the first seen
        (("", "", "5", ""), ("5", 1), [0, 0, 1, 0]),  # no answer, no vote
        (("", ""), ("", 0), [0, 0]),
    ],
)
def test_the_most_frequent_answer_is_the_label(answers, label, rewards) -> None:
    assert majority(group(*answers)) == label
    assert paid(answers, len(answers)) == rewards


def test_more_samples_vote_than_are_trained_on() -> None:
    assert paid(("7", "3", "3", "3"), 2) == [0, 1]
    assert GrpoConfig(reward_from="majority", votes_per_prompt=64).samples_per_prompt == 64


def test_correctness_stays_the_verifiers() -> None:
    rollouts = pay_majority(group("3", "3", "7"), 3).rollouts
    assert [r.reward.correct for r in rollouts] == [False, False, True]


def test_a_wrong_label_still_pays_most_samples_rightly() -> None:
    """The paper's lucky hit: scattered wrong answers disagree with a wrong label."""
    curves = vote_curves([group("3", "3", "7", "4", "5", "6", "8", "9")])
    assert curves["majority/label_accuracy"] == 0
    assert curves["majority/reward_accuracy"] == 5 / 8
    assert curves["majority/ratio"] == 2 / 8
    assert curves["majority/ground_truth_ratio"] == 1 / 8
    assert vote_curves([group("7", "7", "3")])["majority/label_accuracy"] == 1
    assert vote_curves([group("", "")])["majority/label_accuracy"] == 0


def test_verifiers_say_what_the_answer_is() -> None:
    assert score_exact("", " 12\n", {"answer": "7"}).answer == "12"
    task = make_task(TaskConfig(worked=True), 0)
    problem = Problem(id=0, prompt="03+04=", answer="7", solution="3+4=7,0+0=0;7")
    assert task.verify(problem, "3+4=7,0+0=0;7", True).answer == "7"
    assert task.verify(problem, "3+4=7,0+0=0;7", False).answer == ""  # cut off: no vote
    assert task.verify(problem, "7", True).answer == ""


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"votes_per_prompt": 16}, "votes are for grpo.reward_from=majority"),
        ({"reward_from": "majority", "votes_per_prompt": 4}, "the group is among them"),
        ({"reward_from": "majority", "signal_from": "correct"}, "reads the label"),
        ({"reward_from": "majority", "keep_samples": "correct"}, "reads the label"),
        ({"reward_from": "majority", "length_reward": "cosine"}, "pays by the label"),
        ({"reward_from": "majority", "group_size": 2}, "pays the first sample whatever it says"),
        ({"reward_from": "random", "keep_samples": "correct"}, "reads the label"),
        ({"reward_from": "random", "length_reward": "cosine"}, "pays by the label"),
        ({"reward_from": "format", "signal_from": "correct"}, "reads the label"),
    ],
)
def test_what_reads_labels_is_refused_with_votes_and_controls(settings, said) -> None:
    with pytest.raises(UserError) as refused:
        GrpoConfig(**settings)
    assert said in str(refused.value)


def test_a_task_without_final_answers_is_refused() -> None:
    with pytest.raises(UserError, match="counts final answers"):
        Config(grpo=GrpoConfig(reward_from="majority"), task=TaskConfig(name="countdown"))
