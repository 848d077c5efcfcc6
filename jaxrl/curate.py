"""`python -m jaxrl.curate`: keep the problems a policy can learn from (Magistral, arXiv:2506.10910 section 4).

    python -m jaxrl.curate --run runs/weak --out easy.jsonl                       first pass, a weak policy
    python -m jaxrl.train --task.name jsonl --task.path easy.jsonl ...            a stronger one
    python -m jaxrl.curate --run runs/strong --out final.jsonl --first-pass easy.graded.jsonl

k samples of each problem, then: dropped if a confident majority agrees on an answer that is not the
label (presumed wrong), if never solved, if nearly always solved; kept otherwise. The second pass grades
the WHOLE original set again, for the first would throw away hard problems that can be solved: whatever
the stronger policy was trained on, --first-pass says which task that is.
Departures: the paper prints no thresholds; the defaults here are 1 to 12 of 16 and a majority of 9.

    OUT.jsonl            kept problems, which task.name=jsonl trains on; `curation` says why
    OUT.dropped.jsonl    the others, with the reason
    OUT.graded.jsonl     counts of every problem, written as they come: a stopped start goes on here
"""

from __future__ import annotations

import sys
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from jaxrl import build, evaluate
from jaxrl.cli import user_errors
from jaxrl.config import Config
from jaxrl.devices import make_meshes, start_devices
from jaxrl.errors import UserError
from jaxrl.grades import (
    KEPT,
    Grade,
    decide,
    first_grades,
    grade_record,
    graded,
    header_of,
    read_grades,
    with_task_of,
)
from jaxrl.observe import Observer
from jaxrl.prompts import encode_prompt
from jaxrl.rewards.pool import RewardPool
from jaxrl.rollout.engine import Request, RolloutEngine, SamplingParams
from jaxrl.rollout.worker import completion_text
from jaxrl.telemetry.jsonl import dump_line
from jaxrl.telemetry.progress import make_console
from jaxrl.types import Completion, Finish, Problem, Reward, Snapshot

_VERDICTS_AHEAD = 256
"""Problems at the verifiers at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CurateArgs:
    """Sample every problem of a task and keep those of middling difficulty."""

    out: Path
    """Kept problems, .jsonl; two files of the same name with .dropped and .graded go beside it."""
    run: Path | None = None
    """Run folder: its configuration and its newest checkpoint."""
    checkpoint: str | None = None
    """With --run: the step to load. Without: a folder with config.json and safetensors, as model.path."""
    config: str | None = None
    """Task and sampling settings when there is no --run: a YAML file or a name from configs/."""
    split: Literal["train", "all"] = "train"
    """Problems graded. The result is split anew, so with `all` held-out problems become training ones."""
    samples: int = 16
    """k, completions per problem."""
    min_correct: int = 1
    """Fewest correct ones of a problem that is kept."""
    max_share: float = 0.75
    """Largest share of correct ones of a problem that is kept."""
    majority_share: float = 0.5625
    """A wrong answer in at least this share of the completions means that the label is wrong."""
    temperature: float | None = None
    """Sampling temperature; default: the configuration's eval.temperature."""
    first_pass: Path | None = None
    """OUT.graded.jsonl of a weaker policy: its task is graded again, in place of the configuration's, and its
    pass rates are kept beside those of this one."""
    debug: bool = False
    """Show the traceback of an error as well as its message."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_correct <= self.max_share * self.samples:
            raise UserError(
                f"--min-correct {self.min_correct} and --max-share {self.max_share} keep nothing of "
                f"--samples {self.samples}; usual: 1, 0.75 and 16"
            )
        if not 0 < self.majority_share <= 1:
            raise UserError(
                f"--majority-share {self.majority_share} must lie in (0, 1]; usual: 0.56"
            )


def main(argv: Sequence[str] | None = None) -> None:
    """Grade what is not graded yet, decide, write, print."""
    argv = sys.argv[1:] if argv is None else argv
    with user_errors(debug="--debug" in argv):
        args = tyro.cli(CurateArgs, args=list(argv), prog="python -m jaxrl.curate")
        which = evaluate.EvaluateArgs(
            run=args.run, checkpoint=args.checkpoint, config=args.config,
            temperature=args.temperature,
        )  # fmt: skip
        config = evaluate.config_of(which)
        if args.first_pass is not None:
            config = with_task_of(config, args.first_pass)
        start_devices(config.mesh.devices)  # before checkpoints are looked at, which starts jax
        if args.run is not None:  # whatever it trains meanwhile, the same policy grades to the end
            which = replace(which, checkpoint=str(evaluate.step_of(config, which)))
        console = make_console()
        subject = build.make_subject(config)
        problems = _problems(subject, args.split)
        first = {} if args.first_pass is None else first_grades(args.first_pass, problems)
        grades = grade_all(config, which, subject, problems, args, console)
        counts = write(problems, grades, args, first)
        _print(counts, args, console)
        for note in _notes(config, grades, first, args):
            console.print(note, markup=False, soft_wrap=True)


def _problems(subject: build.Subject, split: str) -> list[Problem]:
    if split == "train":
        return [*subject.task.problems("train")]
    splits = [subject.task.problems(name) for name in ("train", "validation", "test")]
    return [problem for part in splits for problem in part]


def grade_all(
    config: Config, which: evaluate.EvaluateArgs, subject: build.Subject,
    problems: Sequence[Problem], args: CurateArgs, console: Console,
) -> list[Grade]:  # fmt: skip
    """A grade for each problem, in their order; those in the log of an earlier start are not made again."""
    log = sibling(args.out, "graded")
    header = header_of(config, weights_of(config, which), problems, args.samples)
    known = read_grades(log, header)
    todo = [n for n, problem in enumerate(problems) if problem.id not in known]
    if todo:
        learner_mesh, rollout_mesh = make_meshes(config.mesh)
        with ExitStack() as stack:
            rewards = stack.enter_context(build.make_rewards(config))
            build.await_verifiers(config, rewards)
            step, policy = evaluate.load_weights(config, which, subject, learner_mesh)
            store = build.make_store(config, subject.model, learner_mesh, rollout_mesh)
            grader = Grader(
                engine=build.make_engine(config, subject, rollout_mesh, Observer()),
                rewards=rewards, subject=subject, samples=args.samples,
                params=SamplingParams(
                    temperature=config.eval.temperature,
                    max_new_tokens=config.rollout.max_new_tokens,
                    stop_ids=subject.tokenizer.stop_ids,
                ),
            )  # fmt: skip
            columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn())
            bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)
            stack.enter_context(bar)
            task = bar.add_task("grading", total=len(problems), completed=len(known))
            file = stack.enter_context(log.open("a", encoding="utf-8"))
            if not known and not log.stat().st_size:
                file.write(dump_line(header))
            for grade in grader.run(store.publish(step, policy), problems, todo):
                known[grade.id] = grade
                file.write(dump_line(grade_record(grade)))
                file.flush()
                bar.advance(task)
    return [known[problem.id] for problem in problems]


def weights_of(config: Config, which: evaluate.EvaluateArgs) -> str:
    """Name of the policy that grades, for the log."""
    return f"{which.run or config.model.path or 'from scratch'} {which.checkpoint or ''}".strip()


@dataclass(frozen=True, kw_only=True, slots=True)
class Grader:
    """Samples problems with the rollout engine; verification overlaps sampling."""

    engine: RolloutEngine
    rewards: RewardPool
    subject: build.Subject
    samples: int
    params: SamplingParams

    def run(
        self, snapshot: Snapshot, problems: Sequence[Problem], todo: Sequence[int]
    ) -> Iterator[Grade]:
        """Grades of the problems at positions `todo`, as they are done.

        A problem's samples depend on its position and the weights, not on what is left to do.
        """
        prompts = {n: self._encoded(problems[n]) for n in todo}
        waiting = deque(todo)
        rows: dict[int, list[Completion]] = {}
        judging: deque[tuple[int, list[Completion], Future[list[Reward]]]] = deque()
        while waiting or not self.engine.is_idle:
            while waiting and self.engine.num_free_slots > 0:
                self._submit(n := waiting.popleft(), prompts.pop(n))
                rows[n] = []
            for request, completion in self.engine.run_chunk(snapshot, more_waits=bool(waiting)):
                row = rows[request.stream]
                row.append(completion)
                if len(row) == self.samples:
                    done = rows.pop(request.stream)
                    future = self._judge(problems[request.stream], done)
                    judging.append((request.stream, done, future))
            while judging and (judging[0][2].done() or len(judging) > _VERDICTS_AHEAD):
                yield self._grade(problems, *judging.popleft())
        while judging:
            yield self._grade(problems, *judging.popleft())

    def _encoded(self, problem: Problem) -> tuple[int, ...]:
        longest = self.engine.max_prompt_tokens
        return encode_prompt(problem, self.subject.tokenizer, longest, self.subject.add_bos)

    def _submit(self, position: int, prompt: tuple[int, ...]) -> None:
        indices = tuple(range(self.samples))
        self.engine.submit(
            Request(stream=position, prompt=prompt, sample_indices=indices, params=self.params)
        )

    def _judge(self, problem: Problem, row: Sequence[Completion]) -> Future[list[Reward]]:
        tokenizer = self.subject.tokenizer
        return self.rewards.submit_many(
            [
                (problem, completion_text(tokenizer, c), c.finish is Finish.STOP, len(c.tokens))
                for c in row
            ]
        )

    def _grade(
        self, problems: Sequence[Problem], position: int, row: Sequence[Completion],
        future: Future[list[Reward]],
    ) -> Grade:  # fmt: skip
        ordered = sorted(
            zip(row, future.result(), strict=True), key=lambda both: both[0].sample_index
        )
        rewards = [reward for _, reward in ordered]
        truncated = sum(c.finish is Finish.LENGTH for c in row)
        return graded(problems[position].id, rewards, truncated)


def _reason(grade: Grade, args: CurateArgs) -> str:
    return decide(
        grade, min_correct=args.min_correct, max_share=args.max_share,
        majority_share=args.majority_share,
    )  # fmt: skip


def write(
    problems: Sequence[Problem], grades: Sequence[Grade], args: CurateArgs,
    first: Mapping[int, Grade],
) -> Mapping[str, int]:  # fmt: skip
    """Write OUT.jsonl and OUT.dropped.jsonl, each in one move; returns problems by reason.

    first: what the first pass said of each problem; empty where there was none.
    """
    kept: list[str] = []
    dropped: list[str] = []
    counts: Counter[str] = Counter({KEPT: 0})
    for problem, grade in zip(problems, grades, strict=True):
        reason = _reason(grade, args)
        counts[reason] += 1
        row = _row(problem, grade, reason, first.get(problem.id))
        (kept if reason == KEPT else dropped).append(dump_line(row))
    for path, lines in ((args.out, kept), (sibling(args.out, "dropped"), dropped)):
        partial = path.with_name(path.name + ".partial")
        partial.write_text("".join(lines), encoding="utf-8")
        partial.replace(path)
    return counts


def _row(problem: Problem, grade: Grade, reason: str, first: Grade | None) -> dict[str, Any]:
    """The problem as task.name=jsonl reads it; the fields of its own row stay for verifiers."""
    curation: dict[str, Any] = {
        "reason": reason, "pass_rate": grade.correct / grade.samples, "correct": grade.correct,
        "samples": grade.samples, "truncated": grade.truncated, "majority": grade.majority,
        "majority_share": grade.votes / grade.samples,
    }  # fmt: skip
    if first is not None:
        curation["first_pass_rate"] = first.correct / first.samples
    row = {**problem.row, "prompt": problem.prompt}
    if problem.answer:
        row["answer"] = problem.answer
    return {**row, "curation": curation}


def sibling(out: Path, kind: str) -> Path:
    """easy.jsonl -> easy.KIND.jsonl."""
    return out.with_name(f"{out.name.removesuffix('.jsonl')}.{kind}.jsonl")


def _print(counts: Mapping[str, int], args: CurateArgs, console: Console) -> None:
    table = Table(title=f"{sum(counts.values())} problems x {args.samples} samples")
    table.add_column("decision")
    table.add_column("problems", justify="right")
    for reason, number in counts.items():
        table.add_row(reason, str(number))
    console.print(table)
    console.print(f"{counts[KEPT]} problems written to {args.out}", markup=False, soft_wrap=True)


def _notes(
    config: Config, grades: Sequence[Grade], first: Mapping[int, Grade], args: CurateArgs
) -> Iterator[str]:
    """What the first pass would have lost, and whether problems were left out."""
    if first:
        hard = sum(first[g.id].correct == 0 and _reason(g, args) == KEPT for g in grades)
        yield f"{hard} of them were never solved in the first pass"
    if args.split == "train" and len(grades) == config.task.num_train:
        yield f"no more than task.num_train={len(grades)} problems were graded"


if __name__ == "__main__":
    main()
