"""`python -m jaxrl.preference`: training on preference pairs, with the learner of `jaxrl.train`.

    python -m jaxrl.preference --config quickstart --preference.path pairs.jsonl --run.dir runs/dpo
    python -m jaxrl.preference --model.path FOLDER --model.chat=true --preference.loss apo_zero ...

    reference log-probabilities of every completion, once, under the first weights
    each step:   score the pairs under the present weights        one forward over all micro-batches
                 loss and its slopes d loss / d log pi            on the host, [pairs]
                 gradient of sum(slope * log pi)                  one forward and backward, packed
                 AdamW

Departures: the two completions of a pair may lie in different micro-batches, because the second pass is
linear in the log-probabilities; that costs the scoring pass, a third more than a paired batch. Exact: the
weights are the same in both passes.
The run folder is that of a training run; reference.npz holds the reference. `--run.fork-from` of another
run starts from these weights or goes on from other weights here. The temperature is always 1.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl import build
from jaxrl.algorithms.preference import PreferenceLoss, preference_loss
from jaxrl.checkpoint import FIRST_STEP, Checkpoints
from jaxrl.cli import config_yaml, parse_args, user_errors
from jaxrl.config import Config
from jaxrl.devices import make_meshes, start_devices
from jaxrl.errors import UserError
from jaxrl.interrupt import stop_asked
from jaxrl.learner.learner import Learner
from jaxrl.learner.optimizer import learning_rate
from jaxrl.observe import Observer
from jaxrl.packing import TrainSequence, pack, solutions_to_sequences, unpack
from jaxrl.pairs import Ids, Pair, read_pairs
from jaxrl.policy import describe_policy, first_policy, with_adapter
from jaxrl.run_folder import RunFolder, open_run
from jaxrl.start import fork
from jaxrl.telemetry.metrics import MetricsWriter
from jaxrl.telemetry.progress import RunProgress

RECORD = {"kind": "preference"}
"""Record of every checkpoint, by which `jaxrl.train` knows that it cannot go on in the same folder."""
_SCORED_AT_ONCE = 256
"""Pairs packed together while the reference is scored; bounds the host's memory."""


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and train."""
    argv = sys.argv[1:] if argv is None else argv
    with user_errors(debug="--debug" in argv):
        parsed = parse_args(
            argv, prog="python -m jaxrl.preference",
            description="Train on pairs of a better and a worse completion.",
        )  # fmt: skip
        config = parsed.config
        rollout = dataclasses.replace(config.rollout, temperature=1.0)
        run(dataclasses.replace(config, rollout=rollout), argv, dry_run=parsed.dry_run)


def run(config: Config, argv: Sequence[str], *, dry_run: bool = False) -> None:
    """One run from its pairs to its last checkpoint; resumes where the run folder's checkpoints end."""
    if config.preference.path is None:
        raise UserError(
            "preference.path names no pairs; set --preference.path to a file of one JSON object per line: "
            '{"prompt", "chosen", "rejected"}'
        )
    start_devices(config.mesh.devices)
    subject = build.make_subject(config)
    pairs = read_pairs(
        config.preference.path, subject.tokenizer, longest=config.train.row_tokens,
        with_rejected=config.preference.loss != "sft", add_bos=subject.add_bos,
    )  # fmt: skip
    steps = num_steps(config, len(pairs))
    print(f"{len(pairs)} pairs, {steps} optimizer steps, loss {config.preference.loss}")
    if dry_run:
        return
    _train(config, argv, subject, pairs, steps)
    print(f"run folder {config.run.dir}; python -m jaxrl.evaluate --run {config.run.dir}")


def _train(
    config: Config, argv: Sequence[str], subject: build.Subject, pairs: Sequence[Pair], steps: int
) -> None:
    mesh, _ = make_meshes(config.mesh)
    train = config.train
    rate = learning_rate(
        peak=train.learning_rate, warmup_steps=train.warmup_steps, steps=steps,
        schedule=train.schedule,
    )  # fmt: skip
    with ExitStack() as stack:
        folder = stack.enter_context(closing(open_run(config, argv)))
        describe_policy(config.model, subject.model, subject.tokenizer, folder.path)
        checkpoints = stack.enter_context(
            closing(Checkpoints(folder.checkpoints, keep=config.checkpoint.keep))
        )
        base = first_policy(config.model, subject.model, mesh, config.run.seed)
        done = checkpoints.latest()
        if done is None and config.run.fork_from is not None:
            base = fork(base, config.run.fork_from)
        policy = with_adapter(base, mesh, config.run.seed)
        learner = build.make_learner_at(config, subject.model, mesh, policy, rate, Observer())
        if done is not None:
            _check_kind(checkpoints.restore_record(done), config)
            learner.restore(checkpoints, done)
        reference = _reference(config, learner, pairs, folder, known=done is not None)
        if done is None:
            checkpoints.save(FIRST_STEP, learner.state, RECORD, learner.frozen)
        folder.rewind(done or 0)
        writer = MetricsWriter(folder.metrics, folder.tensorboard)
        stack.enter_context(closing(writer))
        writer.config(config_yaml(config))
        progress = stack.enter_context(RunProgress(steps, first_step=done or 0))
        asked = stack.enter_context(stop_asked())
        for step in range((done or 0) + 1, steps + 1):
            chosen = drawn(config, step, len(pairs))
            curves = update(
                learner, config, [pairs[n] for n in chosen],
                None if reference is None else reference[chosen],
            )  # fmt: skip
            progress.update(step, writer.write(step=step, version=step, metrics=curves))
            every, stops = config.checkpoint.every_steps, asked.is_set()
            if stops or step == steps or (every > 0 and step % every == 0):
                checkpoints.save(step, learner.state, RECORD)
            if stops and step < steps:
                raise KeyboardInterrupt


def _check_kind(saved: Mapping[str, Any], config: Config) -> None:
    if saved.get("kind") != RECORD["kind"]:
        raise UserError(
            f"{config.run.dir} holds another kind of run; start this one in a folder of its own with "
            f"--run.dir=ANOTHER_FOLDER --run.fork-from={config.run.dir}"
        )


def num_steps(config: Config, pairs: int) -> int:
    """Optimizer steps of all epochs; the last of an epoch may have fewer pairs."""
    return config.preference.epochs * math.ceil(pairs / config.preference.pairs_per_step)


def drawn(config: Config, step: int, pairs: int) -> np.ndarray:
    """Positions of the pairs of optimizer step `step`, from 1: each once per epoch, shuffled anew."""
    per_step = config.preference.pairs_per_step
    epoch, at = divmod(step - 1, math.ceil(pairs / per_step))
    order = np.random.default_rng([config.run.seed, epoch]).permutation(pairs)
    return order[at * per_step : (at + 1) * per_step]


@dataclass(frozen=True, kw_only=True, slots=True)
class Slopes:
    """The loss of one batch of pairs and what it says about log-probabilities. All [pairs] float64."""

    loss: np.ndarray
    chosen: np.ndarray  # d mean loss / d log policy(chosen)
    rejected: np.ndarray


def slopes(
    chosen: np.ndarray, rejected: np.ndarray, *, beta: float, kind: PreferenceLoss
) -> Slopes:
    """Loss and slopes of margins log policy - log reference [pairs] of chosen and rejected completions."""

    def mean_loss(c: jax.Array, r: jax.Array) -> tuple[jax.Array, jax.Array]:
        losses = preference_loss(c, r, beta=beta, kind=kind)
        return losses.mean(), losses

    on_device = jnp.asarray(chosen, jnp.float32), jnp.asarray(rejected, jnp.float32)
    (_, losses), (of_chosen, of_rejected) = jax.value_and_grad(
        mean_loss, argnums=(0, 1), has_aux=True
    )(*on_device)
    return Slopes(
        loss=np.asarray(losses, np.float64), chosen=np.asarray(of_chosen, np.float64),
        rejected=np.asarray(of_rejected, np.float64),
    )  # fmt: skip


def update(
    learner: Learner, config: Config, pairs: Sequence[Pair], reference: np.ndarray | None
) -> dict[str, float]:
    """One optimizer step on the pairs; returns its curves.

    reference: [pairs, 2] log-probabilities of chosen and rejected completions; None for sft.
    rewards/* are beta * (log policy - log reference), accuracy the share of pairs whose chosen
    completion has more of it (TRL's names and signs).
    """
    settings = config.preference
    if settings.loss == "sft" or reference is None:
        sequences = solutions_to_sequences([p.prompt for p in pairs], [p.chosen for p in pairs])
        metrics = learner.update_sft(_packed(config, sequences))
        return {"preference/loss": metrics.pop("sft/loss"), **metrics}
    sequences = _sequences(pairs)
    logprobs = completion_logprobs(learner, config, sequences).reshape(-1, 2)
    margins = logprobs - reference
    found = slopes(margins[:, 0], margins[:, 1], beta=settings.beta, kind=settings.loss)
    of_each = np.stack([found.chosen, found.rejected], axis=1).ravel()
    weighed = [
        dataclasses.replace(s, token_weights=np.where(s.loss_mask, -slope, 0).astype(np.float32))
        for s, slope in zip(sequences, of_each, strict=True)
    ]
    metrics = learner.update_sft(_packed(config, weighed))
    del metrics["sft/loss"]  # of the linear surrogate
    rewards = settings.beta * margins
    return {
        "preference/loss": float(found.loss.mean()),
        "rewards/chosen": float(rewards[:, 0].mean()),
        "rewards/rejected": float(rewards[:, 1].mean()),
        "rewards/accuracy": float((rewards[:, 0] > rewards[:, 1]).mean()),
        "rewards/margin": float((rewards[:, 0] - rewards[:, 1]).mean()),
        "logprobs/chosen": float(logprobs[:, 0].mean()),
        "logprobs/rejected": float(logprobs[:, 1].mean()),
        **metrics,
    }


def completion_logprobs(
    learner: Learner, config: Config, sequences: Sequence[TrainSequence]
) -> np.ndarray:
    """[N] float64: log-probability of each whole completion under the present weights."""
    scores = learner.score_batches(_packed(config, sequences))
    found = unpack(sequences, [s.logprobs for s in scores], row_tokens=config.train.row_tokens)
    return np.array([one.sum(dtype=np.float64) for one in found])


def _sequences(pairs: Sequence[Pair]) -> list[TrainSequence]:
    """Chosen and rejected completion of each pair in turn, [2 * pairs]."""
    completions = [ids for pair in pairs for ids in (pair.chosen, pair.rejected)]
    return solutions_to_sequences([p.prompt for p in pairs for _ in range(2)], completions)


def _packed(config: Config, sequences: Sequence[TrainSequence]) -> list:
    train = config.train
    batches, _ = pack(
        sequences, row_tokens=train.row_tokens, rows_per_microbatch=train.rows_per_microbatch
    )
    return batches


def _reference(
    config: Config, learner: Learner, pairs: Sequence[Pair], folder: RunFolder, *, known: bool
) -> np.ndarray | None:
    """[pairs, 2] float64 under the first weights: scored once, then read from the run folder.

    Raises: UserError if a resumed run has other pairs than it began with.
    """
    if config.preference.loss == "sft":
        return None
    path, fingerprint = folder.path / "reference.npz", _fingerprint(pairs)
    if known:
        stored = np.load(path)
        if str(stored["pairs"]) != fingerprint:
            raise UserError(
                f"{config.preference.path} holds other pairs than the run in {folder.path} began with; "
                "restore the file, or start a new --run.dir"
            )
        return stored["logprobs"]
    parts = [
        completion_logprobs(learner, config, _sequences(pairs[n : n + _SCORED_AT_ONCE]))
        for n in range(0, len(pairs), _SCORED_AT_ONCE)
    ]
    reference = np.concatenate(parts).reshape(-1, 2)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        np.savez(file, logprobs=reference, pairs=np.array(fingerprint))
    partial.replace(path)
    return reference


def _fingerprint(pairs: Sequence[Pair]) -> str:
    def words(ids: Ids) -> str:
        return " ".join(map(str, ids))

    text = "\n".join(f"{words(p.prompt)}|{words(p.chosen)}|{words(p.rejected)}" for p in pairs)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


if __name__ == "__main__":
    main()
