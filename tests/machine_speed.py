"""How slow this machine is at the moment, for bounds on times that were set on another one."""

from __future__ import annotations

import time
from statistics import median

REFERENCE_SECONDS = 2.6e-3  # of python_seconds: about that of an AMD EPYC of 2023 at 3.7 GHz


def slowness() -> float:
    """How many times as long as on the machine of the bounds plain Python takes, at least 1."""
    return max(1.0, python_seconds() / REFERENCE_SECONDS)


def python_seconds() -> float:
    """Of a loop with what the engine's host side is made of: calls, attributes, dicts, lists."""

    def once() -> float:
        counts: dict[int, int] = {}
        pairs: list[tuple[int, dict[int, int]]] = []
        started = time.perf_counter()
        for i in range(20_000):
            count(counts, i & 255)
            pairs.append((i, counts))
        return time.perf_counter() - started

    return median(once() for _ in range(9))


def count(counts: dict[int, int], key: int) -> None:
    counts[key] = counts.get(key, 0) + 1
