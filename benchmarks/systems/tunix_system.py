"""Worker: google-tunix's GRPOLearner with its vanilla sampler; a command is one step of its training loop.

Rollout is the sampler's `generate`; train is all of the step's `update_actor` calls. top_p=1 and no
top_k make it sample (with neither it is greedy). Its cache is exactly as long as needed, since it
attends over all of it. Tail: a sampler with a longer cache runs until the longest row, as it does when
rows sample EOS at different steps; only useful tokens are counted.
"""

from __future__ import annotations

import importlib.metadata
import os
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.generate import sampler as tunix_sampler
from tunix.models.qwen3 import model as qwen3
from tunix.models.qwen3 import params as qwen3_params
from tunix.rl import rl_cluster
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rollout import base_rollout

from benchmarks.systems.protocol import GREEDY_PROMPTS, GREEDY_TOKENS, Answer, Conversation
from benchmarks.workload import BOS, EOS, PAD, Workload

NEVER = [-7]
"""End tokens that no logit has."""
ENDLESS = 10**6


class Words:
    """`w7` is token 7. The sampler puts BOS in front of what `encode` returns."""

    def encode(self, text: str, **_: Any) -> list[int]:
        """Ids of the words after the first, which is BOS."""
        return [int(word[1:]) for word in text.split()][1:]

    def decode(self, ids: Any, **_: Any) -> str:
        """Words of the ids."""
        return " ".join(f"w{int(i)}" for i in ids)

    def bos_id(self) -> int:
        """Start token."""
        return BOS

    def eos_id(self) -> int:
        """End token."""
        return EOS

    def pad_id(self) -> int:
        """Padding token."""
        return PAD

    def dedup_bos_ids(self, ids: list[int]) -> list[int]:
        """As they are."""
        return ids


def even_share(prompts: Any, completions: list[str], **_: Any) -> list[float]:
    """Reward: the share of even tokens."""
    return [
        sum(int(word[1:]) % 2 == 0 for word in text.split()) / len(text.split())
        for text in completions
    ]


class System:
    """The cluster and its learner, stopped before each generation to listen."""

    def __init__(self, conversation: Conversation) -> None:
        self.conversation = conversation
        self.workload = work = conversation.workload
        devices = np.array(jax.devices()[:1]).reshape(1, 1)
        mesh = jax.sharding.Mesh(
            devices, ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2
        )
        self.model_config = _model_config(work)
        self.model = qwen3_params.create_model_from_safe_tensors(
            work.checkpoint, self.model_config, mesh, jnp.float32
        )
        roles = (rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT)
        self.cluster = rl_cluster.RLCluster(
            actor=self.model, reference=None, tokenizer=Words(),
            cluster_config=_cluster_config(work, dict.fromkeys(roles, mesh)),
        )  # fmt: skip
        self.learner = GRPOLearner(
            rl_cluster=self.cluster, reward_fns=even_share,
            algo_config=GRPOConfig(
                num_generations=work.group_size, num_iterations=1, beta=0.0, epsilon=0.2
            ),
        )  # fmt: skip
        self.answer: Answer = {}
        self.calls = 0
        self._generate = self.cluster.rollout.generate
        self._update = self.cluster.update_actor
        self.cluster.rollout.generate = self.generate
        self.cluster.update_actor = self.update
        self.tail_sampler: tunix_sampler.Sampler | None = None
        self.texts = [" ".join(f"w{token}" for token in prompt) for prompt in work.prompts]

    def data(self) -> Iterator[dict[str, np.ndarray]]:
        """The same prompts again and again."""
        while True:
            yield {"prompts": np.array(self.texts)}

    def generate(self, prompts: list[str], settings: Any, **_: Any) -> Any:
        """Answer for the step before, then commands until one asks for a step; then generate."""
        if self.answer:
            assert self.calls == self.workload.samples // self.workload.microbatch
            self.conversation.reply(self.answer)
        while (command := self.conversation.next()) != "step":
            if command is None:
                os._exit(0)
            self.conversation.reply(self.tail() if command == "tail" else self.greedy())
        assert len(prompts) == self.workload.samples
        began = time.perf_counter()
        out = self._generate(prompts, settings)
        self.calls = 0
        self.answer = {
            "rollout_s": time.perf_counter() - began,
            "rollout_tokens": sum(len(tokens) for tokens in out.tokens),
            "train_s": 0.0, "train_tokens": 0,
        }  # fmt: skip
        return out

    def update(self, train_data: Any, *args: Any, **kwargs: Any) -> None:
        """One micro-batch; the last one takes the optimizer step."""
        for example in train_data if isinstance(train_data, list) else [train_data]:
            # by shape: its masks leave out a sampled token that happens to be the pad
            self.answer["train_tokens"] += example.prompt_ids.size + example.completion_ids.size
        began = time.perf_counter()
        self._update(train_data, *args, **kwargs)
        jax.block_until_ready(nnx.state(self.cluster.actor_trainer.model))
        self.answer["train_s"] += time.perf_counter() - began
        self.calls += 1

    def tail(self) -> Answer:
        """A batch of all samples until the longest ends."""
        work = self.workload
        if self.tail_sampler is None:
            shape = work.shape
            size = work.prompt_tokens + work.max_tail_length
            self.tail_sampler = tunix_sampler.Sampler(
                self.model, Words(),
                tunix_sampler.CacheConfig(size, shape.num_layers, shape.num_kv_heads, shape.head_size),
            )  # fmt: skip
        texts = [
            " ".join(f"w{token}" for token in prompt)
            for prompt in work.tail_prompts
            for _ in range(work.group_size)
        ]
        began = time.perf_counter()
        out = self.tail_sampler(
            texts, work.max_tail_length, max_prompt_length=work.prompt_tokens, temperature=1.0,
            top_p=1.0, eos_tokens=NEVER,
        )  # fmt: skip
        seconds = time.perf_counter() - began
        assert sum(len(tokens) for tokens in out.tokens) == len(texts) * work.max_tail_length
        return {"rollout_s": seconds, "rollout_tokens": work.tail_tokens}

    def greedy(self) -> Answer:
        """Greedy completions of the first prompts."""
        out = self.cluster.rollout._sampler(
            self.texts[:GREEDY_PROMPTS], GREEDY_TOKENS, eos_tokens=NEVER,
            max_prompt_length=self.workload.prompt_tokens,
        )  # fmt: skip
        return {"tokens": [np.asarray(tokens).tolist() for tokens in out.tokens]}


def _model_config(work: Workload) -> qwen3.ModelConfig:
    shape = work.shape
    return qwen3.ModelConfig(
        num_layers=shape.num_layers, vocab_size=shape.vocab_size, embed_dim=shape.width,
        hidden_dim=shape.ffw_size, num_heads=shape.num_heads, head_dim=shape.head_size,
        num_kv_heads=shape.num_kv_heads, rope_theta=1_000_000, norm_eps=1e-6, dtype=jnp.float32,
        param_dtype=jnp.float32,
    )  # fmt: skip


def _cluster_config(work: Workload, meshes: dict[Any, Any]) -> rl_cluster.ClusterConfig:
    return rl_cluster.ClusterConfig(
        role_to_mesh=meshes, rollout_engine="vanilla", offload_to_cpu=False,
        training_config=rl_cluster.RLTrainingConfig(
            actor_optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4)),
            eval_every_n_steps=ENDLESS, max_steps=ENDLESS, mini_batch_size=len(work.prompts),
            train_micro_batch_size=work.microbatch // work.group_size,
            rollout_micro_batch_size=len(work.prompts),
        ),
        rollout_config=base_rollout.RolloutConfig(
            max_tokens_to_generate=work.new_tokens, max_prompt_length=work.prompt_tokens,
            kv_cache_size=work.prompt_tokens + work.new_tokens, temperature=1.0, top_p=1.0,
            top_k=None, eos_tokens=NEVER, return_logprobs=False,
        ),
    )  # fmt: skip


def main() -> None:
    """Train for as long as there are commands."""
    conversation = Conversation()
    system = System(conversation)
    conversation.ready(
        {"google-tunix": importlib.metadata.version("google-tunix"), "jax": jax.__version__},
        parameters=sum(x.size for x in jax.tree.leaves(nnx.state(system.model, nnx.Param))),
    )
    system.learner.train(system.data())


if __name__ == "__main__":
    main()
