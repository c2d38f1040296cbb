"""A server on a thread of its own, for tests with blocking clients."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from aiohttp import web

from jaxllm import AsyncEngine
from jaxllm.server.app import make_app
from jaxllm.server.context import CONTEXT, ServerContext
from jaxllm.server.options import ServerOptions
from jaxllm.server.serve import make_runner, start_site


class RunningServer:
    """A server on an event loop of its own thread, so that blocking clients can call it."""

    def __init__(self, options: ServerOptions, start: Callable[[], AsyncEngine]) -> None:
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.app: web.Application
        self.port = self.call(self._start(options, start))

    async def _start(self, options: ServerOptions, start: Callable[[], AsyncEngine]) -> int:
        self.app = make_app(options, start, model="tiny")
        self.runner = make_runner(self.app)
        return await start_site(self.runner)

    def call(self, work: Any) -> Any:
        """Runs a coroutine on the server's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(60)

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def context(self) -> ServerContext:
        return self.app[CONTEXT]

    @property
    def engine(self) -> AsyncEngine:
        assert self.context.engine is not None
        return self.context.engine

    def wait_started(self) -> None:
        self.call(self.context.started.wait())
        assert self.context.status == "ready", self.context.failure

    def wait_idle(self, seconds: float = 10) -> None:
        """Until no request is live and no block is used; checks the block pool."""
        deadline = time.monotonic() + seconds
        scheduler = self.engine.running.engine.scheduler
        while self.context.live or self.engine.running.engine.has_unfinished_requests():
            assert time.monotonic() < deadline, f"still live: {self.context.live}"
            time.sleep(0.005)
        scheduler.pool.check_integrity()
        assert (scheduler.num_running, scheduler.num_waiting, scheduler.pool.usage) == (0, 0, 0)

    def close(self) -> None:
        self.call(self.runner.cleanup())
        self.loop.call_soon_threadsafe(self.loop.stop)


@contextlib.contextmanager
def running_server(start: Callable[[], AsyncEngine], **options: Any) -> Iterator[RunningServer]:
    """A server of its own, for tests that need other options or break it."""
    server = RunningServer(ServerOptions(port=0, **options), start)
    try:
        yield server
    finally:
        server.close()
