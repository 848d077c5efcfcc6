"""Calibration with a run's own lanes: every phase alone and beside the other lane, rewards that are coins."""

import dataclasses
from collections.abc import Callable

import pytest

from jaxrl import build, trial
from jaxrl.config import Config, TaskConfig
from jaxrl.devices import make_meshes
from jaxrl.tasks.base import IsolatedTask
from jaxrl.trial import coin_task, trial_spans
from jaxrl.types import Problem
from roofline.analyse import companies
from roofline.datasheets import datasheet
from roofline.fit import fit_lanes
from roofline.phases import Phase

LOCKSTEP_SHARE = (
    0.35  # the learner still logs a step while the next one's prompts enter their slots
)


def test_verdicts_are_coins_whatever_is_answered() -> None:
    task = coin_task(TaskConfig(num_train=64, num_eval=8), 0)
    problem = task.problems("train")[0]
    verdicts = [task.verify(problem, str(n), True) for n in range(64)]
    assert {verdict.total for verdict in verdicts} == {0.0, 1.0}
    assert all(verdict.correct == bool(verdict.total) for verdict in verdicts)
    again = [task.verify(problem, str(n), True) for n in range(64)]
    assert [v.total for v in again] == [v.total for v in verdicts]


def test_a_task_that_is_verified_apart_stays_so() -> None:
    assert not isinstance(coin_task(TaskConfig(num_train=64, num_eval=8), 0), IsolatedTask)

    class Apart:
        name, alphabet, chance_rate = "apart", None, 0.0
        loaded = False

        def problems(self, split: str) -> list[Problem]:
            return []

        def verify(self, problem: Problem, completion: str, finished: bool) -> None: ...

        def load_verifier(self) -> None:
            self.loaded = True

    task = Apart()
    wrapped = trial._IsolatedCoinTask(task)  # type: ignore[arg-type]
    assert isinstance(wrapped, IsolatedTask)
    wrapped.load_verifier()
    assert task.loaded


@pytest.mark.usefixtures("optax_promotes")
@pytest.mark.slow
def test_the_lanes_run_every_phase_in_lockstep_and_beside_each_other(
    tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config()
    rollout = dataclasses.replace(config.rollout, max_staleness=1)
    config = dataclasses.replace(config, rollout=rollout)
    subject, hardware = build.make_subject(config), datasheet("h200")
    spans = trial_spans(config, subject, make_meshes(config.mesh), hardware, 1.0)
    timed = {span.phase for span in spans if span.cost is not None}
    needed = {Phase.PREFILL, Phase.DECODE, Phase.TRAIN, Phase.OPTIMIZER, Phase.PUBLISH}
    assert needed <= timed
    published = [i for i, span in enumerate(spans) if span.phase is Phase.PUBLISH]
    lockstep = published[2 * trial.FEWEST_STEPS - 1]
    beside = [company.lane for company in companies(spans)]
    trained = [i for i, span in enumerate(spans) if span.phase is Phase.TRAIN and span.cost]
    assert all(beside[i] < LOCKSTEP_SHARE for i in trained if i < lockstep)
    known = fit_lanes(spans, hardware)
    assert needed <= {Phase(name) for name in known.phase_efficiency}
    assert not (config.run.dir / "spans.jsonl").exists()
