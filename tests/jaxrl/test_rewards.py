"""The reward pool: verdicts in order; hung, dying, raising and absent workers are handled."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from jaxrl.config import TaskConfig
from jaxrl.errors import UserError
from jaxrl.rewards.pool import RewardPool, VerifierError
from jaxrl.tasks import make_task
from jaxrl.types import Problem, Reward

RESULT_S = 60.0
"""Longest wait for a future, far beyond any of these: a lost item fails instead of hanging."""
TASK = make_task(TaskConfig(), seed=0)
PROBLEMS = TASK.problems("train")

NASTY = '''
"""A task whose completion text says what its verifier does."""

import ctypes, os, sys, time
from pathlib import Path

from jaxrl.types import Reward


class Nasty:
    name = "nasty"
    chance_rate = 0.0
    alphabet = None

    def __init__(self, config):
        self.marks = config.path

    def problems(self, split):
        return ()

    def verify(self, problem, completion, finished):
        what, _, value = completion.partition(" ")
        if what == "raise":
            raise KeyError("the verifier's own fault")
        if what == "sleep":
            time.sleep(float(value))
        if what == "meet":
            mine, other = value.split(" ")
            (self.marks / mine).touch()
            while not (self.marks / other).exists():
                time.sleep(0.01)
        if what == "hang":
            time.sleep(1e6)
        if what == "exit":
            os._exit(3)
        if what == "segfault":
            ctypes.string_at(0)
        if what == "exit_once" and not (self.marks / value).exists():
            (self.marks / value).touch()
            os._exit(3)
        pid = float(os.getpid())
        parts = {"pid": pid, "jax": float("jax" in sys.modules)}
        return Reward(total=1.0, parts=parts, correct=True)


def make(config, seed):
    return Nasty(config)


def make_only_here(config, seed):
    if os.getpid() != int(os.environ["NASTY_PARENT"]):
        raise RuntimeError("this task cannot be built in a worker")
    return Nasty(config)
'''


@pytest.fixture(scope="session")
def nasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    folder = tmp_path_factory.mktemp("nasty")
    (folder / "nasty_task.py").write_text(NASTY)
    sys.path.insert(0, str(folder))
    import nasty_task  # noqa: PLC0415

    yield nasty_task
    sys.path.remove(str(folder))


def _items(*completions: str) -> list[tuple[Problem, str, bool]]:
    return [(PROBLEMS[i], text, True) for i, text in enumerate(completions)]


def _pool(nasty, tmp_path: Path, workers: int = 1, timeout_s: float = 30.0, latency_s: float = 0.0):
    config = TaskConfig(path=tmp_path)
    return RewardPool(config, 0, workers, timeout_s, latency_s, make=nasty.make)


def _result(future: Future[list[Reward]]) -> list[Reward]:
    return future.result(timeout=RESULT_S)


@pytest.fixture(params=[0, 1, 2])
def workers(request: pytest.FixtureRequest) -> int:
    return request.param


def test_rewards_come_back_in_order_with_any_number_of_workers(workers: int):
    answers = [p.answer if i % 3 else "wrong" for i, p in enumerate(PROBLEMS[:200])]
    items = [(p, text, i % 5 > 0) for i, (p, text) in enumerate(zip(PROBLEMS, answers))]  # noqa: B905
    expected = [TASK.verify(*item) for item in items]
    assert {reward.correct for reward in expected} == {True, False}
    with RewardPool(TaskConfig(), 0, workers, 30.0, 0.0) as pool:
        futures = [pool.submit_many(items[i : i + 7]) for i in range(0, 200, 7)]
        assert [reward for future in futures for reward in _result(future)] == expected
        assert _result(pool.submit_many(items)) == expected
        assert pool.submit(*items[1]).result(timeout=RESULT_S) == expected[1]
        assert _result(pool.submit_many([])) == []
        stats = pool.stats()
    assert (stats.queue_depth, stats.done, stats.timeouts, stats.retries) == (0, 401, 0, 0)
    assert 0 < stats.latency_p50_s <= stats.latency_p90_s <= stats.latency_max_s


def test_worker_processes_load_no_jax_though_the_parent_has(nasty, tmp_path: Path):
    assert "jax" in sys.modules
    with _pool(nasty, tmp_path) as pool:
        (reward,) = _result(pool.submit_many(_items("fine")))
    assert reward.parts["jax"] == 0.0
    assert reward.parts["pid"] != os.getpid()


def test_slow_items_of_one_group_run_on_all_workers(nasty, tmp_path: Path):
    with _pool(nasty, tmp_path, workers=2, latency_s=0.06) as pool:
        rewards = _result(pool.submit_many(_items("meet a b", "meet b a")))
        assert pool.stats().timeouts == 0
    assert len({reward.parts["pid"] for reward in rewards}) == 2


def test_what_is_not_urgent_waits_for_what_is(nasty, tmp_path: Path):
    ended = []
    with _pool(nasty, tmp_path, latency_s=0.06) as pool:  # one item per message
        later = pool.submit_many(_items(*["fine"] * 3), urgent=False)
        soon = pool.submit_many(_items("fine", "fine"))
        later.add_done_callback(lambda _: ended.append("later"))
        soon.add_done_callback(lambda _: ended.append("soon"))
        _result(later)
        _result(soon)
    assert ended == ["soon", "later"]


def test_a_hung_item_alone_gets_zero_and_is_counted(nasty, tmp_path: Path):
    with _pool(nasty, tmp_path, timeout_s=0.5) as pool:
        rewards = _result(pool.submit_many(_items("fine", "hang", "fine")))
        after = _result(pool.submit_many(_items("fine")))
        stats = pool.stats()
    assert [reward.total for reward in [*rewards, *after]] == [1.0, 0.0, 1.0, 1.0]
    assert rewards[1] == Reward(total=0.0, correct=False)
    assert (stats.timeouts, stats.retries, stats.done, stats.queue_depth) == (1, 3, 4, 0)


def test_a_verifier_that_never_answered_is_an_error(nasty, tmp_path: Path):
    with _pool(nasty, tmp_path, timeout_s=0.2) as pool:
        groups = [pool.submit_many(_items("hang")) for _ in range(7)]
        assert [_result(group)[0].total for group in groups[:5]] == [0.0] * 5
        with pytest.raises(
            VerifierError, match=r"first 6 items took longer than task.reward_timeout"
        ):
            _result(groups[5])
        stats = pool.stats()
    assert (stats.timeouts >= 6, stats.errors >= 1) == (True, True)


def test_items_that_are_slow_only_together_are_not_timed_out(nasty, tmp_path: Path):
    with _pool(nasty, tmp_path, timeout_s=1.0) as pool:
        rewards = _result(pool.submit_many(_items(*["sleep 0.4"] * 4)))
        assert [reward.total for reward in rewards] == [1.0] * 4
        assert pool.stats().timeouts == 0


@pytest.mark.parametrize("death", ["exit", "segfault"])
def test_an_item_that_kills_its_worker_twice_is_an_error_and_the_pool_lives_on(
    nasty, tmp_path: Path, death: str
):
    with _pool(nasty, tmp_path) as pool:
        bad = pool.submit_many(_items("fine", death))
        good = pool.submit_many(_items("fine", "fine"))
        with pytest.raises(VerifierError, match=f"(?s){PROBLEMS[1].id}.*{death}.*ended 2 times"):
            _result(bad)
        assert [reward.total for reward in _result(good)] == [1.0, 1.0]
        assert pool.stats().queue_depth == 0


def test_a_worker_that_dies_once_costs_nothing(nasty, tmp_path: Path):
    with _pool(nasty, tmp_path) as pool:
        rewards = _result(pool.submit_many(_items("exit_once a")))
        rewards += _result(pool.submit_many(_items("fine", "exit_once b", "fine")))
        stats = pool.stats()
    assert [reward.total for reward in rewards] == [1.0] * 4
    assert stats.retries == 1 + 3


def test_a_worker_killed_while_idle_is_replaced(nasty, tmp_path: Path):
    with _pool(nasty, tmp_path) as pool:
        (first,) = _result(pool.submit_many(_items("fine")))
        os.kill(int(first.parts["pid"]), signal.SIGKILL)
        (second,) = _result(pool.submit_many(_items("fine")))
    assert second.total == 1.0
    assert second.parts["pid"] != first.parts["pid"]


def test_an_exception_in_verify_surfaces_with_problem_and_traceback(
    nasty, tmp_path: Path, workers: int
):
    with _pool(nasty, tmp_path, workers=workers) as pool:
        future = pool.submit_many(_items("fine", "raise", "fine"))
        with pytest.raises(VerifierError) as error:
            _result(future)
        single = pool.submit(PROBLEMS[0], "raise", True)
        assert isinstance(single.exception(timeout=RESULT_S), VerifierError)
        assert _result(pool.submit_many(_items("fine")))[0].total == 1.0
        assert pool.stats().queue_depth == 0
    for text in (str(PROBLEMS[1].id), PROBLEMS[1].prompt, "'raise'", "in verify", "own fault"):
        assert text in str(error.value)


def test_a_worker_that_cannot_start_is_an_error_with_its_traceback(
    nasty, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("NASTY_PARENT", str(os.getpid()))
    with RewardPool(TaskConfig(path=tmp_path), 0, 1, 30.0, 0.0, make=nasty.make_only_here) as pool:
        future = pool.submit_many(_items("fine"))
        with pytest.raises(VerifierError, match=r"(?s)cannot start.*cannot be built in a worker"):
            _result(future)


def test_an_item_that_cannot_be_sent_is_an_error(nasty, tmp_path: Path):
    unsendable = Problem(id=0, prompt=threading.Lock(), answer="", solution="")  # type: ignore
    with _pool(nasty, tmp_path) as pool:
        with pytest.raises(VerifierError, match="pickle"):
            _result(pool.submit_many([(unsendable, "fine", True)]))
        assert _result(pool.submit_many(_items("fine")))[0].total == 1.0


def test_latency_is_added_without_blocking_the_submitter(nasty, tmp_path: Path, workers: int):
    latency_s = 0.5
    with _pool(nasty, tmp_path, workers=workers, latency_s=latency_s) as pool:
        start_s = time.perf_counter()
        futures = [pool.submit_many(_items("fine")) for _ in range(2)]
        assert time.perf_counter() - start_s < latency_s
        assert not futures[0].done()
        assert pool.stats().queue_depth == 2
        for future in futures:
            _result(future)
        assert time.perf_counter() - start_s >= latency_s
        assert pool.stats().latency_p50_s >= latency_s


def _children() -> set[int]:
    pids = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    return {int(pid) for path in pids for pid in path.read_text().split()}


def test_close_leaves_no_process_no_thread_and_no_open_future(nasty, tmp_path: Path, workers: int):
    threads, children = threading.active_count(), _children()
    pool = _pool(nasty, tmp_path, workers=workers, latency_s=5.0)
    pending = [pool.submit_many(_items("hang" if workers else "fine")) for _ in range(5)]
    start_s = time.perf_counter()
    pool.close()
    assert time.perf_counter() - start_s < 4.0  # does not sit out the latency
    assert threading.active_count() == threads
    assert _children() == children
    assert all("closed" in str(future.exception(timeout=0)) for future in pending)
    assert pool.stats().queue_depth == 0
    pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit_many(_items("fine"))


def test_workers_end_when_their_parent_is_killed(tmp_path: Path):
    code = """
        import os, signal
        from jaxrl.config import TaskConfig
        from jaxrl.rewards.pool import RewardPool
        pool = RewardPool(TaskConfig(), 0, 2, 10.0, 0.0)
        problem = pool._task.problems("train")[0]
        pool.submit(problem, "", True).result()
        print(*(p._process.pid for p in pool._processes.values()), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, timeout=60, text=True
    )
    pids = [int(pid) for pid in result.stdout.split()]
    assert len(pids) == 2
    deadline_s = time.perf_counter() + RESULT_S
    while any(_alive(pid) for pid in pids) and time.perf_counter() < deadline_s:
        time.sleep(0.02)
    assert not any(_alive(pid) for pid in pids)


def _alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_models_folder_in_the_working_directory_does_not_shadow_the_workers(tmp_path: Path):
    (tmp_path / "models.py").write_text("raise RuntimeError('the wrong models')")
    root = Path(__file__).resolve().parents[2]
    code = f"""
        import sys; sys.path[0:0] = [{str(root)!r}]
        from jaxrl.config import TaskConfig
        from jaxrl.rewards.pool import RewardPool
        with RewardPool(TaskConfig(), 0, 1, 10.0, 0.0) as pool:
            problem = pool._task.problems("train")[0]
            print(pool.submit(problem, problem.answer, True).result().total)
    """
    result = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(code)],
        cwd=tmp_path, stdout=subprocess.PIPE, timeout=60, text=True, check=True,
    )  # fmt: skip
    assert result.stdout.strip() == "1.0"


def test_a_thousand_verdicts_cost_the_parent_little():
    """One training step's worth: about 20 ms when idle; the bound allows for a busy machine."""
    groups = [[(p, p.answer, True)] * 8 for p in PROBLEMS[:125]]
    with RewardPool(TaskConfig(), 0, 1, 30.0, 0.0) as pool:
        _result(pool.submit_many(groups[0]))
        start_s = time.process_time()
        futures = [pool.submit_many(group) for group in groups]
        total = sum(reward.total for future in futures for reward in _result(future))
        assert time.process_time() - start_s < 0.2
    assert total == 1000


@pytest.mark.parametrize(
    ("workers", "timeout_s", "latency_s", "says"),
    [
        (-1, 1.0, 0.0, "reward_workers=-1"),
        (1, 1.0, 1.0, "reward_latency_s=1"),
        (1, 1.0, -1.0, "-1"),
    ],
)
def test_impossible_settings_are_refused(workers, timeout_s, latency_s, says):
    with pytest.raises(UserError, match=says):
        RewardPool(TaskConfig(), 0, workers, timeout_s, latency_s)
    with pytest.raises(UserError, match=r"task\.digits"):
        RewardPool(TaskConfig(digits=0), 0, 1, 1.0, 0.0)
