"""What a run tells telemetry: each phase's measured span, with the cost of its real shapes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Literal

from jaxrl.telemetry.spans import Lane, SpanRecorder
from models.config import ModelConfig
from models.rows import PrefixRows, SharedPrompts
from roofline import cost
from roofline.kernels import Layout
from roofline.phases import Phase, PhaseCost, PhaseTime

Work = dict[str, int]
"""Counts of what a span did."""
Observed = AbstractContextManager[Work]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shapes:
    """The static shapes from which every phase's cost follows."""

    model: ModelConfig
    learner: Layout
    rollout: Layout
    num_slots: int
    prefixes: PrefixRows | None = None
    row_tokens: int
    rows_per_microbatch: int
    shared: SharedPrompts | None = None
    chunk_tokens: int
    remat: Literal["none", "block"]
    colocated: bool

    def prefill(self, rows: int, tokens: int, samples: int) -> PhaseCost:
        """Prompts [rows, tokens], each once, copied to the slots of `samples` samples."""
        return cost.prefill(self.model, self.rollout, rows, tokens, samples)

    def decode(
        self, kv_len: int, steps: int, *, slots: int = 0, prefixes: PrefixRows | None = None
    ) -> PhaseCost:
        """`steps` decode steps over so many slots (0: all), each over its own cache and the shared rows of
        prompts, if any, as far as given (None: whole)."""
        rows, width = prefixes or self.prefixes, slots or self.num_slots
        return cost.decode(self.model, self.rollout, width, kv_len, steps, rows)

    def reference(self, microbatches: int) -> PhaseCost:
        """Forward of the reference over all micro-batches."""
        rows, tokens = self.rows_per_microbatch, self.row_tokens
        return cost.reference(
            self.model, self.learner, tokens, rows, microbatches, self.chunk_tokens, self.shared
        )

    def train(self, microbatches: int) -> PhaseCost:
        """Forward and backward over all micro-batches."""
        rows, tokens = self.rows_per_microbatch, self.row_tokens
        return cost.train(
            self.model, self.learner, tokens, rows, microbatches, self.remat, self.chunk_tokens,
            self.shared,
        )  # fmt: skip

    def optimizer(self) -> PhaseCost:
        """One AdamW step."""
        return cost.optimizer(self.model, self.learner)

    def publish(self) -> PhaseCost:
        """One copy of the weights to the rollout devices."""
        return cost.publish(self.model, self.learner, self.rollout, same_devices=self.colocated)


class Observer:
    """Records spans of both lanes. Without a recorder it records nothing.

    Each context yields a dictionary of counts for the caller to fill. `compiled` > 0 says that the call traced
    a program: its span then counts as `compile` and carries no prediction.
    """

    def __init__(self, recorder: SpanRecorder | None = None, shapes: Shapes | None = None) -> None:
        self._recorder = recorder
        self._shapes = shapes

    # -- rollout lane ------------------------------------------------------------------------------

    def prefill(self, *, version: int) -> Observed:
        """The caller sets prompts, tokens (padded length) and samples; 0 prompts: only copies."""

        def cost_of(shapes: Shapes, work: Work) -> PhaseCost:
            return shapes.prefill(work["prompts"], work["tokens"], work["samples"])

        return self._observe(Phase.PREFILL, "rollout", cost_of, version=version)

    def decode(self, *, version: int) -> Observed:
        """The caller sets slots (decoded), kv_len, steps (really done), tokens (really sampled), and where
        slots share prompts prefix_rows and prefix_len (tokens read of each)."""

        def cost_of(shapes: Shapes, work: Work) -> PhaseCost:
            read = shapes.prefixes
            if read is not None:
                read = replace(read, rows=work["prefix_rows"], tokens=work["prefix_len"])
            return shapes.decode(work["kv_len"], work["steps"], slots=work["slots"], prefixes=read)

        return self._observe(Phase.DECODE, "rollout", cost_of, version=version)

    def waited_for_learner(self, start: float) -> None:
        """The rollout had nothing to decode from `start` (time.perf_counter) until now."""
        self._add(Phase.WAIT_LEARNER, "rollout", start, {})

    def verified(self, start: float, *, samples: int) -> None:
        """A group was with the verifiers from `start` (time.perf_counter) until now."""
        self._add(Phase.REWARD, "reward", start, {"samples": samples})

    # -- learner lane ------------------------------------------------------------------------------

    def train(self, microbatches: int) -> Observed:
        """Forward and backward."""
        return self._observe(Phase.TRAIN, "learner", lambda s, _: s.train(microbatches))

    def reference(self, microbatches: int) -> Observed:
        """Scoring under the reference."""
        return self._observe(Phase.REFERENCE, "learner", lambda s, _: s.reference(microbatches))

    def optimizer(self) -> Observed:
        """Clipping and AdamW."""
        return self._observe(Phase.OPTIMIZER, "learner", lambda s, _: s.optimizer())

    def publish(self, version: int) -> Observed:
        """Weights to the rollout devices."""
        return self._observe(Phase.PUBLISH, "learner", lambda s, _: s.publish(), version=version)

    def phase(self, phase: Phase, *, step: int | None = None) -> Observed:
        """A phase of the learner's thread without a cost: wait_batch, eval, checkpoint.

        step: the optimizer step that it belongs to; None: the one under way.
        """
        return self._observe(phase, "learner", lambda _shapes, _work: None, step=step)

    # ----------------------------------------------------------------------------------------------

    @contextmanager
    def _observe(
        self, phase: Phase, lane: Lane, cost_of: Callable[[Shapes, Work], PhaseCost | None], *,
        version: int | None = None, step: int | None = None,
    ) -> Iterator[Work]:  # fmt: skip
        work: Work = {}
        if self._recorder is None or self._shapes is None:
            yield work
            return
        with self._recorder.span(phase, lane, version=version, step=step) as span:
            yield work
            span.work = work
            if work.get("compiled"):
                span.phase = Phase.COMPILE
            else:
                span.cost = cost_of(self._shapes, work)

    def _add(self, phase: Phase, lane: Lane, start: float, work: Work) -> None:
        if self._recorder is None:
            return
        duration_s = time.perf_counter() - start
        begin_s = self._recorder.now_s() - duration_s
        timed = PhaseTime(phase=phase, lane=lane, start_s=begin_s, duration_s=duration_s)
        self._recorder.add(timed, work=work)
