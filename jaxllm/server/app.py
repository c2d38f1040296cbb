"""The application: what every request passes, and the table of routes."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import re
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from aiohttp import hdrs, web

from jaxllm.async_engine import AsyncEngine
from jaxllm.server import (
    chat,
    completions,
    embeddings,
    messages,
    models,
    openapi,
    operations,
    page,
    responses,
    tokens,
)
from jaxllm.server.answers import check_parsers
from jaxllm.server.context import CONTEXT, RECORD, REQUEST_ID, ServerContext, new_request_id
from jaxllm.server.errors import (
    ApiError,
    ErrorBody,
    anthropic_error_body,
    error_response,
    openai_error_body,
    to_api_error,
)
from jaxllm.server.logs import RequestRecord, log_request
from jaxllm.server.options import ServerOptions

logger = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
REQUEST_ID_HEADER = "X-Request-Id"
CLIENT_LEFT = 499  # in the log, for want of a status
CLIENT_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
CONTINUE = "100-continue"
CLOSE_SECONDS = 5.0  # for the engine to end its step
OPEN_ROUTES = ("/health", "/ready", *page.ROUTES)  # without a key


@dataclass(frozen=True)
class Api:
    """What clients of one API read of every response. id_header: a further one with the server's
    id of the request."""

    error_body: ErrorBody = openai_error_body
    id_header: str | None = None


OPENAI = Api()
APIS = {messages.PATH: Api(anthropic_error_body, "Request-Id")}  # of others, by their paths


def make_app(
    options: ServerOptions, start: Callable[[], AsyncEngine], model: str = "model"
) -> web.Application:
    """An application that makes its engine with `start`, on a thread, once it runs, and closes it
    at the end. model: as the operator named it, for clients if options have no other name."""
    middlewares = [_observe, _answer_errors, _allow_origins, _authenticate, _limit]
    app = web.Application(middlewares=middlewares, client_max_size=options.max_body_bytes)
    check_parsers(options)
    names = options.served_model_name or (short_name(model),)
    keys = [key.encode() for key in options.all_keys()]
    app[CONTEXT] = ServerContext(options, names, keys)
    app.on_response_prepare.append(_add_headers)

    async def run_engine(app: web.Application) -> AsyncIterator[None]:
        async with _engine_of(app[CONTEXT], start):
            yield

    app.cleanup_ctx.append(run_engine)
    for routes in (
        chat,
        completions,
        responses,
        messages,
        embeddings,
        tokens,
        models,
        operations,
        openapi,
        page,
    ):
        routes.add_routes(app)
    for route in app.router.routes():  # aiohttp would invite a body before we have looked at it
        route._expect_handler = _expect_nothing
    app[CONTEXT].metrics.set_routes(resource.canonical for resource in app.router.resources())
    return app


async def _expect_nothing(request: web.Request) -> None:
    """body.read_body sends 100 Continue."""


def short_name(model: str) -> str:
    """A model's name for clients: of a path only the last part, which tells nothing of the
    machine."""
    path = Path(model).expanduser()
    if path.is_absolute() or path.exists():
        return path.stem if path.suffix == ".gguf" else path.resolve().name
    return model


@contextlib.asynccontextmanager
async def _engine_of(
    context: ServerContext, start: Callable[[], AsyncEngine]
) -> AsyncIterator[None]:
    """Makes the engine while requests are answered already. The thread is a daemon: a program
    that is told to stop does not wait for a model to load."""
    loop = asyncio.get_running_loop()

    def finish(engine: AsyncEngine | None, failure: Exception | None) -> None:
        context.engine, context.failure = engine, failure
        if failure is not None:
            context.status = "failed"
        elif context.status == "starting":
            context.status = "ready"
        context.started.set()

    def run() -> None:
        try:
            result: tuple[AsyncEngine | None, Exception | None] = start(), None
        except Exception as error:
            result = None, error
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits for it
            loop.call_soon_threadsafe(finish, *result)

    threading.Thread(target=run, name="jaxllm-start", daemon=True).start()
    yield
    if context.engine is not None:
        try:
            await asyncio.wait_for(asyncio.to_thread(context.engine.close), CLOSE_SECONDS)
        except TimeoutError:
            logger.error("the engine does not end: a step hangs")


@web.middleware
async def _observe(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Gives the request its id; its end goes to the log and the metrics."""
    request[REQUEST_ID] = new_request_id()
    record = RequestRecord(request[REQUEST_ID], request.method, route_name(request), CLIENT_LEFT)
    record.client_request_id = _client_id(request)
    request[RECORD] = record
    started = time.monotonic()
    try:
        response = await handler(request)
        record.status = response.status
        return response
    except (ConnectionError, asyncio.CancelledError):
        record.aborted = True
        raise
    finally:
        record.duration = time.monotonic() - started
        request.app[CONTEXT].metrics.http_response(
            record.route, record.method, record.status, record.duration
        )
        log_request(record)


def route_name(request: web.Request) -> str:
    """The route's pattern, not the path that a client made up."""
    resource = request.match_info.route.resource
    return "(none)" if resource is None else resource.canonical


@web.middleware
async def _answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        if REQUEST_ID_HEADER in request.headers and _client_id(request) is None:
            raise ApiError(
                400, f"{REQUEST_ID_HEADER} must be 1 to 128 letters, digits, or any of . _ : -"
            )
        return await handler(request)
    except ConnectionError:  # the client has left
        raise
    except Exception as error:
        body = api_of(request.path).error_body
        return error_response(to_api_error(error), request[REQUEST_ID], body)


def _client_id(request: web.Request) -> str | None:
    """What the client calls its request, if that is an id."""
    client_id = request.headers.get(REQUEST_ID_HEADER, "")
    return client_id if CLIENT_ID.fullmatch(client_id) else None


def api_of(path: str) -> Api:
    """The API that a path belongs to, whether there is a route or not."""
    for start, api in APIS.items():
        if path == start or path.startswith(start + "/"):
            return api
    return OPENAI


@web.middleware
async def _allow_origins(request: web.Request, handler: Handler) -> web.StreamResponse:
    """A browser asks before it sends a request of another origin's page."""
    is_preflight = (
        request.method == hdrs.METH_OPTIONS
        and hdrs.ACCESS_CONTROL_REQUEST_METHOD in request.headers
        and _allowed_origin(request) is not None
    )
    if not is_preflight:
        return await handler(request)
    return web.Response(
        status=204,
        headers={
            hdrs.ACCESS_CONTROL_ALLOW_METHODS: "GET, POST, OPTIONS",
            hdrs.ACCESS_CONTROL_ALLOW_HEADERS: "*, Authorization",
            hdrs.ACCESS_CONTROL_MAX_AGE: "600",
        },
    )


def _allowed_origin(request: web.Request) -> str | None:
    origin = request.headers.get(hdrs.ORIGIN)
    allowed = request.app[CONTEXT].options.cors_origin
    if origin is None or not allowed:
        return None
    return "*" if "*" in allowed else origin if origin in allowed else None


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Of every response, streams included."""
    request_id = request.get(REQUEST_ID) or new_request_id()  # aiohttp may refuse before us
    response.headers[REQUEST_ID_HEADER] = _client_id(request) or request_id
    id_header = api_of(request.path).id_header
    if id_header is not None:
        response.headers[id_header] = request_id
    response.headers[hdrs.SERVER] = "jaxllm"
    origin = _allowed_origin(request)
    if origin is not None:
        response.headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = origin
        response.headers[hdrs.ACCESS_CONTROL_EXPOSE_HEADERS] = REQUEST_ID_HEADER
        response.headers[hdrs.VARY] = hdrs.ORIGIN


@web.middleware
async def _authenticate(request: web.Request, handler: Handler) -> web.StreamResponse:
    keys = request.app[CONTEXT].keys
    if keys and request.path not in OPEN_ROUTES and not _has_key(request, keys):
        raise ApiError(
            401,
            "give an API key: Authorization: Bearer KEY, or X-Api-Key: KEY",
            headers={hdrs.WWW_AUTHENTICATE: "Bearer"},
        )
    return await handler(request)


def _has_key(request: web.Request, keys: Sequence[bytes]) -> bool:
    """Compares with every key, each in constant time."""
    scheme, _, token = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
    if scheme.lower() != "bearer":
        token = request.headers.get("X-Api-Key", "")  # of Anthropic's clients
    given = token.strip().encode(errors="replace")
    matches = [hmac.compare_digest(given, key) for key in keys]
    return any(matches)


@web.middleware
async def _limit(request: web.Request, handler: Handler) -> web.StreamResponse:
    """What can be refused before a body is read."""
    limit = request.app[CONTEXT].options.max_body_bytes
    if request.headers.get(hdrs.EXPECT, CONTINUE).lower() != CONTINUE:
        raise ApiError(417, "of expectations only 100-continue is met")
    if request.content_length is not None and request.content_length > limit:
        raise ApiError(413, f"the request's body is larger than {limit} bytes")
    if request.headers.get(hdrs.CONTENT_ENCODING, "identity") != "identity":
        raise ApiError(415, "a compressed body is not supported")
    return await handler(request)
