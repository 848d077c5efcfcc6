"""The hand-over between rollout and learner: staleness bound, order, errors."""

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl.buffer import BufferClosed, BufferState, GroupBuffer, Ticket
from jaxrl.types import Problem, Prompt, RolloutGroup

JOIN_S = 20.0  # generous: a failure is a hang, not a slow machine


class Numbers:
    """A stream whose prompts are their positions."""

    def at(self, index: int) -> Prompt:
        problem = Problem(id=index, prompt=str(index), answer="", solution="")
        return Prompt(index=index, problem=problem, tokens=(index,))


def group_of(ticket: Ticket) -> RolloutGroup:
    return RolloutGroup(prompt=ticket.prompt, birth_version=ticket.birth_version, rollouts=())


def make_buffer(prompts_per_step: int, max_staleness: int, **more: object) -> GroupBuffer:
    return GroupBuffer(
        Numbers(), prompts_per_step=prompts_per_step, max_staleness=max_staleness, **more
    )


def test_tickets_are_bounded_by_staleness() -> None:
    buffer = make_buffer(4, 2)
    assert len(buffer.draw(100, wait=False)) == 12
    assert buffer.draw(100, wait=False) == []


def test_synchronous_mode_hands_out_nothing_until_the_weights_are_published() -> None:
    buffer = make_buffer(2, 0)
    first = buffer.draw(10, wait=False)
    for ticket in first:
        buffer.put(group_of(ticket))
    assert [g.prompt.index for g in buffer.take()] == [0, 1]
    assert buffer.draw(10, wait=False) == []
    buffer.release(1)
    assert [(t.prompt.index, t.birth_version) for t in buffer.draw(10, wait=False)] == [
        (2, 1),
        (3, 1),
    ]


def test_finished_groups_overtake_a_straggler_only_within_the_bound() -> None:
    buffer = make_buffer(1, 1)
    straggler, quick = buffer.draw(2, wait=False)
    buffer.put(group_of(quick))
    assert (
        buffer.take()[0].prompt.index == quick.prompt.index
    )  # the straggler may still wait a step
    buffer.release(1)
    (late,) = buffer.draw(1, wait=False)
    buffer.put(group_of(late))
    taken: list[RolloutGroup] = []
    thread = threading.Thread(target=lambda: taken.extend(buffer.take()))
    thread.start()
    thread.join(0.05)
    assert thread.is_alive()  # born at 0, it must be part of the batch at version 1
    buffer.put(group_of(straggler))
    thread.join(JOIN_S)
    assert [g.prompt.index for g in taken] == [straggler.prompt.index]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    prompts_per_step=st.integers(1, 4),
    max_staleness=st.integers(0, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_staleness_never_exceeds_the_bound_and_every_prompt_is_used_once(
    prompts_per_step: int, max_staleness: int, seed: int
) -> None:
    """Random finishing order; take() itself asserts the bound, a violated bound would starve it."""
    rng = np.random.default_rng(seed)
    buffer = make_buffer(prompts_per_step, max_staleness)
    open_tickets: list[Ticket] = []
    seen: list[int] = []
    for version in range(12):
        open_tickets += buffer.draw(int(rng.integers(0, 9)), wait=False)
        while buffer._may_leave() is None:
            open_tickets += buffer.draw(int(rng.integers(0, 9)), wait=not open_tickets)
            if open_tickets:
                buffer.put(group_of(open_tickets.pop(int(rng.integers(len(open_tickets))))))
        groups = buffer.take()
        assert len(groups) == prompts_per_step
        assert all(version - g.birth_version <= max_staleness for g in groups)
        seen += [g.prompt.index for g in groups]
        buffer.release(version + 1)
    assert len(seen) == len(set(seen))


def test_unfinished_prompts_are_drawn_again_after_a_restart() -> None:
    buffer = make_buffer(2, 1)
    tickets = buffer.draw(4, wait=False)
    for ticket in tickets[1:3]:
        buffer.put(group_of(ticket))
    taken = [g.prompt.index for g in buffer.take()]
    buffer.release(1)
    state = buffer.state()
    assert state == BufferState(next_index=4, outstanding=(0, 3))
    again = make_buffer(2, 1, version=1, state=state)
    assert [t.prompt.index for t in again.draw(4, wait=False)] == [0, 3, 4, 5]
    assert not set(taken) & {0, 3, 4, 5}


def test_a_failure_reaches_whoever_waits() -> None:
    buffer = make_buffer(1, 0)
    caught: list[BaseException] = []

    def learner() -> None:
        try:
            buffer.take()
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=learner)
    thread.start()
    buffer.fail(RuntimeError("the sampler broke"))
    thread.join(JOIN_S)
    assert str(caught[0]) == "the sampler broke"
    with pytest.raises(RuntimeError, match="the sampler broke"):
        buffer.draw(1, wait=True)


def test_closing_ends_every_wait() -> None:
    buffer = make_buffer(1, 0)
    buffer.draw(1, wait=False)
    buffer.close()
    with pytest.raises(BufferClosed):
        buffer.draw(1, wait=True)
    with pytest.raises(BufferClosed):
        buffer.take()


def test_a_group_without_a_ticket_is_refused() -> None:
    buffer = make_buffer(1, 0)
    (ticket,) = buffer.draw(1, wait=False)
    with pytest.raises(ValueError, match="has no ticket"):
        buffer.put(RolloutGroup(prompt=ticket.prompt, birth_version=3, rollouts=()))
