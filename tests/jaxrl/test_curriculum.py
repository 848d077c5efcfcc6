"""Curricula: which problems stay in the stream, which are probed, and how long completions get."""

import dataclasses
import json

import numpy as np
import pytest

from jaxrl.config import Config, CurriculumConfig, GrpoConfig, RolloutConfig
from jaxrl.curriculum import FIRST_PROBE, EdgeStream, Outcomes
from jaxrl.errors import UserError
from jaxrl.length_curriculum import LengthCurriculum, Stage, at_stage, stages_of
from jaxrl.prompts import PromptStream
from jaxrl.tokenizer import CharTokenizer
from jaxrl.types import Completion, Finish, Problem, Prompt, Reward, Rollout, RolloutGroup

NUM = 6
PROBLEMS = [Problem(id=10 + n, prompt=str(n), answer="", solution="") for n in range(NUM)]


def stream(**settings: object) -> EdgeStream:
    base = PromptStream(PROBLEMS, CharTokenizer("0123456789"), 0, 4, False)
    return EdgeStream(base, CurriculumConfig(edge=True, **settings))


def rewards(correct: int, samples: int) -> list[Reward]:
    return [Reward(total=float(n < correct), correct=n < correct) for n in range(samples)]


def group(prompt: Prompt, correct: int, samples: int = 4) -> RolloutGroup:
    one = Completion(
        tokens=np.array([1], np.int32), sampler_logprobs=np.zeros(1, np.float32),
        versions=np.zeros(1, np.int32), finish=Finish.STOP, sample_index=0,
    )  # fmt: skip
    rollouts = tuple(Rollout(completion=one, text="", reward=r) for r in rewards(correct, samples))
    return RolloutGroup(prompt=prompt, birth_version=0, rollouts=rollouts)


def learnt(source: EdgeStream, correct: dict[int, int], samples: int = 8) -> EdgeStream:
    """After one epoch in which problem n got correct[n] of its samples right, and 0 samples are forgotten."""
    prompts = [source.at(index) for index in range(NUM)]
    source.observe([group(p, correct[p.problem.id - 10], samples) for p in prompts], 1)
    return source


MIXED = {0: 0, 1: 8, 2: 4, 3: 1, 4: 0, 5: 8}


def test_the_stream_keeps_what_is_solved_sometimes_and_not_nearly_always() -> None:
    source = learnt(stream(), MIXED)
    drawn = [source.at(index).problem.id - 10 for index in range(NUM, NUM + 20)]
    assert set(drawn) == {2, 3}
    assert abs(drawn.count(2) - drawn.count(3)) <= 1
    curves = source.curves()
    places = ("active", "solved", "unsolved", "unseen")
    assert [curves[f"curriculum/{name}"] for name in places] == [2, 2, 2, 0]


def test_every_problem_is_seen_before_any_is_left_out() -> None:
    source = stream()
    assert sorted(source.at(n).problem.id for n in range(NUM)) == [p.id for p in PROBLEMS]


def test_an_index_keeps_its_problem_and_its_name() -> None:
    source = learnt(stream(), MIXED)
    first = source.at(NUM)
    source.at(NUM + 1)
    assert source.at(NUM) == first
    assert first.index == NUM


def test_the_posterior_is_beta_with_a_uniform_prior() -> None:
    fresh = Outcomes()
    assert fresh.pass_mean == 0.5
    seen = fresh.after(3, 4, unsolved_after=8)
    assert seen.pass_mean == pytest.approx(4 / 6)  # Beta(1 + 3, 1 + 1)
    faded = seen.at(10, 0.9)
    assert faded.pass_mean == pytest.approx((1 + 3 * 0.9**10) / (2 + 4 * 0.9**10))
    assert faded.at(10, 0.9) == faded


def test_what_was_solved_comes_back_once_its_successes_fade() -> None:
    source = learnt(stream(decay=0.9), MIXED)
    solved = {1, 5}
    for step in range(2, 30):
        prompt = source.at(100 + step)
        if prompt.problem.id - 10 in solved:
            assert 12 <= step <= 14  # (1 + 8 f) / (2 + 8 f) < 0.8 from f = 0.9^10 on
            break
        source.observe([group(prompt, 2)], step)
    else:
        pytest.fail("no solved problem came back within 30 steps")


def test_an_unsolved_problem_comes_back_by_a_probe_that_succeeds_and_by_nothing_else() -> None:
    source = learnt(stream(probe_slots=4), MIXED)
    assert [source.next_probe().problem.id - 10 for _ in range(4)] in ([0, 4, 0, 4], [4, 0, 4, 0])
    probe = source.next_probe()
    source.probed(probe, rewards(0, 4), tokens=9)
    assert source.curves()["curriculum/promoted"] == 0
    source.probed(probe, rewards(1, 4), tokens=9)
    assert source.curves()["curriculum/promoted"] == 1
    drawn = {source.at(index).problem.id for index in range(200, 220)}
    assert probe.problem.id in drawn
    assert source.next_probe().problem.id not in (probe.problem.id,)
    assert source.curves()["curriculum/probe_tokens"] == 18
    assert probe.index > FIRST_PROBE


def test_a_probe_that_fails_after_all_was_forgotten_leaves_its_problem_unsolved() -> None:
    source = learnt(stream(probe_slots=4, decay=0.5), MIXED)
    source.observe([], 40)  # 8 samples without a success are 0 by now
    unsolved = source.curves()["curriculum/unsolved"]
    probe = source.next_probe()
    source.probed(probe, rewards(0, 4), tokens=9)
    assert source.curves()["curriculum/unsolved"] == unsolved
    assert probe.problem.id not in {source.at(index).problem.id for index in range(200, 220)}


def test_with_nothing_at_the_edge_the_hardest_solved_problem_is_taken_and_counted() -> None:
    source = learnt(stream(max_pass=0.2), {0: 0, 1: 8, 2: 4, 3: 1, 4: 0, 5: 8}, samples=8)
    assert source.at(NUM).problem.id - 10 == 3  # (1 + 1) / (2 + 8)
    assert source.curves()["curriculum/forced"] == 1


def test_with_nothing_at_the_edge_no_problem_is_drawn_twice_in_a_step() -> None:
    """The solved ones from the hardest on, then the unsolved; a promoted one takes over at once."""
    source = learnt(stream(max_pass=0.2, probe_slots=4), MIXED)
    drawn = [source.at(NUM + n).problem.id - 10 for n in range(NUM)]
    assert drawn == [3, 2, 1, 5, 0, 4]
    other = stream(max_pass=0.2, probe_slots=4)
    source.at(2 * NUM)
    other.restore(json.loads(json.dumps(source.state())))
    for one in (source, other):  # in the second round, at the second problem
        assert one.at(2 * NUM + 1).problem.id - 10 == 2
    source.observe([], 2)
    assert source.at(2 * NUM + 2).problem.id - 10 == 3
    assert source.curves()["curriculum/forced"] == NUM + 3

    source = learnt(stream(probe_slots=4), dict.fromkeys(range(NUM), 0))
    assert source.at(NUM).problem.id - 10 == 0
    probe = source.next_probe()
    source.probed(probe, rewards(2, 4), tokens=9)
    assert {source.at(NUM + 1 + n).problem.id for n in range(3)} == {probe.problem.id}


def test_a_restored_stream_goes_on_as_the_saved_one() -> None:
    source = learnt(stream(probe_slots=4), MIXED)
    source.at(NUM)
    state = json.loads(json.dumps(source.state()))
    other = stream(probe_slots=4)
    other.restore(state)
    for one in (source, other):
        one.observe([group(one.at(NUM), 4)], 2)
    assert [source.at(n) for n in range(NUM, NUM + 9)] == [other.at(n) for n in range(NUM, NUM + 9)]
    assert source.next_probe() == other.next_probe()
    assert source.curves() == other.curves()


# -- lengths ---------------------------------------------------------------------------------------

STAGED = Config(
    rollout=RolloutConfig(max_new_tokens=16, slots=8),
    curriculum=CurriculumConfig(lengths=(4, 8, 16), slots=(32, 16, 8), stage_window=2),
)


def test_a_stage_is_a_configuration_of_its_own() -> None:
    stages = stages_of(STAGED)
    assert [(s.max_new_tokens, s.slots) for s in stages] == [(4, 32), (8, 16), (16, 8)]
    assert at_stage(STAGED, stages[0]).rollout.slots == 32
    assert stages_of(Config()) == (Stage(number=0, max_new_tokens=32, slots=128),)


def test_the_truncation_rate_moves_the_stage_over_a_full_window_only() -> None:
    lengths = LengthCurriculum(stages_of(STAGED), STAGED.curriculum)
    seen = []
    for step, share in enumerate([0.9, 0.9, 0.4, 0.0, 0.4, 0.9, 0.9, 0.9], start=1):
        lengths.observe(share, step)
        seen.append(lengths.current.number)
    assert seen == [0, 1, 1, 1, 1, 2, 2, 2]


def test_a_schedule_moves_the_stage_at_its_steps() -> None:
    settings = dataclasses.replace(STAGED.curriculum, stage_steps=(2, 5))
    lengths = LengthCurriculum(stages_of(STAGED), settings)
    seen = []
    for step in range(1, 8):
        seen.append(lengths.current.number)
        lengths.observe(1.0, step)
    assert seen == [0, 0, 1, 1, 1, 2, 2]
    other = LengthCurriculum(stages_of(STAGED), settings)
    other.restore(json.loads(json.dumps(lengths.state())))
    assert other.current == lengths.current


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_pass": 0.0}, "usual: 0.8"),
        ({"decay": 0.0}, "usual: 0.99"),
        ({"probe_slots": 8}, "set edge"),
        ({"edge": True, "probe_slots": 2}, "at least so many slots"),
        ({"edge": True, "probe_slots": -2}, "-1: as many as are predicted idle"),
        ({"probe_slots": -1}, "set edge"),
        ({"lengths": (8, 4)}, "must rise"),
        ({"lengths": (4, 8), "slots": (4,)}, "each of the 2 stages"),
        ({"lengths": (4, 8), "stage_steps": (4, 8)}, "the 1 changes"),
        ({"lengths": (4, 8), "truncated_share": 0.0}, "usual: 0.25"),
    ],
)
def test_contradictions_of_a_curriculum_are_refused(settings, said) -> None:
    with pytest.raises(UserError) as refused:
        CurriculumConfig(**settings)
    assert said in str(refused.value)


def test_a_curriculum_must_end_where_the_rollout_is_and_needs_labels() -> None:
    with pytest.raises(UserError, match=r"rollout\.max_new_tokens=32"):
        Config(curriculum=CurriculumConfig(lengths=(8, 16)))
    for reward in ("majority", "random"):
        with pytest.raises(UserError, match="by their labels"):
            Config(curriculum=CurriculumConfig(edge=True), grpo=GrpoConfig(reward_from=reward))
