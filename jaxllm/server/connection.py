"""One client's connection: cut off if it is too slow, and answered in JSON if it is no HTTP."""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import LineTooLong

from jaxllm.server.errors import ApiError, error_response


class Connection(web.RequestHandler):
    """aiohttp's, which waits for a request's headers as long as for the next request. A client
    that has begun to send headers must end them within header_timeout seconds."""

    __slots__ = ("_header_timeout", "_header_timer")

    def __init__(self, manager: web.Server, *, header_timeout: float, **kwargs: Any) -> None:
        super().__init__(manager, **kwargs)
        self._header_timeout = header_timeout
        self._header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Also one that says nothing at all is cut off."""
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: BaseException | None) -> None:
        """Ends the timer."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Starts the timer with the first byte of a request, and ends it with its headers."""
        num_requests = self._request_count
        super().data_received(data)
        if self._request_count > num_requests:
            self._stop_timer()
        elif self._header_timer is None and self._is_idle():
            self._start_timer()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """What is no HTTP is answered without a stack in the log and without its bytes."""
        if request.writer.output_size > 0:
            raise ConnectionError("the response has begun")
        if isinstance(exc, LineTooLong) or "header" in (message or "").lower():
            error = ApiError(400, "the request's headers are malformed or too large")
        elif status >= 500:
            self.log_exception("a request failed", exc_info=exc)
            error = ApiError(500, "internal error")
        else:
            error = ApiError(400, "this is not HTTP as the server understands it")
        response = error_response(error)
        response.force_close()
        return response

    def _is_idle(self) -> bool:
        return self._waiter is not None and not self._waiter.done()

    def _start_timer(self) -> None:
        loop = asyncio.get_running_loop()
        self._header_timer = loop.call_later(self._header_timeout, self.force_close)

    def _stop_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None
