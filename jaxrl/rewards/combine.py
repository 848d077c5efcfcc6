"""From a verifier's verdict to Magistral's reward, as `task.shaping` sets it. Runs where the verifier runs.

Departure from arXiv:2506.10910 section 2.2: a completion that fails the format gate is verified all the
same, so that filters and pass@k know its correctness; its reward is 0 as there.
"""

from __future__ import annotations

from jaxrl.config import ShapingConfig, TaskConfig
from jaxrl.rewards.format import Gate, passes, split_thoughts
from jaxrl.rewards.language import consistent
from jaxrl.rewards.shaping import magistral_reward, soft_length_penalty
from jaxrl.types import Reward

_GATES = {"math": Gate.BOXED, "code": Gate.CODE}
"""What each built-in verifier needs to find its answer; others take any answer behind the thoughts."""
_SOFT_SHARE = 5
"""The penalty's interval is this part of the longest completion, as in DAPO and Magistral."""


class Magistral:
    """0 without the format; with it 0.1, 0.9 if correct, up to -0.1 for length, 0.1 for one language."""

    def __init__(self, config: TaskConfig, template: str) -> None:
        """template: what prompts are made with; around {problem} it is not in the problem's language.

        Raises: UserError for a length penalty that cannot be.
        """
        shaping = config.shaping
        own = _GATES.get(config.judge or "", Gate.THINK)
        self._gate = own if shaping.format == "default" else Gate(shaping.format)
        self._opened = shaping.think_opened
        self._lengths = _lengths(shaping)
        self._before, _, self._after = template.partition("{problem}")

    def __call__(self, prompt: str, completion: str, num_tokens: int, verdict: Reward) -> Reward:
        """The reward; its parts are the verdict's with `format`, `correct`, `length`, `language`, which add
        up to the total. num_tokens: length of the completion, its stop token included."""
        formatted = passes(completion, self._gate, self._opened)
        penalty = soft_length_penalty(num_tokens, *self._lengths) if self._lengths else 0.0
        shaped = magistral_reward(
            formatted,
            verdict.correct,
            penalty,
            formatted and self._one_language(prompt, completion),
        )
        return Reward(
            total=shaped.total, parts={**verdict.parts, **shaped.parts}, correct=verdict.correct,
            answer=verdict.answer,
        )  # fmt: skip

    def _one_language(self, prompt: str, completion: str) -> bool:
        problem = prompt.removeprefix(self._before).removesuffix(self._after)
        parts = split_thoughts(completion, self._opened)
        return parts is not None and consistent(problem, *parts)


def _lengths(shaping: ShapingConfig) -> tuple[int, int] | None:
    """(longest completion, tokens before it over which the penalty grows); None without a limit."""
    if not shaping.max_tokens:
        return None
    soft = shaping.soft_tokens or max(1, shaping.max_tokens // _SOFT_SHARE)
    soft_length_penalty(0, shaping.max_tokens, soft)
    return shaping.max_tokens, soft
