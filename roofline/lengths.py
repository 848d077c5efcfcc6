"""How long completions are: lognormal, or as a run measured them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np

QUANTILES = 2048
"""Points that stand for a lognormal distribution."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """An empirical distribution of new tokens per completion."""

    tokens: np.ndarray
    """[n] int, ascending; equally likely."""
    source: str
    """Where it comes from, for tables."""

    def __post_init__(self) -> None:
        """Refuse nothing at all, and completions without a token."""
        if self.tokens.size == 0 or self.tokens[0] < 1:
            raise ValueError(f"lengths from {self.source} must be at least one number, each >= 1")

    @property
    def mean(self) -> float:
        """Expected new tokens."""
        return float(self.tokens.mean())

    def expected_max(self, samples: int) -> float:
        """Expected longest of `samples` independent completions: sum over x_i of x_i times
        ((i/n)^s - ((i-1)/n)^s)."""
        below = (np.arange(self.tokens.size + 1) / self.tokens.size) ** samples
        return float(np.diff(below) @ self.tokens)

    def in_chunks(self, chunk_steps: int) -> Lengths:
        """Decode steps a completion holds its slot for: rounded up to whole chunks."""
        steps = -(-self.tokens // chunk_steps) * chunk_steps
        return Lengths(tokens=steps, source=self.source)

    def evenly(self, samples: int) -> np.ndarray:
        """[samples] int, ascending: that many completions which stand for all."""
        return self.tokens[(2 * np.arange(samples) + 1) * self.tokens.size // (2 * samples)]

    def draw(self, rng: np.random.Generator, samples: int) -> np.ndarray:
        """[samples] int."""
        return self.tokens[rng.integers(0, self.tokens.size, samples)]


def lognormal(mean: float, sigma: float, limit: int) -> Lengths:
    """exp(N(mu, sigma^2)) with this mean before it is cut to 1..limit; sigma 0: all alike.

    Raises:
        ValueError: the mean does not lie in [1, limit], or sigma is negative.
    """
    if not 1 <= mean <= limit:
        raise ValueError(f"mean tokens {mean} must lie in [1, {limit}], the limit of a completion")
    if sigma < 0:
        raise ValueError(f"sigma={sigma} must be >= 0; usual: 0.3 (even) to 1 (long tail)")
    normal = NormalDist()
    scores = np.array([normal.inv_cdf((i + 0.5) / QUANTILES) for i in range(QUANTILES)])
    tokens = np.exp(np.log(mean) - sigma**2 / 2 + sigma * scores)
    whole = np.clip(np.rint(tokens), 1, limit).astype(np.int64)
    return Lengths(tokens=whole, source=f"lognormal, mean {mean:g} before the cut, sigma {sigma:g}")


def measured(folder: Path) -> Lengths:
    """Completions in a run folder's samples.jsonl.

    Raises:
        ValueError: the file is missing, or a line of it has no token count.
    """
    path = folder / "samples.jsonl"
    if not path.is_file():
        raise ValueError(f"{path} is missing; give the folder of a run that sampled something")
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # a torn last line has no newline
    try:
        tokens = np.array(sorted(int(json.loads(line)["tokens"]) for line in lines), np.int64)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} holds a line without a whole number of tokens: {error}"
        ) from error
    return Lengths(tokens=tokens, source=f"{tokens.size} completions of {folder}")
