"""Runs a server: sockets, TLS, signals, drain."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import ssl
from collections.abc import Callable
from functools import partial

from aiohttp import web

from jaxllm.async_engine import AsyncEngine
from jaxllm.server.app import make_app
from jaxllm.server.connection import Connection
from jaxllm.server.context import CONTEXT, ServerContext
from jaxllm.server.options import ServerOptions

logger = logging.getLogger(__name__)

IDLE_SECONDS = 75.0  # a connection without a request is closed
LINGER_SECONDS = 1.0  # for the rest of a body that was refused
ABORT_SECONDS = 5.0  # for aborted requests to be answered


class _Site(web.BaseSite):
    """A listening socket whose connections are ours."""

    def __init__(
        self, runner: web.BaseRunner, sock: socket.socket, tls: ssl.SSLContext | None
    ) -> None:
        super().__init__(runner, ssl_context=tls)
        self._sock = sock

    @property
    def name(self) -> str:
        """For aiohttp's messages."""
        return "server"

    async def start(self) -> None:
        """Begins to listen."""
        await super().start()
        server = self._runner.server
        assert server is not None
        assert isinstance(self._runner, web.AppRunner)
        options = self._runner.app[CONTEXT].options
        loop = asyncio.get_running_loop()
        make_connection = partial(
            Connection,
            server,
            loop=loop,
            header_timeout=options.header_timeout,
            keepalive_timeout=IDLE_SECONDS,
            lingering_time=LINGER_SECONDS,
            max_line_size=options.max_header_bytes,
            max_field_size=options.max_header_bytes,
            max_headers=options.max_headers,
            auto_decompress=False,  # a small body could become a large one
            access_log=None,
        )
        self._server = await loop.create_server(
            make_connection, sock=self._sock, ssl=self._ssl_context, backlog=1024
        )


def make_runner(app: web.Application) -> web.AppRunner:
    """A runner that cancels the handler of a client that has left."""
    return web.AppRunner(app, handler_cancellation=True, shutdown_timeout=ABORT_SECONDS)


async def start_site(runner: web.AppRunner) -> int:
    """Listens as the app's options say and returns the port. Raises OSError or ValueError."""
    options = runner.app[CONTEXT].options
    tls = _tls_context(options)
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    sock = socket.create_server((options.host, options.port), family=family, backlog=1024)
    await runner.setup()  # the engine is made only if there is a port to serve it at
    await _Site(runner, sock, tls).start()
    return sock.getsockname()[1]


def _tls_context(options: ServerOptions) -> ssl.SSLContext | None:
    if options.tls_cert is None:
        return None
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        tls.load_cert_chain(options.tls_cert, options.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise ValueError(f"tls_cert or tls_key cannot be used: {error}") from error
    return tls


async def serve(options: ServerOptions, start: Callable[[], AsyncEngine], model: str) -> None:
    """Serves until SIGTERM or SIGINT, then drains. Raises what `start` raised."""
    app = make_app(options, start, model)
    runner, context, stopping = make_runner(app), app[CONTEXT], asyncio.Event()
    _on_signals(stopping)
    try:
        port = await start_site(runner)
        scheme = "http" if options.tls_cert is None else "https"
        logger.info("listening on %s://%s:%d", scheme, options.host, port)
        await _first(context.started.wait(), stopping.wait())
        if context.failure is not None:
            raise context.failure
        if context.status == "ready":
            gc.freeze()  # else full collections visit all that libraries and the model made
            logger.info("ready: %s", ", ".join(context.model_names))
        await stopping.wait()
        context.status = "draining"
        await _drain(context)
    finally:
        await runner.cleanup()
        if context.engine is not None and context.engine.is_running:
            os._exit(1)  # its thread hangs in a step, and the interpreter would wait for it


async def _first(*waits: object) -> None:
    tasks = [asyncio.ensure_future(wait) for wait in waits]  # type: ignore[call-overload]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()


def _on_signals(stopping: asyncio.Event) -> None:
    """The first signal drains, the second ends the process at once."""

    def stop(number: int) -> None:
        if stopping.is_set():
            os._exit(128 + number)
        logger.info("shutting down")
        stopping.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)


async def _drain(context: ServerContext) -> None:
    """Waits for live requests; those that take too long are aborted and answered as far as they
    came."""
    await _until_idle(context, context.options.drain_seconds)
    if context.live:
        logger.warning("%d requests are aborted", len(context.live))
        await context.abort_all()
        await _until_idle(context, ABORT_SECONDS)


async def _until_idle(context: ServerContext, seconds: float) -> None:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    while context.live and loop.time() < deadline:
        await asyncio.sleep(0.02)
