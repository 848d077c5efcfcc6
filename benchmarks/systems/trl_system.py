"""Worker: TRL's GRPOTrainer with transformers generation; a command is one step of its own training loop.

Rollout is its `_generate_single_turn`; train is the rest of the optimizer step without generation and
scoring. Tail: the stopping criterion of the transformers worker, through the trainer's generation.
"""

from __future__ import annotations

import os
import tempfile
import time
from typing import Any

import torch
import trl
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    StoppingCriteriaList,
    TrainerCallback,
)

from benchmarks.systems.protocol import Answer, Conversation
from benchmarks.systems.torch_common import OwnLengths
from benchmarks.workload import Workload

ENDLESS = 10**6
NEVER = [-1]
"""End tokens that no logit has; None would be filled with the model's own."""


def even_share(completions: list[str], **_: Any) -> list[float]:
    """Reward: the share of even tokens."""
    return [
        sum(int(word[1:]) % 2 == 0 for word in text.split() if word[0] == "w") / len(text.split())
        for text in completions
    ]


class System(TrainerCallback):
    """The trainer, stopped between steps to listen."""

    def __init__(self, conversation: Conversation, folder: str) -> None:
        self.conversation = conversation
        self.workload = work = conversation.workload
        torch.set_num_threads(work.threads)
        self.model = AutoModelForCausalLM.from_pretrained(work.checkpoint, dtype=torch.float32)
        text = [" ".join(f"w{token}" for token in prompt) for prompt in work.prompts]
        self.trainer = trl.GRPOTrainer(
            model=self.model, reward_funcs=even_share, args=_settings(work, folder),
            train_dataset=Dataset.from_dict({"prompt": text}),
            processing_class=AutoTokenizer.from_pretrained(work.checkpoint), callbacks=[self],
        )  # fmt: skip
        self.trainer.eos_token_ids = NEVER  # no token ends a completion
        self.began = 0.0
        self.answer: Answer = {}
        self.scoring_s = 0.0
        self._listen_in()

    def _listen_in(self) -> None:
        """Time the trainer's own methods and count their tokens."""
        trainer = self.trainer
        generate, score, loss = (
            trainer._generate_single_turn, trainer._generate_and_score_completions,
            trainer._compute_loss,
        )  # fmt: skip

        def timed_generate(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            out = generate(*args, **kwargs)
            self.answer["rollout_s"] = time.perf_counter() - began
            self.answer["rollout_tokens"] = sum(map(len, out[0]))
            return out

        def timed_score(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            out = score(*args, **kwargs)
            self.scoring_s += time.perf_counter() - began
            return out

        def counted_loss(model: Any, inputs: dict[str, torch.Tensor]) -> Any:
            tokens = int(inputs["prompt_mask"].sum() + inputs["completion_mask"].sum())
            self.answer["train_tokens"] = self.answer.get("train_tokens", 0) + tokens
            return loss(model, inputs)

        trainer._generate_single_turn = timed_generate
        trainer._generate_and_score_completions = timed_score
        trainer._compute_loss = counted_loss

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Answer for the step before, then commands until one asks for a step."""
        if self.answer:
            self.conversation.reply(self.answer)
        while (command := self.conversation.next()) != "step":
            if command is None:
                os._exit(0)
            self.conversation.reply(self.tail())
        self.answer, self.scoring_s = {}, 0.0
        self.began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """The step is done, the optimizer included."""
        self.answer["train_s"] = time.perf_counter() - self.began - self.scoring_s

    def tail(self) -> Answer:
        """Generation until the longest row ends; only useful tokens are counted."""
        work, config = self.workload, self.trainer.generation_config
        generate, new_tokens = self.model.generate, config.max_new_tokens
        criteria = StoppingCriteriaList([OwnLengths(work.prompt_tokens, work.tail_lengths)])
        self.model.generate = lambda *args, **kwargs: generate(
            *args, **kwargs, stopping_criteria=criteria
        )
        config.max_new_tokens = work.max_tail_length
        self.trainer.generation_kwargs["max_new_tokens"] = work.max_tail_length
        rows = [prompt for prompt in work.tail_prompts for _ in range(work.group_size)]
        self.trainer._generate_single_turn(rows, None, {}, work.group_size)
        seconds, tokens = self.answer["rollout_s"], self.answer["rollout_tokens"]
        config.max_new_tokens = self.trainer.generation_kwargs["max_new_tokens"] = new_tokens
        self.model.generate = generate
        assert tokens == len(rows) * work.max_tail_length
        return {"rollout_s": seconds, "rollout_tokens": work.tail_tokens}


def _settings(work: Workload, folder: str) -> trl.GRPOConfig:
    return trl.GRPOConfig(
        output_dir=folder, use_cpu=True, per_device_train_batch_size=work.microbatch,
        gradient_accumulation_steps=work.samples // work.microbatch,
        num_generations=work.group_size, max_completion_length=work.new_tokens, temperature=1.0,
        top_p=1.0, top_k=0, learning_rate=1e-4, lr_scheduler_type="constant", max_steps=ENDLESS,
        beta=0.0, logging_steps=ENDLESS, report_to=[], save_strategy="no", bf16=False,
        gradient_checkpointing=False, disable_tqdm=True,
        generation_kwargs={"eos_token_id": NEVER, "max_new_tokens": work.new_tokens},
    )  # fmt: skip


def main() -> None:
    """Train for as long as there are commands."""
    conversation = Conversation()
    with tempfile.TemporaryDirectory() as folder:
        system = System(conversation, folder)
        conversation.ready(
            {"trl": trl.__version__, "torch": torch.__version__},
            parameters=sum(p.numel() for p in system.model.parameters()),
        )
        system.trainer.train()


if __name__ == "__main__":
    main()
