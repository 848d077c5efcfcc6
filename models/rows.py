"""What a packed row may hold, and how it is divided when sequences share their prompts."""

from __future__ import annotations

from dataclasses import dataclass

MAX_SEGMENTS = 64
"""Most segments of a packed row, its padding among them: cuDNN's attention keeps one log-sum-exp per segment,
head and token of the row."""


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
