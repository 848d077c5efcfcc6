"""What every measured system is given: one model shape, the same prompts, the same length limits.

Written to a file once per run and read by every worker, so that nothing depends on a worker's
random numbers. numpy only: it is imported in environments without jax or torch.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

FIRST_WORD = 3
"""Token ids below are padding, end and start; prompts and the shared tokenizer use the others as words."""
PAD, EOS, BOS = 0, 1, 2


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A Qwen3-like decoder with untied embeddings and qk-norm."""

    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    ffw_size: int
    vocab_size: int

    @property
    def matmul_parameters(self) -> int:
        """Parameters that every token is multiplied with: all but norms and the embedding lookup."""
        attention = self.width * self.head_size * (2 * self.num_heads + 2 * self.num_kv_heads)
        layer = attention + 3 * self.width * self.ffw_size
        return self.num_layers * layer + self.vocab_size * self.width

    @property
    def parameters(self) -> int:
        """All parameters."""
        norms = 2 * self.width + 2 * self.head_size
        embedding = self.vocab_size * self.width
        return self.matmul_parameters + embedding + self.num_layers * norms + self.width

    def attention_flops(self, keys: float) -> float:
        """Multiply-adds of scores and values of one query token that sees `keys` keys, all layers."""
        return 4.0 * keys * self.num_layers * self.num_heads * self.head_size


SHAPES = {
    "tiny": Shape(
        width=64, num_layers=2, num_heads=4, num_kv_heads=2, head_size=16, ffw_size=128, vocab_size=512,
    ),
    "3m": Shape(
        width=256, num_layers=4, num_heads=4, num_kv_heads=2, head_size=64, ffw_size=768, vocab_size=512,
    ),
    "20m": Shape(
        width=512, num_layers=6, num_heads=8, num_kv_heads=4, head_size=64, ffw_size=1536,
        vocab_size=2048,
    ),
    "80m": Shape(
        width=768, num_layers=12, num_heads=12, num_kv_heads=4, head_size=64, ffw_size=2048,
        vocab_size=4096,
    ),
}  # fmt: skip
"""tiny is for trying the harness; 3m has 3.4, 20m 21.0, 80m 81.8 million parameters."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Both scenarios of one run."""

    shape: Shape
    checkpoint: str
    """Folder with config.json and model.safetensors (random weights), common to all systems."""
    prompts: list[list[int]]
    """P prompts of equal length, each starting with BOS."""
    group_size: int
    """G samples per prompt."""
    new_tokens: int
    """Completion length of the fixed scenario; no token ends a completion."""
    tail_prompts: list[list[int]]
    tail_lengths: list[int]
    """Completion length of each of the P' * G samples of the tail scenario, group by group."""
    tail_slots: int
    """Sequences jaxrl decodes at once in the tail scenario; batch limit of continuous batching."""
    microbatch: int
    """Sequences in one forward and backward of the train step."""
    jaxrl_microbatch: int
    """The same, for jaxrl."""
    threads: int

    @property
    def samples(self) -> int:
        """Samples of the fixed scenario."""
        return len(self.prompts) * self.group_size

    @property
    def tokens(self) -> int:
        """Generated tokens of the fixed scenario."""
        return self.samples * self.new_tokens

    @property
    def tail_tokens(self) -> int:
        """Useful generated tokens of the tail scenario."""
        return sum(self.tail_lengths)

    @property
    def max_tail_length(self) -> int:
        """The longest completion of the tail scenario."""
        return max(self.tail_lengths)

    @property
    def prompt_tokens(self) -> int:
        """Length of every prompt."""
        return len(self.prompts[0])

    @property
    def train_tokens(self) -> int:
        """Prompt and completion tokens of one train step."""
        return self.samples * (self.prompt_tokens + self.new_tokens)

    def rollout_flops(self) -> float:
        """Useful flops of the fixed rollout: each prompt prefilled once, then each token decoded."""
        decode = self.samples * decode_flops(self.shape, self.prompt_tokens, self.new_tokens)
        return decode + len(self.prompts) * self._prefill_flops()

    def tail_flops(self) -> float:
        """Useful flops of the tail scenario."""
        lengths = self.tail_lengths
        decode = sum(decode_flops(self.shape, self.prompt_tokens, n) for n in lengths)
        return decode + len(self.tail_prompts) * self._prefill_flops()

    def train_flops(self) -> float:
        """Useful flops of the train step: each prompt once, then each completion, forward and backward."""
        decode = self.samples * decode_flops(self.shape, self.prompt_tokens, self.new_tokens)
        return 3.0 * (decode + len(self.prompts) * self._prefill_flops())

    def _prefill_flops(self) -> float:
        tokens, shape = self.prompt_tokens, self.shape
        without_head = shape.matmul_parameters - shape.vocab_size * shape.width
        return tokens * (2.0 * without_head + shape.attention_flops((tokens + 1) / 2))

    def save(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Workload:
        """Read what `save` wrote."""
        values = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**values, "shape": Shape(**values["shape"])})


def decode_flops(shape: Shape, prompt_tokens: int, new_tokens: int) -> float:
    """Flops of decoding `new_tokens` tokens after a prompt."""
    keys = prompt_tokens + (new_tokens - 1) / 2
    return new_tokens * (2.0 * shape.matmul_parameters + shape.attention_flops(keys))


def random_prompts(count: int, tokens: int, vocab_size: int, seed: int) -> list[list[int]]:
    """`count` prompts of `tokens` tokens: BOS, then random words."""
    draw = np.random.default_rng(seed)
    words = draw.integers(FIRST_WORD, vocab_size, (count, tokens - 1))
    return [[BOS, *map(int, row)] for row in words]


def tail_lengths(count: int, *, median: int, ratio: float, seed: int) -> list[int]:
    """`count` lognormal lengths with the given median, of which the longest is exactly median * ratio.

    The scale of the logarithm follows from the longest draw; shorter than 1 is 1.
    """
    z = np.random.default_rng(seed).standard_normal(count)
    z -= np.median(z)
    sigma = np.log(ratio) / z.max()
    return [int(n) for n in np.maximum(1, np.round(median * np.exp(sigma * z)))]
