"""A histogram that is cheap enough for every step and never forgets."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass


@dataclass(frozen=True)
class HistogramStats:
    """counts[i]: values above bounds[i - 1] and at most bounds[i]; the last one, above them all."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float


class Histogram:
    """Counts values by ascending upper bounds since the start."""

    def __init__(self, bounds: tuple[float, ...]):
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value

    def stats(self) -> HistogramStats:
        return HistogramStats(self._bounds, tuple(self._counts), self._total)
