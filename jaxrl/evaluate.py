"""`python -m jaxrl.evaluate`: pass@1, pass@k and maj@k of a run or a checkpoint, as a table and as JSON.

python -m jaxrl.evaluate --run runs/quickstart
python -m jaxrl.evaluate --run runs/quickstart --checkpoint 100 --samples 32 --k 1 8 32
python -m jaxrl.evaluate --config stories --checkpoint FOLDER_WITH_SAFETENSORS --greedy
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Literal

import tyro
from jax.sharding import Mesh
from rich.table import Table

from jaxrl import build
from jaxrl.checkpoint import Checkpoints
from jaxrl.cli import load_config, resolve_config, user_errors
from jaxrl.config import Config, TaskName
from jaxrl.devices import make_meshes, start_devices
from jaxrl.errors import UserError
from jaxrl.evaluator import Evaluation
from jaxrl.observe import Observer
from jaxrl.policy import first_policy, with_adapter
from jaxrl.start import existing_checkpoints
from jaxrl.telemetry.progress import make_console
from jaxrl.types import Finish
from models.decoder import Policy


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateArgs:
    """Evaluate a policy on held-out problems."""

    run: Path | None = None
    """Run folder: its configuration and its newest checkpoint."""
    checkpoint: str | None = None
    """With --run: the step to load. Without: a folder with config.json and safetensors, as model.path."""
    config: str | None = None
    """Task and sampling settings when there is no --run: a YAML file or a name from configs/."""
    task: TaskName | None = None
    """Another task than the configuration's, by name."""
    split: Literal["train", "validation", "test"] = "test"
    """Which problems."""
    problems: int = 256
    """At most this many problems."""
    samples: int = 8
    """n, completions per problem."""
    k: tuple[int, ...] = (1, 8)
    """The k of pass@k and maj@k; each at most n."""
    temperature: float | None = None
    """Sampling temperature; default: the configuration's eval.temperature."""
    greedy: bool = False
    """Take the most likely token; one sample per problem."""
    out: Path | None = None
    """Write the JSON here; default: evaluation.json in the run folder, or nowhere without --run."""
    debug: bool = False
    """Show the traceback of an error as well as its message."""


def main(argv: Sequence[str] | None = None) -> None:
    """Load, sample, verify, print."""
    argv = sys.argv[1:] if argv is None else argv
    with user_errors(debug="--debug" in argv):
        args = tyro.cli(EvaluateArgs, args=list(argv), prog="python -m jaxrl.evaluate")
        config = config_of(args)
        if args.problems < 1 or args.samples < 1:
            raise UserError(
                f"--problems={args.problems} and --samples={args.samples} must be at least 1"
            )
        samples = 1 if args.greedy else args.samples
        ks = tuple(k for k in sorted(set(args.k)) if k <= samples) if args.greedy else args.k
        if max(ks) > samples or min(ks) < 1:
            raise UserError(f"k={max(ks)} needs at least as many samples; --samples is {samples}")
        evaluation = evaluate(config, args, samples)
        result = to_json(evaluation, ks)
        _print(result, ks)
        out = args.out or (args.run / "evaluation.json" if args.run else None)
        if out is not None:
            _write(result, out)
            print(f"written to {out}")


def _write(result: dict[str, object], out: Path) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{out} cannot be written ({error.strerror}); name another file with --out=FILE"
        ) from error


def evaluate(config: Config, args: EvaluateArgs, samples: int) -> Evaluation:
    """Sample the split with the weights that `args` names."""
    start_devices(config.mesh.devices)
    subject = build.make_subject(config)
    learner_mesh, rollout_mesh = make_meshes(config.mesh)
    step, policy = load_weights(config, args, subject, learner_mesh)
    with ExitStack() as stack:
        rewards = stack.enter_context(build.make_rewards(config))
        build.await_verifiers(config, rewards)
        store = build.make_store(config, subject.model, learner_mesh, rollout_mesh)
        evaluator = build.make_evaluator(config, subject, rollout_mesh, rewards)
        problems = subject.task.problems(args.split)[: args.problems]
        return evaluator.run(store.publish(step, policy), problems, samples)


def load_weights(
    config: Config, args: EvaluateArgs, subject: build.Subject, mesh: Mesh
) -> tuple[int, Policy]:
    """(optimizer step, weights) that `args` names: of the run's checkpoint, or those of model.path."""
    base = first_policy(config.model, subject.model, mesh, config.run.seed)
    policy = with_adapter(base, mesh, config.run.seed)
    if args.run is None:
        return 0, policy
    learner = build.make_learner(config, subject.model, mesh, policy, Observer())
    with closing(Checkpoints(existing_checkpoints(args.run), keep=config.checkpoint.keep)) as saved:
        step = _step(args, saved)
        learner.restore(saved, step)
    return step, learner.policy


def to_json(evaluation: Evaluation, ks: Sequence[int]) -> dict[str, object]:
    """All figures, with what they are means of."""
    rollouts = [r for row in evaluation.rollouts for r in row]
    one = evaluation.pass_at_1
    return {
        "step": evaluation.version,
        "problems": len(evaluation.problems),
        "samples": len(evaluation.rollouts[0]),
        "pass_at_1": one.mean,
        "pass_at_1_interval_95": [one.low, one.high],
        "pass_at": {str(k): evaluation.pass_at(k) for k in ks},
        "maj_at": {str(k): evaluation.majority_at(k) for k in ks},
        "length_mean_tokens": sum(len(r.completion.tokens) for r in rollouts) / len(rollouts),
        "truncated_share": sum(r.completion.finish is Finish.LENGTH for r in rollouts)
        / len(rollouts),
    }


def config_of(args: EvaluateArgs) -> Config:
    """The run's configuration, or the named one with the checkpoint folder as model.path."""
    if args.run is not None:
        existing_checkpoints(args.run)
        config = load_config(args.run / "config.yaml")
    elif args.config is not None:
        config = load_config(resolve_config(args.config))
        if args.checkpoint is not None:
            model = dataclasses.replace(config.model, path=Path(args.checkpoint))
            config = dataclasses.replace(config, model=model)
    else:
        raise UserError(
            "nothing to evaluate: give --run FOLDER, or --config NAME with --checkpoint"
        )
    temperature = 0.0 if args.greedy else args.temperature
    if temperature is not None:
        config = dataclasses.replace(
            config, eval=dataclasses.replace(config.eval, temperature=temperature)
        )
    if args.task is not None:
        task = dataclasses.replace(config.task, name=args.task)
        config = dataclasses.replace(config, task=task)
    return config


def step_of(config: Config, args: EvaluateArgs) -> int:
    """The optimizer step whose weights `args` names, the newest by default; 0 without a run.

    Raises: UserError if the run has no such checkpoint.
    """
    if args.run is None:
        return 0
    with closing(Checkpoints(existing_checkpoints(args.run), keep=config.checkpoint.keep)) as saved:
        return _step(args, saved)


def _step(args: EvaluateArgs, saved: Checkpoints) -> int:
    latest, steps = saved.latest(), saved.steps()
    if latest is None:
        raise UserError(f"{args.run} has no complete checkpoint; train it first")
    if args.checkpoint is None:
        return latest
    if not args.checkpoint.isdigit() or int(args.checkpoint) not in steps:
        raise UserError(
            f"--checkpoint {args.checkpoint} is not in {args.run}; it has steps {steps}"
        )
    return int(args.checkpoint)


def _print(result: dict[str, object], ks: Sequence[int]) -> None:
    console = make_console()
    table = Table(
        title=f"step {result['step']}: {result['problems']} problems x {result['samples']} samples"
    )
    for name in ("k", "pass@k", "maj@k"):
        table.add_column(name, justify="right")
    pass_at, maj_at = result["pass_at"], result["maj_at"]
    assert isinstance(pass_at, dict)
    assert isinstance(maj_at, dict)
    for k in ks:
        table.add_row(str(k), f"{pass_at[str(k)]:.1%}", f"{maj_at[str(k)]:.1%}")
    console.print(table)


if __name__ == "__main__":
    main()
