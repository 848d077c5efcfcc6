"""The range of every number in the configuration but those of grpo, which checks its own."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxrl.errors import UserError


@dataclass(frozen=True, slots=True)
class Range:
    """Finite numbers from `low` to `high`, both included unless open."""

    low: float
    high: float = math.inf
    usual: str = ""
    open_low: bool = False
    open_high: bool = False

    def holds(self, value: float) -> bool:
        """False for NaN and infinity too."""
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return math.isfinite(value) and above and below

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"greater than {self.low}" if self.open_low else f"at least {self.low}"
        ends = "(" if self.open_low else "[", ")" if self.open_high else "]"
        return f"in {ends[0]}{self.low}, {self.high}{ends[1]}"


_COUNT, _OPTIONAL = Range(1), Range(0)
_RATE = Range(0, usual="1e-6 for a checkpoint, 1e-3 from scratch")
_DECAY = Range(0, 1, "0.9 to 0.999", open_high=True)

RANGES = {
    "run": {"seed": Range(0, 2**31 - 1)},
    "model": dict.fromkeys(
        ("width", "num_layers", "num_heads", "num_kv_heads", "head_size", "ffw_size"), _COUNT
    ),
    "task": {
        **dict.fromkeys(("digits", "numbers", "num_train", "num_eval"), _COUNT),
        **dict.fromkeys(("max_chars", "reward_workers", "reward_latency_s"), _OPTIONAL),
        **dict.fromkeys(("reward_timeout_s", "code_wall_s"), Range(0, open_low=True)),
        "reward_memory_gib": Range(1, usual="8"),
    },
    "sft": {
        **dict.fromkeys(("check_every", "sequences_per_step", "epochs"), _COUNT),
        **dict.fromkeys(("steps", "warmup_steps", "samples"), _OPTIONAL),
        "held_out_share": Range(0, 1, open_high=True),
        "stop_at_pass": Range(0, 1),
        "learning_rate": _RATE,
    },
    "lora": {"rank": _OPTIONAL, "alpha": Range(0, usual="rank to 2 rank", open_low=True)},
    "train": {
        **dict.fromkeys(
            (
                "row_tokens",
                "row_parts",
                "rows_per_microbatch",
                "logprob_chunk_tokens",
                "max_nonfinite_steps",
            ),
            _COUNT,
        ),
        **dict.fromkeys(
            (
                "steps",
                "max_generated_tokens",
                "warmup_steps",
                "weight_decay",
                "max_grad_norm",
                "shared_prompt_tokens",
            ),
            _OPTIONAL,
        ),
        "learning_rate": _RATE,
        "beta1": _DECAY,
        "beta2": _DECAY,
        "eps": Range(0, usual="1e-8", open_low=True),
    },
    "rollout": {
        **dict.fromkeys(("slots", "chunk_steps", "max_prompt_tokens", "max_new_tokens"), _COUNT),
        **dict.fromkeys(("top_k", "max_staleness", "shared_prefix"), _OPTIONAL),
        "temperature": Range(0, usual="1"),
        "top_p": Range(0, 1, "1, which is off", open_low=True),
        "refill_cost_steps": Range(0, 1000, "0.5", open_low=True),
    },
    "mesh": dict.fromkeys(
        ("learner_data", "learner_fsdp", "learner_tensor", "rollout_data", "rollout_tensor"), _COUNT
    ),
    "eval": {
        **dict.fromkeys(("problems", "samples", "final_samples"), _COUNT),
        **dict.fromkeys(("every_steps", "temperature"), _OPTIONAL),
    },
    "checkpoint": {
        "keep": _COUNT,
        **dict.fromkeys(("every_steps", "export_every_steps"), _OPTIONAL),
    },
}
"""By section and field."""


def check_ranges(config: object) -> None:
    """Raise UserError for the first number outside its range."""
    for section, ranges in RANGES.items():
        values = getattr(config, section)
        for name, allowed in ranges.items():
            value = getattr(values, name)
            if not allowed.holds(value):
                usual = f"; usual: {allowed.usual}" if allowed.usual else ""
                raise UserError(f"{section}.{name}={value} must be {allowed}{usual}")
