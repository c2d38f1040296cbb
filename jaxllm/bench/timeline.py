"""A server's own figures during a run: running and waiting requests, KV use, padding, idling."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from jaxllm.bench.client import Target
from jaxllm.bench.metrics import idle_share

SAMPLE_SECONDS = 0.5
TIMEOUT_SECONDS = 2.0
KV_NAMES = ("kv_cache_usage_perc", "gpu_cache_usage_perc")  # the second: of older vLLMs


@dataclass
class Timeline:
    """Samples of /metrics, by the time since the start of the run. first, last: all values before
    and after it, by name without prefix; None where the server has none."""

    times: list[float] = field(default_factory=list)
    running: list[float] = field(default_factory=list)
    waiting: list[float] = field(default_factory=list)
    kv_usage: list[float] = field(default_factory=list)
    first: Mapping[str, float] | None = None
    last: Mapping[str, float] | None = None

    def body(self) -> dict[str, list[float]] | None:
        """For JSON; None if the server shows nothing."""
        if not self.times:
            return None
        return {
            "times": self.times,
            "num_requests_running": self.running,
            "num_requests_waiting": self.waiting,
            "kv_cache_usage_perc": self.kv_usage,
        }

    def padding_share(self) -> float | None:
        """Of the tokens that were computed."""
        padded, asked = (
            self._increase("padded_tokens_total"),
            self._increase("computed_tokens_total"),
        )
        return None if asked is None or not padded else 1 - asked / padded

    def idle_share(self, active_seconds: float) -> float | None:
        """Of the time in which there were requests: the part in which no step was under way."""
        return idle_share(self._increase("step_seconds_sum"), active_seconds)

    def _increase(self, name: str) -> float | None:
        if self.first is None or self.last is None or name not in self.last:
            return None
        return self.last[name] - self.first.get(name, 0.0)

    def take(self, seconds: float, values: Mapping[str, float]) -> None:
        """One sample."""
        kv_name = next((name for name in KV_NAMES if name in values), None)
        if kv_name is None or "num_requests_running" not in values:
            return
        self.times.append(seconds)
        self.running.append(values["num_requests_running"])
        self.waiting.append(values.get("num_requests_waiting", 0.0))
        self.kv_usage.append(values[kv_name])


def read_metrics(text: str) -> dict[str, float]:
    """Values by their names without prefix (vllm:, jaxllm:). What several engines of a server say
    is added up, shares are averaged. Histograms' buckets are left out. Raises ValueError."""
    from prometheus_client.parser import text_string_to_metric_families

    values: dict[str, list[float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            _, colon, name = sample.name.partition(":")
            if colon and not name.endswith("_bucket"):
                values.setdefault(name, []).append(sample.value)
    return {
        name: sum(found) / (len(found) if name in KV_NAMES else 1) for name, found in values.items()
    }


async def scrape(session: aiohttp.ClientSession, target: Target) -> dict[str, float] | None:
    """What /metrics says now; None if it says nothing that can be read."""
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_SECONDS)
    try:
        async with session.get(target.url("/metrics"), timeout=timeout) as response:
            if response.status != 200:
                return None
            return read_metrics(await response.text())
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError):
        return None


@contextlib.asynccontextmanager
async def watched(session: aiohttp.ClientSession, target: Target) -> AsyncIterator[Timeline]:
    """Samples the server while the block runs."""
    timeline = Timeline(first=await scrape(session, target))
    origin = time.perf_counter()
    task = asyncio.create_task(_sample(session, target, timeline, origin))
    try:
        yield timeline
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    if timeline.first is not None:
        timeline.last = await scrape(session, target)
        if timeline.last is not None:
            timeline.take(time.perf_counter() - origin, timeline.last)


async def _sample(
    session: aiohttp.ClientSession, target: Target, timeline: Timeline, origin: float
) -> None:
    """Until it is cancelled, or at once where there is nothing to see."""
    while timeline.first is not None:
        values: Any = await scrape(session, target)
        if values is not None:
            timeline.take(time.perf_counter() - origin, values)
        await asyncio.sleep(SAMPLE_SECONDS)
