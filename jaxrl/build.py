"""Makes every object of a run, by name, once. Read it beside `jaxrl.train`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Protocol

import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxrl.attention import cache_dtype, choose_programs
from jaxrl.buffer import BufferState, GroupBuffer, PromptSource
from jaxrl.config import Config
from jaxrl.errors import UserError
from jaxrl.evaluator import Evaluator
from jaxrl.learner.critic import critic_adam
from jaxrl.learner.learner import Learner
from jaxrl.learner.optimizer import adamw, learning_rate
from jaxrl.learner.steps import ForwardSettings
from jaxrl.length_curriculum import at_stage
from jaxrl.observe import Observer
from jaxrl.policy import resolve_model
from jaxrl.prompts import PromptStream, encode_prompt
from jaxrl.rewards.pool import RewardPool, VerifierError
from jaxrl.rewards.sandbox.client import Sandbox
from jaxrl.rollout.engine import RolloutEngine, SamplingParams
from jaxrl.rollout.probes import ProbeSettings
from jaxrl.rollout.worker import RolloutWorker, Stages
from jaxrl.tasks import Task, make_task
from jaxrl.tasks.files import FileTask
from jaxrl.tokenizer import Tokenizer
from jaxrl.types import Problem
from jaxrl.weights import WeightStore
from models.config import ModelConfig
from models.decoder import Policy


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """What is learnt, by what: needs no device."""

    task: Task
    model: ModelConfig
    tokenizer: Tokenizer

    @property
    def add_bos(self) -> bool:
        """Prompts begin with the tokenizer's start token if it has one."""
        return self.tokenizer.bos_id is not None


def make_subject(config: Config) -> Subject:
    """Task, architecture and tokenizer of the configuration."""
    task = make_task(config.task, config.run.seed)
    longest = config.rollout.max_prompt_tokens + config.rollout.max_new_tokens
    model, tokenizer = resolve_model(config.model, task, longest)
    model = replace(model, lora=config.lora.shape)
    return Subject(task=task, model=model, tokenizer=tokenizer)


def make_learner(
    config: Config, model: ModelConfig, mesh: Mesh, policy: Policy, observer: Observer
) -> Learner:
    """The learner of reinforcement learning; takes ownership of `policy`."""
    train, updates = config.train, config.grpo.updates_per_step
    rate = learning_rate(
        peak=train.learning_rate, warmup_steps=train.warmup_steps * updates,
        steps=train.steps * updates, schedule=train.schedule,
    )  # fmt: skip
    return make_learner_at(config, model, mesh, policy, rate, observer)


def make_learner_at(
    config: Config, model: ModelConfig, mesh: Mesh, policy: Policy, rate: optax.Schedule,
    observer: Observer,
) -> Learner:  # fmt: skip
    """A learner with the learning rate `rate` per step and AdamW as train.* sets it; owns `policy`."""
    train = config.train
    optimizer = adamw(
        model, rate, beta1=train.beta1, beta2=train.beta2, eps=train.eps,
        weight_decay=train.weight_decay, max_grad_norm=train.max_grad_norm,
    )  # fmt: skip
    critic_optimizer = None
    if config.grpo.advantage_baseline == "value":
        critic_optimizer = critic_adam(
            learning_rate=config.grpo.critic_learning_rate, max_grad_norm=train.max_grad_norm
        )
    return Learner(
        model, mesh, policy, optimizer, forward=forward_settings(config, mesh, model), grpo=config.grpo,
        max_nonfinite_steps=train.max_nonfinite_steps, observer=observer,
        critic_optimizer=critic_optimizer,
    )  # fmt: skip


def forward_settings(config: Config, mesh: Mesh, model: ModelConfig) -> ForwardSettings:
    """How the learner runs the model: in the temperature that samples are drawn at."""
    return ForwardSettings(
        dtype=jnp.dtype(config.model.dtype),
        temperature=config.rollout.temperature,
        chunk_tokens=config.train.logprob_chunk_tokens,
        remat=config.model.remat == "block",
        shared=config.train.shared_prompts,
        attention=choose_programs(config, mesh.devices.flat[0], model).train,
    )


def make_store(config: Config, model: ModelConfig, learner: Mesh, rollout: Mesh) -> WeightStore:
    """The two weight buffers on the rollout devices."""
    dtype = jnp.dtype(config.model.dtype)
    return WeightStore(model, learner_mesh=learner, rollout_mesh=rollout, dtype=dtype)


class Writer(Protocol):
    """A model with its tokenizer, such as a Subject."""

    @property
    def model(self) -> ModelConfig:
        """The architecture."""
        ...

    @property
    def tokenizer(self) -> Tokenizer:
        """What its tokens mean."""
        ...


def make_engine(config: Config, subject: Writer, mesh: Mesh, observer: Observer) -> RolloutEngine:
    """A sampling engine; training and evaluation each have one."""
    rollout = config.rollout
    return RolloutEngine(
        subject.model, mesh, num_slots=rollout.slots, max_prompt_tokens=rollout.max_prompt_tokens,
        max_new_tokens=rollout.max_new_tokens, chunk_steps=rollout.chunk_steps,
        refill_cost_steps=rollout.refill_cost_steps,
        num_stop_ids=len(subject.tokenizer.stop_ids), dtype=jnp.dtype(config.model.dtype),
        seed=config.run.seed, kv_on_swap=rollout.kv_on_swap, observer=observer,
        cache_dtype=cache_dtype(config),
        programs=choose_programs(config, mesh.devices.flat[0], subject.model),
        prefixes=rollout.prefixes(config.grpo.samples_per_prompt), narrow_tail=rollout.narrow_tail,
    )  # fmt: skip


def make_rewards(config: Config) -> RewardPool:
    """The verifier processes."""
    longest = config.task.shaping.max_tokens or config.rollout.max_new_tokens
    task = replace(config.task, shaping=replace(config.task.shaping, max_tokens=longest))
    return RewardPool(
        task, config.run.seed, task.reward_workers, task.reward_timeout_s, task.reward_latency_s
    )


def await_verifiers(config: Config, rewards: RewardPool) -> None:
    """Wait until the verifier processes can judge; for code, say what programs will run in.

    Raises: UserError if one cannot start, with what its process said.
    """
    try:
        rewards.wait_ready()
    except VerifierError as error:
        raise UserError(str(error)) from error
    if config.task.judge == "code":
        with closing(Sandbox()) as sandbox:
            print(f"verifier code: {sandbox.isolation}")


def make_evaluator(config: Config, subject: Subject, mesh: Mesh, rewards: RewardPool) -> Evaluator:
    """Held-out evaluation on the rollout devices, unobserved: its time is the eval phase's."""
    params = SamplingParams(
        temperature=config.eval.temperature,
        max_new_tokens=config.rollout.max_new_tokens,
        stop_ids=subject.tokenizer.stop_ids,
    )
    engine = make_engine(config, subject, mesh, Observer())
    return Evaluator(engine, rewards, subject.tokenizer, add_bos=subject.add_bos, params=params)


def make_stream(config: Config, subject: Subject) -> PromptStream:
    """The prompts of training. Every prompt and worked solution of the run is tokenised now.

    Raises: UserError for the first one that does not fit.
    """
    longest = config.rollout.max_prompt_tokens
    for problem in (p for problems in held_out(config, subject) for p in problems):
        encode_prompt(problem, subject.tokenizer, longest, subject.add_bos)
    if config.sft.steps and config.sft.path is None:
        encode_solutions(config, subject)
    return PromptStream(
        subject.task.problems("train"), subject.tokenizer, config.run.seed, longest, subject.add_bos
    )


def problem_rows(config: Config, subject: Subject) -> list[tuple[str, str, str]]:
    """The plan's row on problems: how many train, how many are held out, what is left out."""
    task, limit = subject.task, config.task.num_train
    count = len(task.problems("train"))
    during, around = held_out(config, subject)
    said = [f"to train; held out are {len(during)} during the run, {len(around)} before and after"]
    said += [f"task.num_train={limit} allows no more"] if count == limit else []
    if isinstance(task, FileTask) and task.num_repeated:
        said.append(f"{task.num_repeated} rows that repeat a problem are left out")
    return [("problems", f"{count:,}", "; ".join(said))]


def encode_solutions(
    config: Config, subject: Subject
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Prompts and worked solutions of the train split as tokens, the stop token at each solution's end.

    Raises:
        UserError: the task has no worked solutions, or one is longer than rollout.max_new_tokens.
    """
    prompts, solutions = [], []
    for problem in subject.task.problems("train"):
        solution = (*subject.tokenizer.encode(problem.solution), subject.tokenizer.stop_ids[0])
        if not problem.solution:
            raise UserError(
                f"sft.steps={config.sft.steps}, but task {subject.task.name} has a problem without a "
                f"worked solution ({problem.prompt[:60]!r}); add one, or set sft.steps=0"
            )
        if len(solution) > config.rollout.max_new_tokens:
            raise UserError(
                f"the worked solution of {problem.prompt[:60]!r} has {len(solution)} tokens with its "
                f"stop token, more than rollout.max_new_tokens={config.rollout.max_new_tokens}; set "
                f"that to at least {len(solution)}"
            )
        prompts.append(
            encode_prompt(
                problem, subject.tokenizer, config.rollout.max_prompt_tokens, subject.add_bos
            )
        )
        solutions.append(solution)
    return prompts, solutions


def make_buffer(
    config: Config, stream: PromptSource, *, version: int, state: BufferState | None
) -> GroupBuffer:
    """The staleness-bounded hand-over from rollout to learner."""
    return GroupBuffer(
        stream, prompts_per_step=config.grpo.prompts_per_step,
        max_staleness=config.rollout.max_staleness, version=version, state=state,
    )  # fmt: skip


def make_worker(
    config: Config, subject: Subject, mesh: Mesh, store: WeightStore, buffer: GroupBuffer,
    rewards: RewardPool, observer: Observer, *, stages: Stages | None = None,
    probes: ProbeSettings | None = None,
) -> RolloutWorker:  # fmt: skip
    """The rollout thread and its engine: of the present stage, where there are several."""
    if stages is None:
        engine = make_engine(config, subject, mesh, observer)
    else:
        engine = stages.make_engine(stages.lengths.current)
        config = at_stage(config, stages.lengths.current)
    return make_worker_on(
        config, subject, engine, store, buffer, rewards, observer, stages=stages, probes=probes
    )


def make_worker_on(
    config: Config, subject: Subject, engine: RolloutEngine, store: WeightStore,
    buffer: GroupBuffer, rewards: RewardPool, observer: Observer, *, stages: Stages | None = None,
    probes: ProbeSettings | None = None,
) -> RolloutWorker:  # fmt: skip
    """The rollout thread on an engine that stands idle."""
    rollout = config.rollout
    params = SamplingParams(
        temperature=rollout.temperature, top_p=rollout.top_p, top_k=rollout.top_k,
        max_new_tokens=rollout.max_new_tokens, stop_ids=subject.tokenizer.stop_ids,
    )  # fmt: skip
    return RolloutWorker(
        engine, store, buffer, rewards, subject.tokenizer,
        group_size=config.grpo.samples_per_prompt, params=params, observer=observer, stages=stages,
        probes=probes,
    )  # fmt: skip


def held_out(config: Config, subject: Subject) -> tuple[Sequence[Problem], Sequence[Problem]]:
    """(problems of the periodic evaluation, problems of the first and last evaluation)."""
    return (
        subject.task.problems("validation")[: config.eval.problems],
        subject.task.problems("test"),
    )
