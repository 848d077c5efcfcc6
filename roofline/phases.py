"""The phases of a run. Predicted and measured times share these keys. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Phase(StrEnum):
    """What a device, or the host on its behalf, is doing during a span."""

    PREFILL = "prefill"
    """Keys and values of prompts."""
    DECODE = "decode"
    """A chunk of decode steps over all slots."""
    REWARD = "reward"
    """Verification of completions, in worker processes."""
    SCORE = "score"
    """Log-probabilities under the learner, forward only."""
    REFERENCE = "reference"
    """Log-probabilities under the frozen reference, forward only."""
    TRAIN = "train"
    """Forward and backward over the micro-batches of one optimizer step."""
    OPTIMIZER = "optimizer"
    """Gradient norm, clipping, AdamW."""
    PUBLISH = "publish"
    """Cast, reshard and copy of the weights to the rollout devices."""
    EVAL = "eval"
    """Held-out evaluation."""
    CHECKPOINT = "checkpoint"
    """The blocking part of a checkpoint."""
    COMPILE = "compile"
    """A call that traced and compiled its program, the first execution included."""
    WAIT_BATCH = "wait_batch"
    """The learner is idle: no batch of finished groups yet."""
    WAIT_LEARNER = "wait_learner"
    """The rollout is idle: every slot that the staleness bound allows is taken."""


WORK_PHASES = (
    Phase.PREFILL, Phase.DECODE, Phase.REWARD, Phase.SCORE, Phase.REFERENCE,
    Phase.TRAIN, Phase.OPTIMIZER, Phase.PUBLISH,
)  # fmt: skip
"""Phases that have a cost, in the order in which a sample meets them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseCost:
    """Work of one phase on ONE device (the busiest one)."""

    phase: Phase
    flops: float = 0.0
    """Floating point operations; a multiply-add is two."""
    hbm_bytes: float = 0.0
    """Bytes between memory and compute units, each operand of each kernel once."""
    streamed_bytes: float = 0.0
    """Part of hbm_bytes that no matrix product hides: elementwise passes, the cache read by
    decode attention."""
    link_bytes: float = 0.0
    """Bytes that this device sends over the device-to-device links."""
    launches: int = 0
    """Kernels (fused operators) started inside the programs."""
    collectives: int = 0
    """Collectives and copies between devices, not among the launches."""
    dispatches: int = 0
    """Programs started from Python."""
    dtype: str = "float32"
    """Type the matrix products run in; decides which peak binds."""

    def __add__(self, other: PhaseCost) -> PhaseCost:
        """Both, one after the other; they must agree in phase and dtype."""
        if other.phase != self.phase:
            raise ValueError(f"cannot add a cost of {other.phase} to one of {self.phase}")
        if other.dtype != self.dtype:
            raise ValueError(f"cannot add a cost in {other.dtype} to one in {self.dtype}")
        return PhaseCost(
            phase=self.phase,
            flops=self.flops + other.flops,
            hbm_bytes=self.hbm_bytes + other.hbm_bytes,
            streamed_bytes=self.streamed_bytes + other.streamed_bytes,
            link_bytes=self.link_bytes + other.link_bytes,
            launches=self.launches + other.launches,
            collectives=self.collectives + other.collectives,
            dispatches=self.dispatches + other.dispatches,
            dtype=self.dtype,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseTime:
    """One measured span. `step` is the optimizer step it served, `version` the weights it used."""

    phase: Phase
    lane: str
    """Row of the Gantt chart: rollout, learner, reward."""
    start_s: float
    duration_s: float
    step: int | None = None
    version: int | None = None
