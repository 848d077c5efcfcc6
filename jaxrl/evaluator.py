"""Held-out evaluation through the same sampling engine as training."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from jaxrl.prompts import encode_prompt
from jaxrl.rewards.pool import RewardPool
from jaxrl.rollout.engine import Request, RolloutEngine, SamplingParams
from jaxrl.rollout.worker import completion_text
from jaxrl.statistics import Estimate, majority_at_k, mean_pass_at_k, mean_with_normal_interval
from jaxrl.tokenizer import Tokenizer
from jaxrl.types import Completion, Finish, Problem, Reward, Rollout, Snapshot


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Samples of P problems, n each, and what follows from them."""

    problems: tuple[Problem, ...]
    rollouts: tuple[tuple[Rollout, ...], ...]  # [P][n]
    version: int

    @property
    def correct(self) -> np.ndarray:
        """[P, n] bool."""
        return np.array([[r.reward.correct for r in row] for row in self.rollouts])

    @property
    def pass_at_1(self) -> Estimate:
        """Mean over problems of the share of correct samples, with its interval over problems."""
        return mean_with_normal_interval(self.correct.mean(axis=1))

    def pass_at(self, k: int) -> float:
        """Unbiased pass@k (arXiv:2107.03374 eq. 1), k <= n."""
        return mean_pass_at_k(self.correct, k)

    def majority_at(self, k: int) -> float:
        """maj@k: the most frequent completion is correct; ties count in part."""
        rng = np.random.default_rng(0)
        votes = [
            majority_at_k(
                [r.text.strip() for r in row], [r.reward.correct for r in row], k, rng=rng
            )
            for row in self.rollouts
        ]
        return float(np.mean(votes))

    def metrics(self, prefix: str) -> dict[str, float]:
        """Curves `prefix/...`: pass@1, pass@n, maj@n, reward, length, share cut off by the limit."""
        samples = [r for row in self.rollouts for r in row]
        n = len(self.rollouts[0])
        curves = {
            f"{prefix}/pass_at_1": self.pass_at_1.mean,
            f"{prefix}/reward_mean": float(np.mean([r.reward.total for r in samples])),
            f"{prefix}/length_mean": float(np.mean([len(r.completion.tokens) for r in samples])),
            f"{prefix}/clipped_ratio": float(
                np.mean([r.completion.finish is Finish.LENGTH for r in samples])
            ),
        }
        for k in sorted({8, n} if n > 8 else {n}):
            if k > 1:
                curves[f"{prefix}/pass_at_{k}"] = self.pass_at(k)
                curves[f"{prefix}/maj_at_{k}"] = self.majority_at(k)
        return curves


class Evaluator:
    """Samples and verifies a fixed list of problems; the same weights and settings give the same result."""

    def __init__(
        self, engine: RolloutEngine, rewards: RewardPool, tokenizer: Tokenizer, *, add_bos: bool,
        params: SamplingParams,
    ) -> None:  # fmt: skip
        self._engine = engine
        self._rewards = rewards
        self._tokenizer = tokenizer
        self._add_bos = add_bos
        self._params = params

    def run(self, snapshot: Snapshot, problems: Sequence[Problem], samples: int) -> Evaluation:
        """`samples` completions of each problem under `snapshot`; verification overlaps sampling."""
        for stream, problem in enumerate(problems):
            prompt = encode_prompt(
                problem, self._tokenizer, self._engine.max_prompt_tokens, self._add_bos
            )
            self._engine.submit(
                Request(
                    stream=stream,
                    prompt=prompt,
                    sample_indices=tuple(range(samples)),
                    params=self._params,
                )
            )
        rows: list[list[Completion]] = [[] for _ in problems]
        verdicts: dict[int, Future[list[Reward]]] = {}
        while not self._engine.is_idle:
            for request, completion in self._engine.run_chunk(snapshot):
                row = rows[request.stream]
                row.append(completion)
                if len(row) == samples:
                    row.sort(key=lambda c: c.sample_index)
                    verdicts[request.stream] = self._submit(problems[request.stream], row)
        return Evaluation(
            problems=tuple(problems),
            rollouts=tuple(self._rollouts(row, verdicts[p].result()) for p, row in enumerate(rows)),
            version=snapshot.version,
        )

    def _submit(self, problem: Problem, row: Sequence[Completion]) -> Future[list[Reward]]:
        return self._rewards.submit_many(
            [
                (
                    problem,
                    completion_text(self._tokenizer, c),
                    c.finish is Finish.STOP,
                    len(c.tokens),
                )
                for c in row
            ]
        )

    def _rollouts(
        self, row: Sequence[Completion], rewards: Sequence[Reward]
    ) -> tuple[Rollout, ...]:
        return tuple(
            Rollout(completion=c, text=completion_text(self._tokenizer, c), reward=reward)
            for c, reward in zip(row, rewards, strict=True)
        )
