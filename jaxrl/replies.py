"""Replies of the policy in training to chats held out, for a reader's eye."""

from __future__ import annotations

from typing import Any

from jax.sharding import Mesh

from jaxrl import build
from jaxrl.config import Config
from jaxrl.fine_tune_data import Material
from jaxrl.learner.learner import Learner
from jaxrl.observe import Observer
from jaxrl.rollout.engine import Request, SamplingParams
from jaxrl.rollout.worker import completion_text
from jaxrl.weights import WeightStore


class ReplySampler:
    """Replies to chats held out (or trained on, where none is), for a reader's eye."""

    def __init__(self, config: Config, material: Material, meshes: tuple[Mesh, Mesh]) -> None:
        longest = config.rollout.max_prompt_tokens
        fitting = [c for c in material.held_out or material.train if c.prompt_tokens <= longest]
        self._chats = fitting[: config.sft.samples]
        self._tokenizer = material.tokenizer
        stop_ids = material.tokenizer.stop_ids
        self._params = SamplingParams(
            temperature=config.eval.temperature, stop_ids=stop_ids,
            max_new_tokens=config.rollout.max_new_tokens,
        )  # fmt: skip
        self._store: WeightStore = build.make_store(config, material.model, *meshes)
        self._engine = build.make_engine(config, material, meshes[1], Observer())

    def records(self, learner: Learner, step: int) -> list[dict[str, Any]]:
        """Lines of samples.jsonl; none if no prompt fits rollout.max_prompt_tokens."""
        if not self._chats:
            return []
        snapshot = self._store.publish(step, learner.policy)
        for stream, chat in enumerate(self._chats):
            prompt = tuple(chat.tokens[: chat.prompt_tokens].tolist())
            self._engine.submit(
                Request(stream=stream, prompt=prompt, sample_indices=(0,), params=self._params)
            )
        found = {}
        while not self._engine.is_idle:
            found |= {r.stream: c for r, c in self._engine.run_chunk(snapshot)}
        return [
            {
                "step": step,
                "where": chat.where,
                "prompt": chat.prompt,
                "completion": completion_text(self._tokenizer, found[stream]),
                "answer": chat.reply,
                "tokens": len(found[stream].tokens),
                "finish": str(found[stream].finish),
            }
            for stream, chat in enumerate(self._chats)
        ]
