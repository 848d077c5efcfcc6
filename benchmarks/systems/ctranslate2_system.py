"""Worker: ctranslate2 in float32, one batch of all samples. Rollout only.

Tail: the callback that ends a sequence at its own length; ctranslate2 takes finished sequences out of
the batch by itself. The callback costs a call into Python per token.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable

import ctranslate2

from benchmarks.systems.protocol import GREEDY_PROMPTS, GREEDY_TOKENS, Answer, Conversation
from benchmarks.workload import Workload

DTYPE = "float32"


class System:
    """The converted model."""

    def __init__(self, workload: Workload, folder: str) -> None:
        self.workload = workload
        converter = ctranslate2.converters.TransformersConverter(workload.checkpoint)
        path = converter.convert(folder, quantization=DTYPE, force=True)
        self.generator = ctranslate2.Generator(
            path, device="cpu", inter_threads=1, intra_threads=workload.threads, compute_type=DTYPE
        )

    def step(self) -> Answer:
        """One rollout."""
        work = self.workload
        began = time.perf_counter()
        out = self._generate(_rows(work.prompts, work.group_size), work.new_tokens, topk=0)
        return {"rollout_s": time.perf_counter() - began, "rollout_tokens": sum(map(len, out))}

    def tail(self) -> Answer:
        """Every sample to its own length."""
        work = self.workload
        lengths = work.tail_lengths
        began = time.perf_counter()
        out = self._generate(
            _rows(work.tail_prompts, work.group_size), work.max_tail_length, topk=0,
            callback=lambda result: result.step + 1 >= lengths[result.batch_id],
        )  # fmt: skip
        seconds = time.perf_counter() - began
        assert [len(tokens) for tokens in out] == lengths
        return {"rollout_s": seconds, "rollout_tokens": sum(map(len, out))}

    def greedy(self) -> Answer:
        """Greedy completions of the first prompts."""
        rows = _rows(self.workload.prompts[:GREEDY_PROMPTS], 1)
        return {"tokens": self._generate(rows, GREEDY_TOKENS, topk=1)}

    def _generate(
        self, rows: list[list[str]], new_tokens: int, *, topk: int,
        callback: Callable[[ctranslate2.GenerationStepResult], bool] | None = None,
    ) -> list[list[int]]:  # fmt: skip
        results = self.generator.generate_batch(
            rows, max_length=new_tokens, sampling_topk=topk, sampling_temperature=1.0,
            include_prompt_in_result=False, max_batch_size=len(rows), end_token=[],
            callback=callback,
        )  # fmt: skip
        return [result.sequences_ids[0] for result in results]


def _rows(prompts: list[list[int]], samples: int) -> list[list[str]]:
    words = [[f"w{token}" for token in prompt] for prompt in prompts]
    return [row for row in words for _ in range(samples)]


def main() -> None:
    """Serve."""
    conversation = Conversation()
    with tempfile.TemporaryDirectory() as folder:
        system = System(conversation.workload, folder)
        conversation.ready({"ctranslate2": ctranslate2.__version__})
        conversation.serve({"step": system.step, "tail": system.tail, "greedy": system.greedy})


if __name__ == "__main__":
    main()
