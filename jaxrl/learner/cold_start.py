"""The cold start: supervised training on the task's worked solutions.

Departures from plain SFT: it stops early, at `sft.stop_at_pass` sampled held-out pass@1, because its
purpose is a policy that sometimes succeeds, not one that always does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from jax.sharding import Mesh

from jaxrl.build import Subject, encode_solutions, make_learner_at
from jaxrl.config import Config
from jaxrl.evaluator import Evaluator
from jaxrl.learner.optimizer import learning_rate
from jaxrl.observe import Observer
from jaxrl.packing import pack, solutions_to_sequences
from jaxrl.types import Problem
from jaxrl.weights import WeightStore
from models.decoder import Policy

Note = Callable[[str], None]


def cold_start(
    config: Config, subject: Subject, mesh: Mesh, policy: Policy, store: WeightStore,
    evaluator: Evaluator, problems: Sequence[Problem], note: Note,
) -> Policy:  # fmt: skip
    """Train `policy` (which is consumed) on worked solutions; returns the trained one."""
    sft, train = config.sft, config.train
    rate = learning_rate(
        peak=sft.learning_rate,
        warmup_steps=sft.warmup_steps,
        steps=sft.steps,
        schedule=sft.schedule,
    )
    learner = make_learner_at(config, subject.model, mesh, policy, rate, Observer())
    prompts, solutions = encode_solutions(config, subject)
    order = np.random.default_rng([config.run.seed, 1])
    for step in range(1, sft.steps + 1):
        chosen = order.integers(len(solutions), size=sft.sequences_per_step)
        sequences = solutions_to_sequences(
            [prompts[i] for i in chosen], [solutions[i] for i in chosen]
        )
        batches, _ = pack(
            sequences, row_tokens=train.row_tokens, rows_per_microbatch=train.rows_per_microbatch
        )
        metrics = learner.update_sft(batches)
        if step % sft.check_every == 0 or step == sft.steps:
            snapshot = store.publish(step, learner.policy)
            pass_at_1 = evaluator.run(snapshot, problems, 1).pass_at_1.mean
            note(
                f"cold start {step}/{sft.steps}  loss {metrics['sft/loss']:.3f}  "
                f"held-out pass@1 {pass_at_1:.1%}"
            )
            if pass_at_1 >= sft.stop_at_pass:
                break
    return learner.policy
