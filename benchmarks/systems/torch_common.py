"""What the two torch workers share."""

from __future__ import annotations

import time

import torch
from transformers import StoppingCriteria

from benchmarks.systems.protocol import Answer

PEAK_SIZE, PEAK_REPEATS = 2048, 3


class OwnLengths(StoppingCriteria):
    """Row i is done after lengths[i] new tokens; generation ends when every row is done."""

    def __init__(self, prompt_tokens: int, lengths: list[int]) -> None:
        self._ends = prompt_tokens + torch.tensor(lengths)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        """Rows that are done."""
        return input_ids.shape[1] >= self._ends


def peak() -> Answer:
    """FLOP/s of a large float32 product in torch."""
    x = torch.full((PEAK_SIZE, PEAK_SIZE), PEAK_SIZE**-1.0)
    torch.mm(x, x)
    times = []
    for _ in range(PEAK_REPEATS):
        began = time.perf_counter()
        torch.mm(x, x)
        times.append(time.perf_counter() - began)
    return {"flops_per_s": 2.0 * PEAK_SIZE**3 / min(times)}
