"""Dynamic sampling: groups without signal are replaced, within the budget and the staleness bound."""

import dataclasses
import threading

import numpy as np
import pytest

from jaxrl import build
from jaxrl.buffer import BufferClosed, GroupBuffer
from jaxrl.config import GrpoConfig
from jaxrl.plan import make_plan, plan_rows
from jaxrl.refill import take_batch
from jaxrl.types import Completion, Finish, Problem, Prompt, Reward, Rollout, RolloutGroup
from roofline.datasheets import datasheet

P, LONGEST = 4, 8


class Stream:
    """Prompt `index` of an endless stream."""

    def at(self, index: int) -> Prompt:
        problem = Problem(id=index, prompt="", answer="", solution="")
        return Prompt(index=index, problem=problem, tokens=(1,))


def _group(prompt: Prompt, version: int, rewards: list[float]) -> RolloutGroup:
    completion = Completion(
        tokens=np.array([1], np.int32), sampler_logprobs=np.zeros(1, np.float32),
        versions=np.full(1, version, np.int32), finish=Finish.STOP, sample_index=0,
    )  # fmt: skip
    rollouts = tuple(
        Rollout(
            completion=dataclasses.replace(completion, sample_index=g), text="",
            reward=Reward(total=r, correct=r == 1),
        )
        for g, r in enumerate(rewards)
    )  # fmt: skip
    return RolloutGroup(prompt=prompt, birth_version=version, rollouts=rollouts)


def _generate(buffer: GroupBuffer, flat) -> threading.Thread:
    """A rollout thread that samples whatever it gets a ticket for."""

    def work() -> None:
        try:
            while True:
                for ticket in buffer.draw(2, wait=True):
                    rewards = [0.0, 0.0] if flat(ticket.prompt.index) else [0.0, 1.0]
                    buffer.put(_group(ticket.prompt, ticket.birth_version, rewards))
        except BufferClosed:
            pass

    thread = threading.Thread(target=work)
    thread.start()
    return thread


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
def test_every_step_gets_p_groups_with_signal_and_none_staler_than_allowed(max_staleness):
    settings = GrpoConfig(prompts_per_step=P, group_size=2, refill_rounds=50)
    buffer = GroupBuffer(Stream(), prompts_per_step=P, max_staleness=max_staleness)
    thread = _generate(buffer, lambda index: index % 3 != 0)  # two thirds without signal
    seen: list[int] = []
    for step in range(1, 13):
        taken = take_batch(buffer, settings, LONGEST)
        groups = taken.groups
        assert len(groups) == P
        assert [g.prompt.index % 3 for g in groups] == [0] * P
        discarded = [
            g for g in taken.sampled if g.prompt.index not in {k.prompt.index for k in groups}
        ]
        assert len(discarded) == taken.refilled
        assert taken.curves == {"filter/refilled_groups": taken.refilled}
        assert taken.generated_tokens == 2 * len(taken.sampled)  # samples of one token, in pairs
        assert all(g.prompt.index % 3 for g in discarded)
        assert all(0 <= step - 1 - g.birth_version <= max_staleness for g in taken.sampled)
        seen += [g.prompt.index for g in taken.sampled]
        buffer.release(step)
        assert sum(buffer.counts().values()) <= (max_staleness + 1) * P
    buffer.close()
    thread.join()
    assert len(seen) == len(set(seen))
    assert len(seen) >= 3 * 12 * P - 3


def test_the_budget_ends_the_search_and_the_rest_stays_in_the_batch():
    settings = GrpoConfig(prompts_per_step=P, group_size=2, refill_rounds=3)
    buffer = GroupBuffer(Stream(), prompts_per_step=P, max_staleness=0)
    thread = _generate(buffer, lambda index: True)
    taken = take_batch(buffer, settings, LONGEST)
    assert (len(taken.groups), taken.refilled, len(taken.sampled)) == (P, 3 * P, 4 * P)
    buffer.release(1)
    assert len(take_batch(buffer, settings, LONGEST).groups) == P
    buffer.close()
    thread.join()


def test_without_rounds_nothing_is_replaced():
    buffer = GroupBuffer(Stream(), prompts_per_step=P, max_staleness=0)
    thread = _generate(buffer, lambda index: True)
    taken = take_batch(buffer, GrpoConfig(prompts_per_step=P, group_size=2), LONGEST)
    assert ([g.prompt.index for g in taken.groups], taken.refilled) == ([0, 1, 2, 3], 0)
    buffer.close()
    thread.join()


def test_the_plan_states_the_budget_and_what_is_not_read(tiny_config):
    config = tiny_config()
    grpo = dataclasses.replace(config.grpo, drop_zero_advantage=True, refill_rounds=3)
    hardware, subject = datasheet("l4"), build.make_subject(config)
    plan = make_plan(config, subject.model, hardware)

    def rows(config):
        return {row[0]: row[1:] for row in plan_rows(config, plan, hardware, subject.tokenizer)}

    refilled = rows(dataclasses.replace(config, grpo=grpo))["dynamic sampling"]
    assert refilled[0] == "3 rounds"
    assert refilled[1].startswith("up to 12 further groups of 4 samples")
    assert "dynamic sampling" not in rows(config)
    capped = dataclasses.replace(config.grpo, correction_cap=5.0)
    told = rows(dataclasses.replace(config, grpo=capped))["not read"]
    assert told == ("grpo.correction_cap=5.0", "only with grpo.correction=truncated or masked")
    assert "not read" not in rows(config)
