"""Probes fill idle slots and give them back: a batch is sampled as soon, and as it was, without them."""

import threading
from concurrent.futures import Future

import numpy as np
import pytest

from jaxrl.buffer import GroupBuffer
from jaxrl.config import CurriculumConfig
from jaxrl.curriculum import FIRST_PROBE, EdgeStream
from jaxrl.length_curriculum import LengthCurriculum, Stage
from jaxrl.observe import Observer
from jaxrl.prompts import PromptStream
from jaxrl.rollout.engine import SamplingParams
from jaxrl.rollout.probes import Probes, ProbeSettings
from jaxrl.rollout.worker import RolloutWorker, Stages
from jaxrl.tokenizer import CharTokenizer
from jaxrl.types import Completion, Finish, Problem, Reward

P, G, SLOTS = 3, 4, 16
PARAMS = SamplingParams(max_new_tokens=4, stop_ids=(1,))
PROBLEMS = [Problem(id=n, prompt=str(n), answer="", solution="") for n in range(9)]


class Engine:
    """Slots that count: sample i of stream s takes 1 + (s + i) % 5 chunks, a probe 50."""

    max_prompt_tokens = 4

    def __init__(self, slots: int = SLOTS) -> None:
        self.num_slots = slots
        self.queue: list = []
        self.live: dict = {}  # (stream, sample) -> [request, chunks left]
        self.waited_behind_probes = 0
        self.has_tickets = lambda: False
        self.waiting = self.longest_wait = 0  # chunks in a row with probes while tickets wait
        self.most_probes = self.chunks = 0
        self.freed = False

    @property
    def num_free_slots(self) -> int:
        return max(0, self.num_slots - len(self.live) - len(self.queue))

    @property
    def is_idle(self) -> bool:
        return not self.live and not self.queue

    def submit(self, request) -> None:
        self.queue += [(request, i) for i in request.sample_indices]

    def cancel(self, streams) -> tuple[int, int]:
        queued = [e for e in self.queue if e[0].stream in streams]
        self.queue = [e for e in self.queue if e[0].stream not in streams]
        dead = [key for key in self.live if key[0] in streams]
        for key in dead:
            del self.live[key]
        return len(queued) + len(dead), len(dead)

    def free(self) -> None:
        self.freed = True

    def run_chunk(self, snapshot, *, more_waits: bool = False) -> list:
        self.chunks += 1
        while self.queue and len(self.live) < self.num_slots:
            request, i = self.queue.pop(0)
            probe = request.stream >= FIRST_PROBE
            self.live[request.stream, i] = [request, 50 if probe else 1 + (request.stream + i) % 5]
        probes = sum(stream >= FIRST_PROBE for stream, _ in self.live)
        self.most_probes = max(self.most_probes, probes)
        self.waited_behind_probes += bool(probes and self.queue)
        self.waiting = self.waiting + 1 if probes and self.has_tickets() else 0
        self.longest_wait = max(self.longest_wait, self.waiting)
        done = []
        for (stream, i), entry in list(self.live.items()):
            entry[1] -= 1
            if entry[1] == 0:
                del self.live[stream, i]
                completion = Completion(
                    tokens=np.array([1], np.int32), sampler_logprobs=np.zeros(1, np.float32),
                    versions=np.zeros(1, np.int32), finish=Finish.STOP, sample_index=i,
                )  # fmt: skip
                done.append((entry[0], completion))
        return done


class Rewards:
    """Half of the samples of every third problem are right, and all others wrong."""

    def submit_many(self, items, *, urgent: bool) -> Future:
        future: Future = Future()
        right = [p.id % 3 == 0 and n % 2 == 0 for n, (p, *_) in enumerate(items)]
        future.set_result([Reward(total=float(r), correct=r) for r in right])
        return future


class Blind(GroupBuffer):
    """Its tickets always come after the look and before the draw."""

    @property
    def has_tickets(self) -> bool:
        return False


class Store:
    def current(self):
        return None


def run(
    steps: int, *, probe_slots: int, stages: Stages | None = None, engine: Engine | None = None,
    buffer_of: type[GroupBuffer] = GroupBuffer,
):  # fmt: skip
    """Groups of each step, the engine and the stream after `steps` steps of a run that learns at once."""
    base = PromptStream(PROBLEMS, CharTokenizer("0123456789"), 0, 4, False)
    edge = EdgeStream(
        base, CurriculumConfig(edge=True, unsolved_after=G, probe_slots=max(probe_slots, 4))
    )
    engine = engine or Engine()
    buffer = buffer_of(edge, prompts_per_step=P, max_staleness=0)
    engine.has_tickets = lambda: buffer._free_tickets > 0
    settings = ProbeSettings(source=edge, slots=probe_slots, samples=4)
    worker = RolloutWorker(
        engine, Store(), buffer, Rewards(), CharTokenizer("0123456789"), group_size=G,
        params=PARAMS, observer=Observer(), stages=stages,
        probes=settings if probe_slots else None,
    )  # fmt: skip
    seen = []
    with worker:
        for step in range(1, steps + 1):
            groups = buffer.take()
            seen.append([g.prompt.problem.id for g in groups])
            edge.observe(groups, step)
            if (
                probe_slots and step > 3
            ):  # everything is unsolved by then: probes run while we learn
                wait_until(lambda: any(s >= FIRST_PROBE for s, _ in list(engine.live)))
            buffer.release(step)
    return seen, engine, edge


def wait_until(holds) -> None:
    for _ in range(20000):
        try:
            if holds():
                return
        except RuntimeError:  # the other thread changed what we look at
            continue
        threading.Event().wait(0.0005)
    pytest.fail("no probe was started while slots stood idle")


def test_no_sample_of_the_batch_ever_waits_behind_a_probe() -> None:
    plain, _, _ = run(12, probe_slots=0)
    probed, engine, edge = run(12, probe_slots=12)
    assert engine.waited_behind_probes == 0
    assert 0 < engine.most_probes <= 12
    assert probed == plain  # probes that never succeed change nothing
    curves = edge.curves()
    assert curves["curriculum/probe_cancelled"] > 0
    assert curves["curriculum/promoted"] == 0


def test_probes_in_every_slot_give_way_to_the_next_batch_within_a_chunk() -> None:
    _, engine, edge = run(8, probe_slots=SLOTS)
    assert engine.most_probes == SLOTS
    assert engine.longest_wait <= 1  # tickets may arrive while a chunk runs
    assert edge.curves()["curriculum/probe_cancelled"] > 0


def test_tickets_that_come_while_probes_are_seated_take_the_slots_back() -> None:
    plain, _, _ = run(8, probe_slots=0)
    probed, engine, edge = run(8, probe_slots=12, buffer_of=Blind)
    assert probed == plain
    assert engine.longest_wait <= 1
    assert edge.curves()["curriculum/probe_cancelled"] > 0


def test_a_probe_without_a_verdict_holds_its_share_of_the_slots() -> None:
    """So that a slow verifier never has more probes before it than slots may hold."""
    base = PromptStream(PROBLEMS, CharTokenizer("0123456789"), 0, 4, False)
    edge = EdgeStream(base, CurriculumConfig(edge=True, unsolved_after=4, probe_slots=8))
    for problem in PROBLEMS:
        edge._update(problem.id, 0, 4)  # all unsolved
    engine, verdicts = Engine(), []
    probes = Probes(ProbeSettings(source=edge, slots=8, samples=4), Observer(), pytest.fail)

    def judge(prompt, completions) -> Future:
        verdicts.append(Future())
        return verdicts[-1]

    probes.fill(engine, PARAMS)
    assert len(engine.queue) == 8
    while not engine.is_idle:
        for request, completion in engine.run_chunk(None):
            probes.finish(request, completion, judge)
    probes.fill(engine, PARAMS)
    assert (len(verdicts), engine.queue) == (2, [])
    verdicts[0].set_result([Reward(total=0.0, correct=False)] * 4)
    probes.fill(engine, PARAMS)
    assert len(engine.queue) == 4


def test_a_change_of_stage_waits_for_what_is_under_way_and_frees_the_old_engine() -> None:
    lengths = LengthCurriculum(
        (Stage(number=0, max_new_tokens=2, slots=8), Stage(number=1, max_new_tokens=4, slots=4)),
        CurriculumConfig(lengths=(2, 4), stage_steps=(2,)),
    )
    first, made = Engine(8), []

    def make_engine(stage: Stage) -> Engine:
        assert first.is_idle
        made.append(Engine(stage.slots))
        return made[-1]

    stages = Stages(lengths=lengths, make_engine=make_engine)
    base = PromptStream(PROBLEMS, CharTokenizer("0123456789"), 0, 4, False)
    buffer = GroupBuffer(base, prompts_per_step=P, max_staleness=1)
    worker = RolloutWorker(
        first, Store(), buffer, Rewards(), CharTokenizer("0123456789"), group_size=G,
        params=SamplingParams(max_new_tokens=2, stop_ids=(1,)), observer=Observer(), stages=stages,
    )  # fmt: skip
    with worker:
        for step in range(1, 7):
            assert len(buffer.take()) == P
            lengths.observe(0.0, step)
            buffer.release(step)
    assert first.freed
    assert [engine.num_slots for engine in made] == [4]
    assert made[0].chunks > 0
