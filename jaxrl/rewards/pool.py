"""Verification in worker processes, so that neither rollout nor learner waits for a verifier.

    submit_many --> queue of chunks --> one thread per worker --pipe--> worker process
                         ^                      |
                         +-- items one by one --+   after a timeout or a death

A chunk holds as many items as are expected to take 50 ms, so quick verifiers cost one message per
group and slow ones use all workers. A thread waits at most `timeout_s` for its worker's answer;
nobody waits for the threads but whoever asks a future for its result. What is not urgent is judged while
nothing urgent waits.
- Chunk too slow: the worker is killed and the items go again, one by one. An item that alone takes
  longer than `timeout_s` gets reward 0 and is counted; so no item is condemned for its neighbours.
  A verifier that does not answer one of its first items is an error.
- Worker died: the items go again, one by one. An item that then costs two workers is an error.
- `verify` raised: the future carries the error, with problem and traceback. It is never a silent 0.
"""

from __future__ import annotations

import collections
import itertools
import queue
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field

import numpy as np

from jaxrl.config import TaskConfig
from jaxrl.errors import UserError
from jaxrl.rewards.process import StartError, WorkerProcess
from jaxrl.rewards.worker import Item, Setup, Verdict, judge
from jaxrl.tasks import Task, make_task
from jaxrl.tasks.base import IsolatedTask
from jaxrl.types import Problem, Reward

_CHUNK_S = 0.05
"""Expected duration of a chunk: long against a message (0.1 ms), short against decoding a group."""
_MOST_PER_CHUNK = 64
_LATENCIES_KEPT = 4096
_DEATHS = 2
"""Workers that an item may cost on its own before it is an error."""
_HOPELESS = 6
"""Items that a verifier may spend its whole time on before it ever answers one."""
_SMOOTHING = 0.1
"""Weight of the newest chunk in the running mean of an item's duration."""


class VerifierError(UserError):
    """A verifier raised, died or could not start; the text has the problem and the verifier's traceback,
    which is what its author needs: programs print no other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardStats:
    """Counters since the start; submission-to-result latencies of the last 4096 submissions."""

    queue_depth: int
    """Items submitted and not yet judged."""
    done: int
    """Items judged, timeouts included."""
    timeouts: int
    """Items that took longer than the limit and got 0."""
    retries: int
    """Items sent again after the timeout of their chunk or the death of their worker."""
    errors: int
    """Submissions whose verifier raised or cost two workers; their futures carry the error."""
    latency_p50_s: float
    latency_p90_s: float
    latency_max_s: float

    def metrics(self) -> dict[str, float]:
        """Curves verifier/...: the fields by name."""
        return {f"verifier/{name}": float(value) for name, value in asdict(self).items()}


@dataclass(kw_only=True, slots=True, eq=False)
class _Group:
    """One submission: its future resolves when every item has a reward."""

    items: Sequence[Item]
    urgent: bool = True
    rewards: dict[int, Reward] = field(default_factory=dict)
    submitted_s: float = field(default_factory=time.perf_counter)
    future: Future[list[Reward]] = field(default_factory=Future)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Chunk:
    """Items of one group for one message."""

    group: _Group
    indices: Sequence[int]
    deaths: int = 0
    """Workers that its only item has cost."""

    @property
    def items(self) -> list[Item]:
        return [self.group.items[i] for i in self.indices]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Late:
    """Inline verdicts that are handed over when their latency has passed."""

    chunk: _Chunk
    verdicts: Sequence[Verdict]
    due_s: float


class RewardPool:
    """Verifies completions in `workers` processes; with 0 workers in the caller's thread."""

    def __init__(
        self,
        task_config: TaskConfig,
        seed: int,
        workers: int,
        timeout_s: float,
        latency_s: float,
        make: Callable[[TaskConfig, int], Task] = make_task,
    ) -> None:
        """Start the workers without waiting for them.

        timeout_s: longest verification of one item, latency included [s]; needs workers > 0.
        latency_s: added to each verification in its worker [s]; with 0 workers a timer thread adds
            it once to each submission.
        make: builds the task, here and in each worker; a function that a worker can import.
        Raises: UserError for values out of range or an isolated task without workers, and whatever
        the task raises for its configuration.
        """
        if workers < 0:
            raise UserError(f"task.reward_workers={workers} must be at least 0; usual: 1")
        if not 0 <= latency_s < timeout_s:
            raise UserError(
                f"task.reward_latency_s={latency_s} must lie in [0, task.reward_timeout_s="
                f"{timeout_s}): past the timeout every reward is 0; lower the latency or "
                "raise the timeout"
            )
        self._task = make(task_config, seed)
        if workers == 0 and isinstance(self._task, IsolatedTask):
            raise UserError(
                f"task.reward_workers=0 would run the verifier of task {self._task.name} in the "
                "trainer, which it could hang or harm; set task.reward_workers to 1 or more"
            )
        self._setup = Setup(make, task_config, seed, latency_s)
        self._timeout_s, self._latency_s = timeout_s, latency_s
        self._item_s = latency_s  # running mean duration of one item
        self._lock = threading.Lock()  # guards everything below
        self._stop = threading.Event()  # set once, by close
        self._depth = self._done = self._timeouts = self._retries = self._errors = 0
        self._latencies_s: collections.deque[float] = collections.deque(maxlen=_LATENCIES_KEPT)
        self._starts = [_Group(items=()) for _ in range(workers)]  # resolved when a worker is ready
        self._open: set[_Group] = set(self._starts)
        self._processes: dict[int, WorkerProcess] = {}
        self._chunks: queue.PriorityQueue[tuple[int, int, _Chunk | None]] = queue.PriorityQueue()
        self._arrivals = itertools.count()
        self._late: queue.SimpleQueue[_Late | None] = queue.SimpleQueue()
        self._inline = workers == 0
        self._threads = [
            threading.Thread(target=self._serve, args=(lane,), name=f"reward-{lane}", daemon=True)
            for lane in range(workers)
        ]
        if self._inline and latency_s:
            self._threads = [threading.Thread(target=self._wait, name="reward-timer", daemon=True)]
        for thread in self._threads:
            thread.start()

    def wait_ready(self) -> None:
        """Wait until every worker has built its task. Raises: VerifierError if one cannot."""
        for start in self._starts:
            start.future.result()

    def submit(self, problem: Problem, completion: str, finished: bool) -> Future[Reward]:
        """Verify one completion. The future raises VerifierError if the verifier does."""
        single: Future[Reward] = Future()
        single.set_running_or_notify_cancel()

        def hand_over(group: Future[list[Reward]]) -> None:
            if error := group.exception():
                single.set_exception(error)
            else:
                single.set_result(group.result()[0])

        self.submit_many([Item(problem, completion, finished)]).add_done_callback(hand_over)
        return single

    def submit_many(
        self, items: Sequence[tuple[Problem, str, bool] | tuple[Problem, str, bool, int]], *,
        urgent: bool = True,
    ) -> Future[list[Reward]]:  # fmt: skip
        """Verify (problem, completion text, finished, and for rewards that count them, tokens) each;
        rewards in the same order.

        The future raises VerifierError if the verifier does; it cannot be cancelled, and its
        callbacks run in a thread of the pool. urgent=False: after all urgent items that wait.
        Raises: RuntimeError after `close`.
        """
        group = _Group(items=[Item(*item[:3], *item[3:]) for item in items], urgent=urgent)
        group.future.set_running_or_notify_cancel()
        with self._lock:
            if self._stop.is_set():
                raise RuntimeError("the reward pool is closed; submit before close()")
            self._open.add(group)
            self._depth += len(items)
            size = max(1, min(_MOST_PER_CHUNK, int(_CHUNK_S / max(self._item_s, 1e-9))))
        everything = range(len(items))
        if self._inline or not items:
            self._judge_inline(_Chunk(group=group, indices=everything))
        else:
            for start in range(0, len(items), size):
                self._enqueue(_Chunk(group=group, indices=everything[start : start + size]))
        return group.future

    def _enqueue(self, chunk: _Chunk | None) -> None:
        """None ends a thread, before anything else."""
        order = -1 if chunk is None else int(not chunk.group.urgent)
        self._chunks.put((order, next(self._arrivals), chunk))

    def stats(self) -> RewardStats:
        """Counters and latencies so far; latencies are 0 before the first result."""
        with self._lock:
            latencies_s = np.array(self._latencies_s or [0.0])
            middle_s, most_s = np.quantile(latencies_s, (0.5, 0.9))
            return RewardStats(
                queue_depth=self._depth,
                done=self._done,
                timeouts=self._timeouts,
                retries=self._retries,
                errors=self._errors,
                latency_p50_s=float(middle_s),
                latency_p90_s=float(most_s),
                latency_max_s=float(latencies_s.max()),
            )

    def close(self) -> None:
        """End all processes and threads; submissions without a result get VerifierError."""
        with self._lock:
            self._stop.set()
            for process in self._processes.values():
                process.kill()
            unfinished = list(self._open)
        self._late.put(None)
        for _ in self._threads:
            self._enqueue(None)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        for group in unfinished:
            self._fail(group, VerifierError("the reward pool was closed before this was verified"))

    def __enter__(self) -> RewardPool:
        """The pool itself; leaving the block closes it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the pool."""
        self.close()

    def _judge_inline(self, chunk: _Chunk) -> None:
        verdicts = [judge(self._task, item) for item in chunk.items]
        if self._inline and self._latency_s:
            due_s = time.perf_counter() + self._latency_s
            self._late.put(_Late(chunk=chunk, verdicts=verdicts, due_s=due_s))
        else:
            self._take(chunk, verdicts)

    def _wait(self) -> None:
        """Timer thread of inline verification. One latency for all, so first in is first due."""
        while (late := self._late.get()) is not None:
            if self._stop.wait(max(0.0, late.due_s - time.perf_counter())):
                return
            self._take(late.chunk, late.verdicts)

    def _serve(self, lane: int) -> None:
        """Thread of one worker: ask it chunk after chunk, replace it when it is lost."""
        process: WorkerProcess | None = None
        chunk: _Chunk | None = _Chunk(group=self._starts[lane], indices=())  # starts it early
        while chunk is not None and not self._stop.is_set():
            try:
                process = process or self._start(lane)
                self._take(chunk, process.ask(chunk.items, self._timeout_s))
            except StartError as error:
                what = f"a verifier process of task {self._task.name} cannot start: {error}"
                self._fail(chunk.group, VerifierError(what))
                process = _discarded(process)
            except TimeoutError:
                self._after_timeout(chunk)
                process = _discarded(process)
            except (EOFError, OSError):
                self._after_death(chunk, process.discard() if process else 0)
                process = None
            except Exception:  # such as an item that cannot be pickled: the thread must live on
                self._fail(chunk.group, VerifierError(traceback.format_exc()))
                process = _discarded(process)
            chunk = self._chunks.get()[-1]
        _discarded(process)

    def _start(self, lane: int) -> WorkerProcess:
        """A new process, known to `close`. Raises: StartError if there can be none."""
        with self._lock:
            if self._stop.is_set():
                raise StartError("the pool is closed")
            self._processes[lane] = WorkerProcess(self._setup)
            return self._processes[lane]

    def _after_timeout(self, chunk: _Chunk) -> None:
        if len(chunk.indices) != 1:
            self._again(chunk, deaths=0)
            return
        with self._lock:
            counts = chunk.group in self._open
            answered = self._done - self._timeouts
            self._timeouts += counts
            hopeless = answered == 0 and self._timeouts >= _HOPELESS
            self._errors += hopeless and counts
        if not hopeless:
            self._settle(chunk, [Reward(total=0.0, correct=False)], self._timeout_s)
            return
        message = (
            f"each of the first {_HOPELESS} items took longer than task.reward_timeout_s="
            f"{self._timeout_s:g} s and none was judged; raise the limit, or look for a loop without end"
        )
        self._fail(chunk.group, self._error(chunk.items[0], message))

    def _after_death(self, chunk: _Chunk, exit_code: int) -> None:
        deaths = chunk.deaths + 1 if len(chunk.indices) == 1 else 0
        if deaths < _DEATHS:
            self._again(chunk, deaths)
            return
        with self._lock:
            self._errors += chunk.group in self._open
        item = chunk.items[0]
        message = (
            f"the verifier process ended {deaths} times (exit code {exit_code}; stderr says more)"
        )
        self._fail(chunk.group, self._error(item, message))

    def _again(self, chunk: _Chunk, deaths: int) -> None:
        with self._lock:
            self._retries += len(chunk.indices)
        if not chunk.indices:  # a start
            self._enqueue(chunk)
        for i in chunk.indices:
            self._enqueue(_Chunk(group=chunk.group, indices=[i], deaths=deaths))

    def _take(self, chunk: _Chunk, verdicts: Sequence[Verdict]) -> None:
        """Hand verdicts to their group, or the first error among them."""
        rewards = []
        for item, verdict in zip(chunk.items, verdicts, strict=True):
            if verdict.reward is None:
                with self._lock:
                    self._errors += chunk.group in self._open
                self._fail(chunk.group, self._error(item, verdict.traceback))
                return
            rewards.append(verdict.reward)
        item_s = sum(verdict.duration_s for verdict in verdicts) / max(len(verdicts), 1)
        self._settle(chunk, rewards, item_s)

    def _settle(self, chunk: _Chunk, rewards: Sequence[Reward], item_s: float) -> None:
        """Store rewards and resolve the group's future with the last, unless it is settled."""
        group = chunk.group
        with self._lock:
            if group not in self._open:
                return
            if rewards:
                self._item_s += _SMOOTHING * (item_s - self._item_s)
            group.rewards.update(zip(chunk.indices, rewards, strict=True))
            self._depth -= len(rewards)
            self._done += len(rewards)
            if len(group.rewards) < len(group.items):
                return
            self._open.remove(group)
            if group.items:
                self._latencies_s.append(time.perf_counter() - group.submitted_s)
        group.future.set_result([group.rewards[i] for i in range(len(group.items))])

    def _fail(self, group: _Group, error: VerifierError) -> None:
        """Resolve the group's future with an error, unless it is settled."""
        with self._lock:
            if group not in self._open:
                return
            self._open.remove(group)
            self._depth -= len(group.items) - len(group.rewards)
        group.future.set_exception(error)

    def _error(self, item: Item, what: str) -> VerifierError:
        return VerifierError(
            f"the verifier of task {self._task.name} failed on problem {item.problem.id}\n"
            f"  prompt {item.problem.prompt!r}\n  completion {item.completion[:500]!r}\n"
            f"  row {dict(item.problem.row)!r:.500}\n{what}"
        )


def _discarded(process: WorkerProcess | None) -> None:
    if process:
        process.discard()
