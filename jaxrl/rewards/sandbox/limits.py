"""What one program may use, and how long it may take."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

_RELAXATION = 1.5
_LEAST_S = 2.0
_TESTS_KEPT = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Limits of one run; the checker of a run has the same ones."""

    wall_s: float = 10.0
    """Longest run [s], the checks included."""
    memory_bytes: int = 1 << 30
    """Address space."""
    output_bytes: int = 4 << 20
    """Standard output, standard error, and each file that is written."""
    disk_bytes: int = 16 << 20
    """All files together; they live in memory and end with the run."""
    threads: int = 32
    """Tasks of the run; further processes are forbidden altogether."""


@dataclass(kw_only=True, slots=True)
class AdaptiveWall:
    """Time limit from the slowest correct run of the same test so far: wrong programs often hang.

    min(max(2 s, 1.5 * slowest correct), ceiling), RollPacker (arXiv:2509.21009 section 4.3, there
    with a ceiling of 30 s). The last 4096 tests are remembered, each process for itself.
    """

    ceiling_s: float
    """Limit [s] of a test that nothing has passed yet, and the highest."""
    _slowest_s: OrderedDict[int, float] = field(default_factory=OrderedDict)

    def wall_s(self, test: int) -> float:
        """Limit [s] for the test with this hash."""
        if (slowest_s := self._slowest_s.get(test)) is None:
            return self.ceiling_s
        return min(max(_LEAST_S, _RELAXATION * slowest_s), self.ceiling_s)

    def passed(self, test: int, took_s: float) -> None:
        """Note a correct run of `took_s` seconds."""
        self._slowest_s[test] = max(took_s, self._slowest_s.pop(test, 0.0))
        if len(self._slowest_s) > _TESTS_KEPT:
            self._slowest_s.popitem(last=False)
