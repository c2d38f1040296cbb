"""A server whose delays are known: what a client measures can be compared with them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

METRICS = """\
# TYPE {p}:num_requests_running gauge
{p}:num_requests_running{{model_name="m"}} 3
# TYPE {p}:num_requests_waiting gauge
{p}:num_requests_waiting{{model_name="m"}} 2
# TYPE {p}:kv_cache_usage_perc gauge
{p}:kv_cache_usage_perc{{model_name="m"}} 0.25
"""


@dataclass
class FakeServer:
    """Waits `first` seconds before its first token and `gap` before each other one. fault: what
    goes wrong with requests from number `faulty_from` on."""

    first: float = 0.1
    gap: float = 0.05
    fault: str | None = None
    faulty_from: int = 0
    has_usage: bool = True
    metrics: str | None = None
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    num_live: int = 0
    most_live: int = 0
    base_url: str = ""

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_post("/v1/completions", self.complete)
        app.router.add_post("/v1/chat/completions", self.complete)
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/metrics", self.show_metrics)
        return app

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "fake"}]})

    async def show_metrics(self, _: web.Request) -> web.Response:
        if self.metrics is None:
            raise web.HTTPNotFound
        return web.Response(text=self.metrics)

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        fault = self.fault if len(self.bodies) > self.faulty_from else None
        self.num_live += 1
        self.most_live = max(self.most_live, self.num_live)
        try:
            return await self._respond(request, body, fault)
        finally:
            self.num_live -= 1

    async def _respond(
        self, request: web.Request, body: dict[str, Any], fault: str | None
    ) -> web.StreamResponse:
        if fault == "status":
            return web.Response(status=500, text="out of\nmemory")
        response = web.StreamResponse()
        await response.prepare(request)
        async for line in self._lines(body, request.path.endswith("chat/completions"), fault):
            await response.write(f"data: {line}\n\n".encode())
        if fault == "cut":
            assert request.transport is not None
            request.transport.close()
        return response

    async def _lines(
        self, body: dict[str, Any], is_chat: bool, fault: str | None
    ) -> AsyncIterator[str]:
        if is_chat:  # before the first token, and no token itself
            yield chunk({"delta": {"role": "assistant", "content": ""}})
        for number in range(body["max_tokens"]):
            await asyncio.sleep(self.gap if number else self.first)
            if number == 1 and fault in ("ends", "cut"):
                return
            if number == 1 and fault == "error":
                yield json.dumps({"error": {"message": "no more"}})
            if number == 1 and fault == "garbage":
                yield "{not json"
            text = f" {number}"
            is_last = number == body["max_tokens"] - 1
            reason = "length" if is_last and not is_chat else None
            said: dict[str, Any] = {"delta": {"content": text}} if is_chat else {"text": text}
            yield chunk({**said, "finish_reason": reason})
        if is_chat:
            await asyncio.sleep(self.gap)  # no part of the latency
            yield chunk({"delta": {}, "finish_reason": "length"})
        if self.has_usage:
            usage = {"prompt_tokens": 7, "completion_tokens": body["max_tokens"]}
            yield json.dumps({"choices": [], "usage": usage})
        yield "[DONE]"


def chunk(choice: dict[str, Any]) -> str:
    return json.dumps({"choices": [{"index": 0, "finish_reason": None, **choice}]})


@contextlib.contextmanager
def running(server: FakeServer) -> Iterator[FakeServer]:
    """On a thread of its own, with base_url set."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def start() -> web.AppRunner:
        runner = web.AppRunner(server.app())
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        server.base_url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        return runner

    runner = asyncio.run_coroutine_threadsafe(start(), loop).result(30)
    try:
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)
