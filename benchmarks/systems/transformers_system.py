"""Worker: transformers `generate` with its dynamic cache, one batch of all samples. Rollout only.

Tail: a stopping criterion ends each row at its own length; finished rows stay in the batch until the
longest ends, as rows that sampled EOS do.
"""

from __future__ import annotations

import time

import torch
import transformers
from transformers import AutoModelForCausalLM, StoppingCriteriaList

from benchmarks.systems.protocol import GREEDY_PROMPTS, GREEDY_TOKENS, Answer, Conversation
from benchmarks.systems.torch_common import OwnLengths, peak
from benchmarks.workload import PAD, Workload


class System:
    """The model."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        torch.set_num_threads(workload.threads)
        self.model = AutoModelForCausalLM.from_pretrained(
            workload.checkpoint, dtype=torch.float32
        ).eval()

    def step(self) -> Answer:
        """One rollout."""
        work = self.workload
        rows = [prompt for prompt in work.prompts for _ in range(work.group_size)]
        began = time.perf_counter()
        out = self._generate(rows, work.new_tokens, do_sample=True)
        return {"rollout_s": time.perf_counter() - began, "rollout_tokens": out.numel()}

    def tail(self) -> Answer:
        """Until the longest row ends; only useful tokens are counted."""
        work = self.workload
        rows = [prompt for prompt in work.tail_prompts for _ in range(work.group_size)]
        criteria = StoppingCriteriaList([OwnLengths(work.prompt_tokens, work.tail_lengths)])
        began = time.perf_counter()
        out = self._generate(rows, work.max_tail_length, do_sample=True, stopping_criteria=criteria)
        seconds = time.perf_counter() - began
        assert out.shape == (len(work.tail_lengths), work.max_tail_length), out.shape
        return {"rollout_s": seconds, "rollout_tokens": work.tail_tokens}

    def greedy(self) -> Answer:
        """Greedy completions of the first prompts."""
        rows = self.workload.prompts[:GREEDY_PROMPTS]
        return {"tokens": self._generate(rows, GREEDY_TOKENS, do_sample=False).tolist()}

    @torch.inference_mode()
    def _generate(
        self, rows: list[list[int]], new_tokens: int, *, do_sample: bool,
        stopping_criteria: StoppingCriteriaList | None = None,
    ) -> torch.Tensor:  # fmt: skip
        sampling = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} if do_sample else {}
        inputs = torch.tensor(rows)
        out = self.model.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=new_tokens,
            do_sample=do_sample, eos_token_id=None, pad_token_id=PAD,
            stopping_criteria=stopping_criteria, **sampling,
        )  # fmt: skip
        return out[:, inputs.shape[1] :]


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


if __name__ == "__main__":
    main()
