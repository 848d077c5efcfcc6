"""Worker: transformers' own continuous batching (paged cache, scheduler thread). Rollout only.

Its requests carry their own limits, so the tail scenario needs no emulation.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation import ContinuousBatchingConfig

from benchmarks.systems.protocol import GREEDY_PROMPTS, GREEDY_TOKENS, Answer, Conversation
from benchmarks.systems.torch_common import peak
from benchmarks.workload import PAD, Workload

NEVER = -1
"""An end token that no logit has."""


class System:
    """The model and its managers, one per way of sampling."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        torch.set_num_threads(workload.threads)
        self.model = AutoModelForCausalLM.from_pretrained(
            workload.checkpoint, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        self.managers: dict[bool, Any] = {}

    def step(self) -> Answer:
        """One rollout."""
        work = self.workload
        rows = [prompt for prompt in work.prompts for _ in range(work.group_size)]
        began = time.perf_counter()
        out = self._generate(rows, [work.new_tokens] * len(rows), do_sample=True)
        return {"rollout_s": time.perf_counter() - began, "rollout_tokens": sum(map(len, out))}

    def tail(self) -> Answer:
        """Every sample to its own length."""
        work = self.workload
        rows = [prompt for prompt in work.tail_prompts for _ in range(work.group_size)]
        began = time.perf_counter()
        out = self._generate(rows, work.tail_lengths, do_sample=True)
        return {"rollout_s": time.perf_counter() - began, "rollout_tokens": sum(map(len, out))}

    def greedy(self) -> Answer:
        """Greedy completions of the first prompts."""
        rows = self.workload.prompts[:GREEDY_PROMPTS]
        out = self._generate(rows, [GREEDY_TOKENS] * len(rows), do_sample=False)
        self.managers.pop(False).stop(block=True)
        return {"tokens": out}

    def _manager(self, do_sample: bool) -> Any:
        if do_sample not in self.managers:
            work = self.workload
            length = work.prompt_tokens + max(work.new_tokens, work.max_tail_length)
            page = 32
            manager = self.model.init_continuous_batching(
                generation_config=GenerationConfig(
                    do_sample=do_sample, temperature=1.0, top_k=0, top_p=1.0,
                    eos_token_id=NEVER, pad_token_id=PAD,
                ),
                continuous_batching_config=ContinuousBatchingConfig(
                    page_size=page, num_blocks=work.samples * -(-length // page),
                    max_batch_tokens=2048,
                ),
            )  # fmt: skip
            manager.start()
            self.managers[do_sample] = manager
        return self.managers[do_sample]

    def _generate(
        self, rows: Sequence[list[int]], limits: Sequence[int], *, do_sample: bool
    ) -> list[list[int]]:
        manager = self._manager(do_sample)
        names = [
            manager.add_request(row, max_new_tokens=limit)
            for row, limit in zip(rows, limits, strict=True)
        ]
        done: dict[str, list[int]] = {}
        while len(done) < len(names):
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                done[result.request_id] = list(result.generated_tokens)
            assert manager.is_running(), "the manager ended"
        return [done[name] for name in names]


def main() -> None:
    """Serve."""
    conversation = Conversation()
    system = System(conversation.workload)
    conversation.ready(
        {"transformers": transformers.__version__, "torch": torch.__version__},
        parameters=sum(p.numel() for p in system.model.parameters()),
    )
    conversation.serve(
        {"step": system.step, "tail": system.tail, "greedy": system.greedy, "peak": peak}
    )
    for manager in system.managers.values():
        manager.stop(block=True)


if __name__ == "__main__":
    main()
