"""How long an event loop keeps its tasks waiting."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator

TICK = 0.005  # seconds between two looks


async def _measure(lags: list[float], enough: threading.Event) -> None:
    while not enough.is_set():
        due = time.monotonic() + TICK
        await asyncio.sleep(TICK)
        lags.append(time.monotonic() - due)


@contextlib.contextmanager
def lag_of(loop: asyncio.AbstractEventLoop) -> Iterator[list[float]]:
    """How much later than asked for a sleeper on another thread's loop wakes, in seconds."""
    lags: list[float] = []
    enough = threading.Event()
    measuring = asyncio.run_coroutine_threadsafe(_measure(lags, enough), loop)
    try:
        yield lags
    finally:
        enough.set()
        measuring.result(30)  # the lag that ends now is the one that counts


def percentile(values: list[float], share: float) -> float:
    """The value that a share of them does not exceed."""
    return sorted(values)[int(share * (len(values) - 1))]
