"""What operators ask: /health, /ready, /version, /load, /metrics, and /debug/engine for the page.

None of them waits for the engine longer than ANSWER_SECONDS: a step, or the compilation that it
waits for, may take minutes. Then the figures are those of the last answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Generic, TypeVar

from aiohttp import web

import jaxllm
from jaxllm.async_engine import AsyncEngine, EngineDeadError, EngineSnapshot, EngineStats
from jaxllm.server.context import CONTEXT, ServerContext
from jaxllm.server.errors import RETRY_AFTER, ApiError
from jaxllm.server.metrics import CONTENT_TYPE

ANSWER_SECONDS = 0.25
RATE_SECONDS = 5.0  # the window of tokens_per_second
SAMPLE_SECONDS = 0.2  # between two of its samples
REASONS = {
    "starting": "the model is being loaded",
    "draining": "the server is shutting down",
    "failed": "the model could not be loaded",
}
Answer = TypeVar("Answer")


class Asker(Generic[Answer]):
    """Asks the engine one question at a time, for all who want to know; keeps the last answer."""

    def __init__(self, ask: Callable[[AsyncEngine], Awaitable[Answer]]) -> None:
        self._ask = ask
        self._task: asyncio.Task[None] | None = None
        self._last: Answer | None = None
        self._answered = 0.0

    async def get(self, engine: AsyncEngine) -> Answer | None:
        """The answer to a question asked now, or the last one known if that takes too long; None
        if there is none yet."""
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._refresh(engine))
        await asyncio.wait({self._task}, timeout=ANSWER_SECONDS)
        return self._last

    async def _refresh(self, engine: AsyncEngine) -> None:
        with contextlib.suppress(EngineDeadError):
            self._last = await self._ask(engine)
            self._answered = time.monotonic()

    @property
    def age_seconds(self) -> float:
        """How old the last answer is."""
        return time.monotonic() - self._answered

    def close(self) -> None:
        """Waits for nothing any more."""
        if self._task is not None:
            self._task.cancel()


class RateMeter:
    """Tokens a second over the last RATE_SECONDS, from a counter seen at irregular moments."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque()

    def rate(self, now: float, count: int) -> float | None:
        """Takes the counter's value now. None while there is nothing to compare it with."""
        samples = self._samples
        while samples and samples[0][0] < now - RATE_SECONDS:
            samples.popleft()
        if not samples or now - samples[-1][0] >= SAMPLE_SECONDS:
            samples.append((now, count))
        then, before = samples[0]
        return (count - before) / (now - then) if now > then else None


class Operations:
    """The handlers and what they keep between two calls."""

    def __init__(self, context: ServerContext) -> None:
        self.context = context
        self.stats: Asker[EngineStats] = Asker(AsyncEngine.stats)
        self.snapshot: Asker[EngineSnapshot] = Asker(AsyncEngine.snapshot)
        self.meter = RateMeter()

    async def health(self, request: web.Request) -> web.Response:
        """200 while requests are answered, else 503 with what is the matter. Asks nobody."""
        status, reason = health(self.context)
        if status == "ready":
            return web.json_response({"status": status})
        body = {"status": status, "reason": reason}
        return web.json_response(body, status=503, headers=RETRY_AFTER)

    async def version(self, request: web.Request) -> web.Response:
        """The version of the package."""
        return web.json_response({"version": jaxllm.__version__})

    async def load(self, request: web.Request) -> web.Response:
        """How busy the engine is, for load balancers. age_seconds: since it said so."""
        stats = await self.stats.get(self._engine())
        if stats is None:
            raise _no_answer()
        return web.json_response(
            {
                "running": stats.num_running,
                "waiting": stats.num_waiting,
                "kv_cache_usage": stats.kv_usage,
                "live_requests": len(self.context.live),
                "age_seconds": round(self.stats.age_seconds, 3),
            }
        )

    async def metrics(self, request: web.Request) -> web.Response:
        """For Prometheus. Answers from the first moment, and of an engine that hangs."""
        metrics, engine = self.context.metrics, self.context.engine
        if engine is not None:
            stats = await self.stats.get(engine)
            if stats is not None:
                metrics.update_engine(stats)
        body = await asyncio.to_thread(metrics.render)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE})

    async def engine(self, request: web.Request) -> web.Response:
        """The engine's blocks and sequences, for the page."""
        snapshot = await self.snapshot.get(self._engine())
        if snapshot is None:
            raise _no_answer()
        now = time.monotonic() - self.snapshot.age_seconds
        rate = self.meter.rate(now, snapshot.num_generation_tokens)
        ttft = self.context.metrics.recent_ttft_seconds()
        return web.json_response(
            {
                **await asyncio.to_thread(_snapshot_body, snapshot),
                "tokens_per_second": None if rate is None else round(rate, 1),
                "ttft_ms": None if ttft is None else round(1000 * ttft, 1),
                "age_seconds": round(self.snapshot.age_seconds, 3),
            }
        )

    def _engine(self) -> AsyncEngine:
        """The engine, also while the server drains. Raises a 503."""
        engine = self.context.engine
        if engine is None:
            return self.context.ready_engine()  # which says why there is none
        if not engine.is_running:
            raise ApiError(503, "the engine does not run", headers=RETRY_AFTER)
        return engine


def health(context: ServerContext) -> tuple[str, str]:
    """The server's status, and the reason where it is not "ready". Read without asking the engine,
    so that a step that hangs does not hang this."""
    if context.status != "ready":
        return context.status, REASONS[context.status]
    engine = context.engine
    if engine is None or not engine.is_running:
        return "failed", "the engine does not run"
    heartbeat, limit = engine.heartbeat(), context.options.hang_seconds
    if heartbeat.busy_seconds is not None and heartbeat.busy_seconds > limit:
        return "hung", f"a step has been under way for {heartbeat.busy_seconds:.0f} s"
    return "ready", ""


def add_routes(app: web.Application) -> None:
    """Registers the routes of this file."""
    operations = Operations(app[CONTEXT])
    app.router.add_get("/health", operations.health)
    app.router.add_get("/ready", operations.health)
    app.router.add_get("/version", operations.version)
    app.router.add_get("/load", operations.load)
    app.router.add_get("/metrics", operations.metrics)
    app.router.add_get("/debug/engine", operations.engine)

    async def close_at_end(_: web.Application) -> AsyncIterator[None]:
        yield
        operations.stats.close()
        operations.snapshot.close()

    app.cleanup_ctx.append(close_at_end)


def _snapshot_body(snapshot: EngineSnapshot) -> dict[str, Any]:
    return {
        "num_blocks": snapshot.num_blocks,
        "block_size": snapshot.block_size,
        "blocks": snapshot.block_runs(),
        "running": [
            {
                "id": sequence.request_id,
                "index": sequence.index,
                "num_prompt_tokens": sequence.num_prompt_tokens,
                "num_output_tokens": sequence.num_output_tokens,
                "slot": sequence.slot,
            }
            for sequence in snapshot.running
        ],
        "waiting": snapshot.num_waiting,
        "kv_usage": snapshot.kv_usage,
        "preemptions": snapshot.num_preemptions,
    }


def _no_answer() -> ApiError:
    return ApiError(503, "the engine is busy; try again", code="busy", headers=RETRY_AFTER)
