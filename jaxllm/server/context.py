"""What all routes of a server share."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from aiohttp import web

from jaxllm.async_engine import AsyncEngine
from jaxllm.server.errors import RETRY_AFTER, ApiError
from jaxllm.server.logs import RequestRecord
from jaxllm.server.metrics import Metrics
from jaxllm.server.options import ServerOptions

Status = Literal["starting", "ready", "draining", "failed"]


@dataclass
class ServerContext:
    """One an app, in app[CONTEXT]. Used on the event loop's thread only.

    failure: why the status is "failed", for the operator's log. keys: all API keys, as bytes.
    live: requests in the engine by their id, with the number of answers each will give.
    """

    options: ServerOptions
    model_names: Sequence[str]
    keys: Sequence[bytes] = ()
    engine: AsyncEngine | None = None
    status: Status = "starting"
    failure: Exception | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    started: asyncio.Event = field(default_factory=asyncio.Event)  # or failed to
    live: dict[str, int] = field(default_factory=dict)
    metrics: Metrics = field(init=False)

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.options.metrics_prefix, self.model_name)

    @property
    def model_name(self) -> str:
        """The name that answers carry."""
        return self.model_names[0]

    def ready_engine(self) -> AsyncEngine:
        """The engine. Raises a 503 while it takes no requests."""
        if self.status != "ready" or self.engine is None:
            messages = {
                "starting": "the model is being loaded; try again",
                "draining": "the server is shutting down",
                "failed": "the model could not be loaded",
                "ready": "the engine does not run",
            }
            raise ApiError(503, messages[self.status], code=self.status, headers=RETRY_AFTER)
        return self.engine

    def check_model(self, name: str | None) -> None:
        """Raises a 404 for a model that is not served here. None: the client leaves it to us."""
        if name is not None and name not in self.model_names:
            raise ApiError(
                404,
                f"the model {name[:100]!r} does not exist; there is {', '.join(self.model_names)}",
                param="model",
                code="model_not_found",
            )

    def num_live(self) -> int:
        """Answers that were asked for and are not finished."""
        return sum(self.live.values())

    def check_room(self, num_answers: int) -> None:
        """Raises a 429 if the queue is full. Comes before any work is done for a request, and one
        that is larger than the queue is taken when nothing else is live."""
        engine = self.ready_engine()
        room = engine.running.engine.config.max_num_seqs + self.options.max_queued_requests
        if self.live and self.num_live() + num_answers > room:
            raise ApiError(
                429,
                f"{self.num_live()} answers are computed or waiting; try again",
                headers=RETRY_AFTER,
            )

    @contextlib.contextmanager
    def registered(self, request_id: str, num_answers: int) -> Iterator[None]:
        """While a request is in the engine."""
        self.live[request_id] = num_answers
        try:
            yield
        finally:
            del self.live[request_id]

    async def abort_all(self) -> None:
        """Ends all live requests with "abort"."""
        if self.engine is not None:
            for request_id in list(self.live):
                await self.engine.abort(request_id)


CONTEXT = web.AppKey("CONTEXT", ServerContext)
REQUEST_ID = web.RequestKey("REQUEST_ID", str)  # the server's own
RECORD = web.RequestKey("RECORD", RequestRecord)  # what the log will say


def new_request_id() -> str:
    """An id of the server's own; what a client calls its request never reaches the engine."""
    return uuid.uuid4().hex
