"""What clients are told of errors. OpenAI's shape is {"error": {"message", "type", "param",
"code"}}; APIs of others have their own."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any

from aiohttp import web

from jaxllm.async_engine import EngineDeadError
from jaxllm.engine.engine import QueueFullError
from jaxllm.request_error import RequestError

logger = logging.getLogger(__name__)

RETRY_AFTER = {"Retry-After": "1"}
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}
CODES = {
    401: "invalid_api_key",
    404: "not_found",
    405: "method_not_allowed",
    413: "request_too_large",
    415: "unsupported_media_type",
    429: "queue_full",
    503: "unavailable",
}
ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class ApiError(Exception):
    """What a client is told. The message is shown as it is: no path, address or stack in it.
    param: the request's field that is wrong."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        default = "invalid_request_error" if status < 500 else "server_error"
        self.type = type or TYPES.get(status, default)
        self.param = param
        self.code = code or CODES.get(status)
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON object that OpenAI's clients read."""
        return {
            "error": {
                "message": self.message, "type": self.type, "param": self.param, "code": self.code,
            }
        }  # fmt: skip


ErrorBody = Callable[[ApiError, str], dict[str, Any]]  # of an error and the request's id


def openai_error_body(error: ApiError, request_id: str = "") -> dict[str, Any]:
    """As OpenAI tells it; the id is in a header only."""
    return error.body()


def anthropic_error_body(error: ApiError, request_id: str) -> dict[str, Any]:
    """As Anthropic tells it; the field that is wrong is named in the message only."""
    default = "invalid_request_error" if error.status < 500 else "api_error"
    kind = ANTHROPIC_TYPES.get(error.status, default)
    return {
        "type": "error",
        "error": {"type": kind, "message": error.message},
        "request_id": request_id,
    }


def error_response(
    error: ApiError, request_id: str = "", body: ErrorBody = openai_error_body
) -> web.Response:
    """The HTTP response of an error. body: in the shape of the API that was called."""
    return web.Response(
        status=error.status,
        text=json.dumps(body(error, request_id)),
        content_type="application/json",
        headers=error.headers,
    )


def to_api_error(error: Exception) -> ApiError:
    """What a client is told of any exception. An unexpected one is logged, and nothing of it is
    told."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, web.HTTPException):
        return _of_aiohttp(error)
    if isinstance(error, QueueFullError):
        return ApiError(429, "too many requests are waiting; try again", headers=RETRY_AFTER)
    if isinstance(error, EngineDeadError):
        return ApiError(503, "the engine does not run", headers=RETRY_AFTER)
    if isinstance(error, RequestError):
        return ApiError(400, str(error), param=error.param, code=error.code)
    logger.error("a request failed", exc_info=error)
    return ApiError(500, "internal error")


def _of_aiohttp(error: web.HTTPException) -> ApiError:
    """aiohttp's own: no route, wrong method, a body that is too large."""
    messages = {
        404: "there is no such route",
        405: "this route does not take that method",
        413: "the request's body is too large",
    }
    allow = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
    message = messages.get(error.status) or HTTPStatus(error.status).phrase.lower()
    return ApiError(error.status, message, headers=allow)
