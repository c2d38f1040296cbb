"""Server-sent events: https://html.spec.whatwg.org/multipage/server-sent-events.html"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Any

from aiohttp import web

from jaxllm.server.context import CONTEXT
from jaxllm.server.errors import ApiError, to_api_error

HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # a proxy before us hands events on at once
}

ErrorEvents = Callable[[ApiError], str]


def event(data: Any, name: str | None = None) -> str:
    """One event. data: text as it is, anything else as JSON."""
    if not isinstance(data, str):
        data = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {data}\n\n"


def openai_error_events(error: ApiError) -> str:
    """How a stream of OpenAI's ends when it fails."""
    return event(error.body()) + event("[DONE]")


class EventStream:
    """A streamed response.

        async with EventStream(request) as stream:
            await stream.send(event({"text": "a"}))
        return stream.response

    The headers go out with the first event, so that a request which fails before it is answered
    with the error's status. A later error becomes events, and the block ends as if there was none.
    While nothing is sent for keep_alive_seconds, comments are. A client that leaves, or reads
    nothing for write_timeout seconds, ends the block with ConnectionError, or cancels it.
    """

    def __init__(
        self, request: web.Request, error_events: ErrorEvents = openai_error_events
    ) -> None:
        options = request.app[CONTEXT].options
        self.response = web.StreamResponse(headers=HEADERS)
        self._request = request
        self._error_events = error_events
        self._keep_alive_seconds = options.keep_alive_seconds
        self._write_timeout = options.write_timeout
        self._lock = asyncio.Lock()
        self._last_sent = time.monotonic()
        self._keeper: asyncio.Task[None] | None = None

    async def __aenter__(self) -> EventStream:
        self._keeper = asyncio.create_task(self._keep_alive())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        assert self._keeper is not None
        self._keeper.cancel()
        with contextlib.suppress(asyncio.CancelledError, ConnectionError):
            await self._keeper
        if isinstance(error, ConnectionError) or not isinstance(error, Exception | None):
            return False
        if error is not None:
            if not self.response.prepared:
                return False
            await self.send(self._error_events(to_api_error(error)))
        await self._prepare()
        async with self._bounded():
            await self.response.write_eof()
        return True

    async def send(self, events: str) -> None:
        """Waits while the client's buffer is full."""
        self._last_sent = time.monotonic()
        await self._prepare()
        async with self._bounded():
            await self.response.write(events.encode())

    @contextlib.asynccontextmanager
    async def _bounded(self) -> AsyncIterator[None]:
        """Cuts off a client that does not read: it would hold its request's place for ever."""
        try:
            async with asyncio.timeout(self._write_timeout):
                yield
        except TimeoutError:
            if self._request.transport is not None:
                self._request.transport.abort()
            raise ConnectionResetError("the client does not read") from None

    async def _prepare(self) -> None:
        async with self._lock:
            if not self.response.prepared:
                await self.response.prepare(self._request)

    async def _keep_alive(self) -> None:
        while True:
            wait = self._last_sent + self._keep_alive_seconds - time.monotonic()
            if wait > 0:
                await asyncio.sleep(wait)
            else:
                await self.send(": keep-alive\n\n")
