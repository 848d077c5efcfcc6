"""The edge of competence: an online curriculum over the stream of prompts (arXiv:2512.07783; Beta posterior).

    unseen ----> active <----------------- decay: what was solved comes back to be checked
                 |    |   mean >= max_pass
       no success|    +------------------> solved, left out
                 v
              unsolved ---- probes by idle rollout slots ----> a success: active again

Each problem remembers its samples n and correct ones c, both faded by `decay` per optimizer step; the
posterior of its pass@1 is Beta(1 + c, 1 + n - c). Active are problems with 0 < pass@k, judged by at least
half a success remembered or fewer than `unsolved_after` samples, and a posterior mean below `max_pass`.
A probe only moves its problem: its samples are never trained on, for those kept on condition of a success
would all have positive advantages.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxrl.prompts import PromptStream
from jaxrl.sections import CurriculumConfig
from jaxrl.types import Prompt, Reward, RolloutGroup

FIRST_PROBE = 2**31
"""Probes are numbered from here, so that no random stream is shared with a prompt of the run."""
_REMEMBERED = 0.5
"""Successes below which a problem counts as never solved."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcomes:
    """What is remembered of one problem at optimizer step `step`."""

    correct: float = 0.0
    samples: float = 0.0
    step: int = 0
    unsolved: bool = False
    """Out of the stream until a probe succeeds."""

    @property
    def pass_mean(self) -> float:
        """Posterior mean of pass@1 under a uniform prior."""
        return (1 + self.correct) / (2 + self.samples)

    def at(self, step: int, decay: float) -> Outcomes:
        """The same, faded until `step`."""
        fade = decay ** (step - self.step)
        return replace(self, correct=self.correct * fade, samples=self.samples * fade, step=step)

    def after(self, correct: int, samples: int, unsolved_after: int) -> Outcomes:
        """With new samples of the same step."""
        correct_now, samples_now = self.correct + correct, self.samples + samples
        known = correct_now >= _REMEMBERED
        unsolved = not known and (self.unsolved or samples_now >= unsolved_after)
        return replace(self, correct=correct_now, samples=samples_now, unsolved=unsolved)


class EdgeStream:
    """The problems of a stream that are at the edge of competence, in its order. Thread-safe.

    Position `index` keeps its problem once it is drawn, also across a resume.
    """

    def __init__(self, stream: PromptStream, settings: CurriculumConfig) -> None:
        self._stream = stream
        self._settings = settings
        self._lock = threading.Lock()
        self._outcomes: dict[int, Outcomes] = {}
        self._pool: deque[int] = deque()  # unsolved problems, the next to probe first
        self._drawn: dict[int, int] = {}  # index -> problem, of prompts under way
        self._cursor = 0
        self._has_edge: bool | None = (
            None  # some problem is unseen or active; None: to be found out
        )
        self._rest: deque[int] = deque()  # taken in turn while none is, until the next step
        self._step = 0
        self._counts = dict.fromkeys(
            ("probes", "probe_samples", "probe_tokens", "probe_cancelled", "promoted", "skipped",
             "forced"), 0,
        )  # fmt: skip

    # -- the buffer's side -------------------------------------------------------------------------

    def at(self, index: int) -> Prompt:
        """The prompt at position `index` of the run: the next active problem of the stream.

        If there is none, those that were ever solved are taken in turn, the lowest posterior mean first
        and each once in a step, then the others; they are counted.
        """
        with self._lock:
            if index not in self._drawn:
                self._drawn[index] = (
                    self._next_active() if self._at_edge() else self._next_of_rest()
                )
            return self._stream.of_problem(self._drawn[index], index)

    def _at_edge(self) -> bool:
        """Some problem is unseen or active; looked up once, until a step or a probe changes it."""
        if self._has_edge is None:
            unseen = len(self._outcomes) < self._stream.num_problems
            self._has_edge = unseen or any(map(self._is_active, self._outcomes))
        return self._has_edge

    def _is_active(self, problem: int) -> bool:
        outcomes = self._of(problem)
        solved = outcomes.pass_mean >= self._settings.max_pass
        return problem not in self._outcomes or not (outcomes.unsolved or solved)

    def _next_active(self) -> int:
        whole_epoch = 2 * self._stream.num_problems  # holds one, wherever it begins
        for position in range(self._cursor, self._cursor + whole_epoch):
            problem = self._stream.at(position).problem.id
            if self._is_active(problem):
                self._counts["skipped"] += position - self._cursor
                self._cursor = position + 1
                return problem
        raise AssertionError("an epoch of the stream has every problem")

    def _next_of_rest(self) -> int:
        if not self._rest:
            known = {problem: self._of(problem) for problem in self._outcomes}
            order = sorted(known, key=lambda p: (known[p].unsolved, known[p].pass_mean, p))
            self._rest.extend(order)
        self._counts["forced"] += 1
        return self._rest.popleft()

    def _of(self, problem: int) -> Outcomes:
        known = self._outcomes.get(problem)
        if known is None:
            return Outcomes(step=self._step)
        return known.at(self._step, self._settings.decay)

    # -- the learner's side ------------------------------------------------------------------------

    def observe(self, groups: Sequence[RolloutGroup], step: int) -> None:
        """Learn from all groups sampled for optimizer step `step`, before its tickets are released."""
        with self._lock:
            self._step, self._has_edge = step, None
            self._rest.clear()
            for group in groups:
                self._drawn.pop(group.prompt.index, None)
                correct = sum(rollout.reward.correct for rollout in group.rollouts)
                self._update(group.prompt.problem.id, correct, len(group.rollouts))

    def _update(self, problem: int, correct: int, samples: int) -> None:
        before = self._of(problem)
        after = before.after(correct, samples, self._settings.unsolved_after)
        self._outcomes[problem] = after
        if after.unsolved and not before.unsolved:
            self._pool.append(problem)
        elif before.unsolved and not after.unsolved:
            self._pool.remove(problem)
            self._has_edge = None

    def curves(self) -> dict[str, float]:
        """How many problems stand where, and what probes have cost and found so far.

        curriculum/probe_tokens counts those of probes that were cut short as well.
        """
        with self._lock:
            now = [self._of(problem) for problem in self._outcomes]
            bound = self._settings.max_pass
            places = {
                "unseen": self._stream.num_problems - len(now),
                "unsolved": len(self._pool),
                "solved": sum(not o.unsolved and o.pass_mean >= bound for o in now),
                "active": sum(not o.unsolved and o.pass_mean < bound for o in now),
            }
            return {
                f"curriculum/{name}": float(n) for name, n in {**places, **self._counts}.items()
            }

    @property
    def probe_tokens(self) -> int:
        """Completion tokens of all probes so far."""
        return self._counts["probe_tokens"]

    # -- the rollout's side: probes ----------------------------------------------------------------

    def next_probe(self) -> Prompt | None:
        """An unsolved problem to probe, the one whose turn it is; None if there is none."""
        with self._lock:
            if not self._pool:
                return None
            problem = self._pool[0]
            self._pool.rotate(-1)
            self._counts["probes"] += 1
            return self._stream.of_problem(problem, FIRST_PROBE + self._counts["probes"])

    def probed(self, prompt: Prompt, rewards: Sequence[Reward], tokens: int) -> None:
        """A probe is over: its verdicts, and how many tokens they took."""
        with self._lock:
            correct = sum(reward.correct for reward in rewards)
            was = self._of(prompt.problem.id).unsolved
            self._update(prompt.problem.id, correct, len(rewards))
            self._counts["promoted"] += was and not self._of(prompt.problem.id).unsolved
            self._counts["probe_samples"] += len(rewards)
            self._counts["probe_tokens"] += tokens

    def cancelled(self, samples: int, tokens: int) -> None:
        """Slots were taken back from so many samples, whose tokens are lost."""
        with self._lock:
            self._counts["probe_cancelled"] += samples
            self._counts["probe_tokens"] += tokens

    # -- checkpoints -------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Everything remembered, JSON-able. Take it after the buffer's state: it may know later draws."""
        with self._lock:
            return {
                "cursor": self._cursor,
                "step": self._step,
                "drawn": {str(index): problem for index, problem in self._drawn.items()},
                "rest": [*self._rest],
                "outcomes": {
                    str(problem): [o.correct, o.samples, o.step, o.unsolved]
                    for problem, o in self._outcomes.items()
                },
                "pool": [*self._pool],
                "counts": dict(self._counts),
            }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        with self._lock:
            self._cursor, self._step = state["cursor"], state["step"]
            self._drawn = {int(index): problem for index, problem in state["drawn"].items()}
            self._rest, self._has_edge = deque(state["rest"]), None
            self._outcomes = {
                int(problem): Outcomes(correct=c, samples=n, step=step, unsolved=unsolved)
                for problem, (c, n, step, unsolved) in state["outcomes"].items()
            }
            self._pool = deque(state["pool"])
            self._counts = dict(state["counts"])
