"""Sections of the configuration that only some runs use: supervised training, adapters, preference pairs,
curricula. Loads no jax."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jaxrl.errors import UserError
from models.config import ALL_LINEAR, Lora


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise UserError(message)


@dataclass(frozen=True, kw_only=True, slots=True)
class SftConfig:
    """Supervised training: on chats of your own (`python -m jaxrl.sft` with sft.path), or on the task's worked
    solutions, as a cold start before reinforcement learning."""

    path: Path | None = None
    """Chats: .jsonl, .jsonl.gz, .parquet or a data set of the hub, as task.path; rows as jaxrl.chats says."""
    test_path: Path | None = None
    """Chats held out; None: a share of path."""
    held_out_share: float = 0.05
    """Share of the chats of path that is held out, chosen by each chat's hash."""
    epochs: int = 1
    """Chats: passes over them, where steps is 0."""
    skip_long: bool = False
    """Leave out chats longer than train.row_tokens, and say how many, instead of refusing them."""
    samples: int = 4
    """Chats held out whose next reply is sampled at each evaluation, for samples.jsonl; 0: none."""
    steps: int = 0
    """Most optimizer steps; 0: of chats as many as epochs makes, of worked solutions none."""
    stop_at_pass: float = 1.0
    """Cold start: stop early once sampled held-out pass@1 reaches this (checked every `check_every` steps)."""
    check_every: int = 25
    """Cold start: steps between those checks."""
    sequences_per_step: int = 256
    """Chats or worked solutions in each optimizer step."""
    learning_rate: float = 1e-3
    """Peak AdamW learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape after the warm-up; linear and cosine end at 10 % of the peak."""
    warmup_steps: int = 20
    """Linear warm-up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """Train a low-rank adapter (arXiv:2106.09685) and leave the weights as they are."""

    rank: int = 0
    """r; 0: no adapter, all weights are trained."""
    alpha: float = 32.0
    """The adapter's product is multiplied by alpha / rank."""
    targets: str = ALL_LINEAR
    """all-linear, or some of q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj, with commas."""

    @property
    def shape(self) -> Lora | None:
        """The adapter that these settings ask for, if any."""
        return None if self.rank == 0 else Lora.of(self.rank, self.alpha, self.targets)

    def __post_init__(self) -> None:
        try:
            Lora.of(self.rank or 1, self.alpha, self.targets)
        except ValueError as error:
            raise UserError(str(error)) from error


@dataclass(frozen=True, kw_only=True, slots=True)
class ShapingConfig:
    """What the reward is made of: the verifier's verdict alone, or with form, length and language."""

    kind: Literal["verifier", "magistral"] = "verifier"
    """magistral (gsm8k, math, code, jsonl): 0 unless the completion has the form; with it 0.1, 0.9 if correct,
    down to -0.1 for length, 0.1 if problem, thoughts and answer are in one language (arXiv:2506.10910)."""
    format: Literal["default", "think", "boxed", "code"] = "default"
    """What follows the thoughts in <think></think>: anything, a box, a code block; default: what the verifier
    looks for."""
    think_opened: bool = False
    """The prompt ends with <think> already, as some chat templates have it."""
    max_tokens: int = 0
    """Length at which the penalty is whole [tokens]; 0: rollout.max_new_tokens."""
    soft_tokens: int = 0
    """Tokens before it over which the penalty grows; 0: a fifth."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PreferenceConfig:
    """`python -m jaxrl.preference`: training on pairs of a better and a worse completion."""

    path: Path | None = None
    """Pairs: .jsonl, .jsonl.gz, .parquet or a data set of the hub, as task.path; see jaxrl.pairs."""
    loss: Literal["sft", "dpo", "apo_zero", "apo_down"] = "dpo"
    """sft: the chosen completion alone; dpo arXiv:2305.18290; apo_zero where the chosen completions are
    better than the model, apo_down where the model is better (arXiv:2408.06266)."""
    beta: float = 0.1
    """Inverse temperature of the implicit reward beta * log(policy / reference); 0.05 in SmolLM3's APO."""
    epochs: int = 1
    """Passes over the pairs."""
    pairs_per_step: int = 32
    """Pairs in each optimizer step."""

    def __post_init__(self) -> None:
        _check(self.beta > 0, f"preference.beta={self.beta} must be positive; usual: 0.1")
        for name in ("epochs", "pairs_per_step"):
            value = getattr(self, name)
            _check(value >= 1, f"preference.{name}={value} must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class CurriculumConfig:
    """Which problems are sampled, and how long completions may get, as the policy learns."""

    edge: bool = False
    """Sample problems at the edge of competence only: solved sometimes, and not nearly always."""
    max_pass: float = 0.8
    """A problem whose posterior mean of pass@1 is at least this counts as solved and is left out."""
    unsolved_after: int = 8
    """Samples without a success after which a problem leaves the stream and is only probed."""
    decay: float = 0.99
    """Factor per optimizer step on the remembered outcomes: what is solved comes back to be checked, 8 of 8
    after some 100 steps."""
    probe_slots: int = 0
    """Most idle rollout slots that sample unsolved problems; 0 is off, -1 as many as the roofline predicts idle
    (the printed plan says how many). A waiting prompt takes them back."""
    probe_samples: int = 4
    """Samples of one probe; a success puts its problem back into the stream."""
    lengths: tuple[int, ...] = ()
    """Length curriculum: longest completion of each stage [tokens], the last rollout.max_new_tokens."""
    slots: tuple[int, ...] = ()
    """Slots of each stage, the last rollout.slots; none: rollout.slots throughout."""
    stage_steps: tuple[int, ...] = ()
    """Optimizer steps after which stage 1, 2, ... begins; none: truncated_share decides."""
    truncated_share: float = 0.25
    """The next stage begins when this share of completions was cut off, over stage_window steps."""
    stage_window: int = 20
    """Optimizer steps of that mean, and least length of a stage."""

    def __post_init__(self) -> None:
        _check(
            0 < self.max_pass <= 1,
            f"curriculum.max_pass={self.max_pass} must lie in (0, 1]; usual: 0.8",
        )
        _check(
            0 < self.decay <= 1, f"curriculum.decay={self.decay} must lie in (0, 1]; usual: 0.99"
        )
        for name in ("unsolved_after", "probe_samples", "stage_window"):
            value = getattr(self, name)
            _check(value >= 1, f"curriculum.{name}={value} must be at least 1")
        _check(
            self.probe_slots == 0
            or (self.edge and (self.probe_slots == -1 or self.probe_slots >= self.probe_samples)),
            f"curriculum.probe_slots={self.probe_slots} samples what curriculum.edge=true leaves out, "
            f"curriculum.probe_samples={self.probe_samples} at a time; set edge, and at least so many slots "
            "(-1: as many as are predicted idle)",
        )
        self._check_stages()

    def check_against(self, *, max_new_tokens: int, slots: int, reward_from: str) -> None:
        """Raise UserError if it contradicts the rollout's limits or a reward without labels."""
        for name, stages, last in (
            ("lengths", self.lengths, max_new_tokens), ("slots", self.slots, slots),
        ):  # fmt: skip
            limit = "rollout.max_new_tokens" if name == "lengths" else "rollout.slots"
            _check(
                not stages or stages[-1] == last,
                f"curriculum.{name}={list(stages)} must end with {limit}={last}, the last stage's; change "
                "one of them",
            )
        _check(
            not self.edge or reward_from == "task",
            f"curriculum.edge=true judges problems by their labels, which grpo.reward_from={reward_from} does "
            "without; set curriculum.edge=false",
        )

    def _check_stages(self) -> None:
        stages = len(self.lengths)
        rising = all(a < b for a, b in zip(self.lengths, self.lengths[1:], strict=False))
        _check(
            rising and all(n >= 1 for n in self.lengths),
            f"curriculum.lengths={list(self.lengths)} must rise from stage to stage",
        )
        _check(
            len(self.slots) in (0, stages) and all(n >= 1 for n in self.slots),
            f"curriculum.slots={list(self.slots)} must name slots for each of the {stages} stages of "
            "curriculum.lengths, or none",
        )
        steps = self.stage_steps
        rising = all(a < b for a, b in zip((0, *steps), steps, strict=False))
        _check(
            (not steps or len(steps) == stages - 1) and rising,
            f"curriculum.stage_steps={list(steps)} must rise from above 0 and name the step of each of the "
            f"{max(stages - 1, 0)} changes between the stages of curriculum.lengths, or be left out",
        )
        _check(
            0 < self.truncated_share <= 1,
            f"curriculum.truncated_share={self.truncated_share} must lie in (0, 1]; usual: 0.25",
        )
