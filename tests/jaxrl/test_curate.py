"""Difficulty curation: who is kept and why, what is written, and a start that goes on where one was killed."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxrl import curate
from jaxrl.cli import save_config
from jaxrl.config import Config, RunConfig, TaskConfig
from jaxrl.curate import CurateArgs
from jaxrl.errors import UserError
from jaxrl.grades import (
    EASY,
    KEPT,
    UNSOLVED,
    WRONG_LABEL,
    Grade,
    decide,
    first_grades,
    graded,
    header_of,
    read_grades,
    with_task_of,
)
from jaxrl.tasks import make_task
from jaxrl.types import Problem, Reward

ROOT = Path(__file__).resolve().parents[2]
USUAL = {"min_correct": 1, "max_share": 0.75, "majority_share": 0.5625}


def grade(correct: int, votes: int = 0, *, majority_correct: bool = False, id: int = 0) -> Grade:
    return Grade(
        id=id, samples=16, correct=correct, truncated=0, majority="7" if votes else "", votes=votes,
        majority_correct=majority_correct,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("one", "reason"),
    [
        (grade(0), UNSOLVED),
        (grade(1), KEPT),
        (grade(12, 12, majority_correct=True), KEPT),
        (grade(13, 13, majority_correct=True), EASY),
        (grade(16, 16, majority_correct=True), EASY),
        (grade(0, 9), WRONG_LABEL),
        (grade(0, 8), UNSOLVED),
        (grade(4, 9), WRONG_LABEL),
        (grade(4, 12, majority_correct=True), KEPT),
    ],
)
def test_a_problem_is_kept_or_dropped_for_its_reason(one, reason) -> None:
    assert decide(one, **USUAL) == reason


def test_a_grade_counts_answers_and_not_texts() -> None:
    def reward(answer: str, correct: bool = False) -> Reward:
        return Reward(total=float(correct), correct=correct, answer=answer)

    one = graded(3, [reward("5"), reward("7", True), reward("5"), reward("")], truncated=1)
    assert (one.correct, one.majority, one.votes, one.majority_correct) == (1, "5", 2, False)
    assert graded(3, [reward(""), reward("")], truncated=0).votes == 0
    assert graded(3, [reward("7", True)], truncated=0).majority_correct


def problems(number: int = 60) -> list[Problem]:
    return [Problem(id=n, prompt=f"{n}=", answer=str(n), solution="") for n in range(number)]


def test_the_result_is_what_the_jsonl_task_trains_on(tmp_path: Path) -> None:
    out = tmp_path / "kept.jsonl"
    grades = [grade(4 if n % 2 else 0, id=n) for n in range(60)]
    counts = curate.write(problems(), grades, CurateArgs(out=out), {})
    assert counts == {KEPT: 30, UNSOLVED: 30}
    task = make_task(TaskConfig(name="jsonl", path=out), 0)
    assert {p.prompt for p in task.problems("train")} <= {f"{n}=" for n in range(1, 60, 2)}
    first = json.loads(out.read_text().splitlines()[0])
    assert first["curation"]["pass_rate"] == 0.25
    dropped = [json.loads(line) for line in (tmp_path / "kept.dropped.jsonl").open()]
    assert {row["curation"]["reason"] for row in dropped} == {UNSOLVED}


def first_pass(path: Path, of: list[Problem], number: int = 60) -> Path:
    """The log of a weak policy that solved nothing, on `number` problems."""
    task = TaskConfig(name="arithmetic", digits=1, prompt_template="{problem}!", num_train=60)
    header = header_of(Config(task=task, run=RunConfig(seed=7)), "weak", of, 16)
    lines = [header, *(dataclasses.asdict(grade(0, id=n)) for n in range(number))]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_second_pass_decides_alone_and_remembers_the_first(tmp_path: Path) -> None:
    log, out = first_pass(tmp_path / "weak.graded.jsonl", problems()), tmp_path / "final.jsonl"
    strong = [grade(4, id=n) for n in range(60)]
    first = first_grades(log, problems())
    counts = curate.write(problems(), strong, CurateArgs(out=out, first_pass=log), first)
    assert counts[KEPT] == 60  # all unsolved by the weak policy
    row = json.loads(out.read_text().splitlines()[0])
    assert (row["curation"]["first_pass_rate"], row["curation"]["pass_rate"]) == (0, 0.25)


def test_the_second_pass_grades_the_task_of_the_first_whatever_its_policy_trained_on(
    tiny_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its policy was trained on what the first pass kept, a handful of the original problems."""
    kept = tmp_path / "kept.jsonl"
    kept.write_text("".join(f'{{"prompt": "{n}+1=", "answer": "{n + 1}"}}\n' for n in range(60)))
    config = tiny_config()
    original = make_task(config.task, config.run.seed).problems("train")
    log = tmp_path / "weak.graded.jsonl"
    lines = [header_of(config, "weak", original, 16)]
    lines += [dataclasses.asdict(grade(0, id=p.id)) for p in original]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    strong = dataclasses.replace(
        config, task=TaskConfig(name="jsonl", path=kept), run=RunConfig(seed=9)
    )
    save_config(strong, tmp_path / "strong.yaml")
    asked = []

    def grade_all(config, which, subject, problems, args, console) -> list:
        asked.extend(p.id for p in problems)
        return [grade(4, id=p.id) for p in problems]

    monkeypatch.setattr(curate, "grade_all", grade_all)
    monkeypatch.setattr(curate, "start_devices", lambda _: None)
    words = ["--config", str(tmp_path / "strong.yaml"), "--out", str(tmp_path / "final.jsonl")]
    curate.main([*words, "--first-pass", str(log)])
    assert asked == [p.id for p in original]


def test_a_first_pass_of_other_problems_or_an_unfinished_one_is_refused(tmp_path: Path) -> None:
    log = tmp_path / "weak.graded.jsonl"
    first_pass(log, problems(), number=50)
    made = with_task_of(Config(), log)
    assert (made.task.digits, made.task.prompt_template, made.run.seed) == (1, "{problem}!", 7)
    with pytest.raises(UserError, match="lacks 10 of 60 problems; start that pass again"):
        first_grades(log, problems())
    with pytest.raises(UserError, match="graded other problems than these 59; give the --split"):
        first_grades(log, problems(59))
    for path in (tmp_path / "none.jsonl", tmp_path / "kept.jsonl"):
        with pytest.raises(UserError, match="is no log of an earlier pass; give its OUT"):
            with_task_of(Config(), path)
        (tmp_path / "kept.jsonl").write_text('{"prompt": "1", "answer": "2"}\n')


def test_a_log_of_other_settings_is_refused_and_a_torn_line_dropped(tmp_path: Path) -> None:
    log, header = tmp_path / "a.graded.jsonl", {"samples": 16, "seed": 0}
    whole = json.dumps(header) + "\n" + json.dumps(dataclasses.asdict(grade(1, id=5))) + "\n"
    log.write_text(whole + '{"id": 6, "samp')
    assert set(read_grades(log, header)) == {5}
    assert log.read_text() == whole
    with pytest.raises(UserError, match="samples=16, but this start has samples=8"):
        read_grades(log, {"samples": 8, "seed": 0})
    log.write_text(json.dumps({"task": {"digits": 2, "reward_workers": 1}}) + "\n")
    assert read_grades(log, {"task": {"digits": 2, "reward_workers": 2}}) == {}
    with pytest.raises(UserError, match=r"task\.digits=2, but this start has task\.digits=3"):
        read_grades(log, {"task": {"digits": 3, "reward_workers": 2}})
    log.write_text(json.dumps({"weights": "runs/a 20"}) + "\n")
    with pytest.raises(
        UserError, match="has weights=runs/a 40; name the run's step with --checkpoint"
    ):
        read_grades(log, {"weights": "runs/a 40"})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"min_correct": 13}, "keep nothing"),
        ({"min_correct": 0}, "keep nothing"),
        ({"majority_share": 0.0}, "must lie in"),
    ],
)
def test_thresholds_that_keep_nothing_are_refused(settings, said) -> None:
    with pytest.raises(UserError, match=said):
        CurateArgs(out=Path("x.jsonl"), **settings)


def test_a_run_that_trains_on_is_graded_at_the_step_it_had(
    tiny_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Devices first: looking for checkpoints starts jax."""
    folder, order = tmp_path / "run", []
    (folder / "checkpoints" / "0").mkdir(parents=True)
    save_config(tiny_config(), folder / "config.yaml")
    monkeypatch.setattr(curate, "start_devices", lambda _: order.append("devices"))
    monkeypatch.setattr(curate.evaluate, "step_of", lambda *_: order.append("step") or 40)

    def grade_all(config, which, subject, problems, args, console) -> list:
        order.append(curate.weights_of(config, which))
        raise KeyboardInterrupt

    monkeypatch.setattr(curate, "grade_all", grade_all)
    with pytest.raises(SystemExit):
        curate.main(["--run", str(folder), "--out", str(tmp_path / "kept.jsonl")])
    assert order == ["devices", "step", f"{folder} 40"]


def command(config: Path, out: Path) -> list[str]:
    words = ["--config", str(config), "--out", str(out), "--samples", "16"]
    return [sys.executable, "-m", "jaxrl.curate", *words]


@pytest.mark.slow
def test_a_killed_start_goes_on_and_ends_as_an_undisturbed_one(
    tiny_config: Callable[..., Config], tmp_path: Path
) -> None:
    kept = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PJRT_NPROC")}
    environment = {**kept, "JAX_PLATFORMS": "cpu"}
    config = tmp_path / "tiny.yaml"
    save_config(tiny_config(), config)
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    subprocess.run(command(config, whole), cwd=ROOT, env=environment, check=True, timeout=240)
    process = subprocess.Popen(command(config, parts), cwd=ROOT, env=environment)
    log = tmp_path / "parts.graded.jsonl"
    began = time.monotonic()
    while not log.exists() or len(log.read_bytes().splitlines()) < 5:
        assert time.monotonic() - began < 240
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    done_before = log.read_bytes().splitlines()[:5]
    subprocess.run(command(config, parts), cwd=ROOT, env=environment, check=True, timeout=240)
    assert log.read_bytes().splitlines()[:5] == done_before
    for kind in ("", ".dropped"):
        one, other = (tmp_path / f"{name}{kind}.jsonl" for name in ("whole", "parts"))
        assert one.read_bytes() == other.read_bytes()
    lines = (
        whole.read_text().splitlines() + (tmp_path / "whole.dropped.jsonl").read_text().splitlines()
    )
    assert len(lines) == len(make_task(tiny_config().task, 0).problems("train"))
