"""What a packed row may hold, how it is divided when sequences share their prompts, how it attends.
Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RowAttention = Literal["blocks", "xla", "cudnn", "pallas"]
"""Programs of attention for packed rows and prompts (`models.attention`)."""
SCORES_IN_CACHE, SCORES_IN_MEMORY = 2**20, 2**26
"""Float32 scores that exist at once: 4 MiB, about a core's share of cache; 256 MiB, from where on more at once
saves an accelerator nothing."""

MAX_SEGMENTS = 64
"""Most segments of a packed row, its padding among them: cuDNN's attention keeps one log-sum-exp per segment,
head and token of the row."""


HOPPER = 9.0
"""Compute capability from which cuDNN takes several segments per row."""
LARGEST_HEAD = 128
"""Head size that cuDNN takes forward and backward on every card; a multiple of 8."""


def rows_on_cuda(capability: float, value_bytes: int, head_size: int) -> RowAttention:
    """The program for packed rows of such values on a CUDA device of that compute capability where none was
    measured: cuDNN's where it accepts them."""
    fits = value_bytes == 2 and head_size % 8 == 0 and head_size <= LARGEST_HEAD
    return "cudnn" if fits and capability >= HOPPER else "xla"


def scores_at_once(program: RowAttention) -> int:
    """Float32 scores that a program of attention has in memory at once; 0: its kernels write none."""
    return {"blocks": SCORES_IN_CACHE, "xla": SCORES_IN_MEMORY}.get(program, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedPrompts:
    """A row [prompts | part 1 | ... | part n]: what the sequences of a part begin with stands once, in front.

    No sequence crosses the border of a part, so that attention is over the row's prompts and the part
    alone. Source of the idea: arXiv:2506.05433 (Prefix Grouper).
    """

    prompt_tokens: int
    """Positions at the start of each row that hold prompts, one after another."""
    parts: int
    """Equal parts of the rest of the row."""

    def part_tokens(self, row_tokens: int) -> int:
        """Length of a part of a row of `row_tokens`; ValueError if the parts do not come out equal."""
        rest = row_tokens - self.prompt_tokens
        if rest < self.parts or rest % self.parts:
            raise ValueError(
                f"a row of {row_tokens} tokens less {self.prompt_tokens} of prompts cannot be cut into "
                f"{self.parts} equal parts; use {self.prompt_tokens} + a multiple of {self.parts}"
            )
        return rest // self.parts


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefixRows:
    """Prompts whose keys and values are held once for all slots that sample them (`models.prefixes`)."""

    rows: int
    """R, prompts held at once."""
    lanes: int
    """C, slots that may read a row."""
    tokens: int
    """P, longest prompt [tokens]."""


def attended(row_tokens: int, shared: SharedPrompts | None) -> tuple[int, int]:
    """(pairs of query and key, keys read) of attention in one row, masked pairs included."""
    if shared is None:
        return row_tokens**2, row_tokens
    prompts, part = shared.prompt_tokens, shared.part_tokens(row_tokens)
    pairs = prompts**2 + shared.parts * part * (prompts + part)
    return pairs, prompts + shared.parts * (prompts + part)


def samples_per_row(
    row_tokens: int, shared: SharedPrompts | None, *, prompt: float, completion: float, group: int
) -> int:
    """Samples of such mean lengths that a row holds, `group` of them with each prompt; at least 1."""
    if shared is None:
        return max(1, int(row_tokens / max(1.0, prompt + completion)))
    in_parts = shared.parts * max(1, int(shared.part_tokens(row_tokens) / max(1.0, completion)))
    prompts = max(1, int(shared.prompt_tokens / max(1.0, prompt - 1)))
    return min(in_parts, prompts * group)
