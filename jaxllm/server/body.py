"""A request's JSON body: read within limits, checked against a model, its errors named."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn, TypeVar

from aiohttp import hdrs, web
from aiohttp.http_exceptions import HttpProcessingError
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from jaxllm.server.context import CONTEXT, RECORD, ServerContext
from jaxllm.server.errors import ApiError

Body = TypeVar("Body", bound=BaseModel)
Element = TypeVar("Element")
TokenId = Annotated[int, Field(ge=0)]
# A list of which one error is told, the first: of a million, all together would fill the memory.
ListOf = Annotated[list[Element], Field(fail_fast=True)]
# Of one or several prompts, each text or token ids. An empty one is refused where it is used.
Texts = str | ListOf[str] | ListOf[TokenId] | ListOf[ListOf[TokenId]]
OneText = str | list[int]
QUICK_BYTES = 32 * 1024  # more is parsed on a thread: others' streams go on meanwhile
MAX_COMMAS = 500_000  # a list of numbers takes many times its text in memory
QUOTE = ord('"')
MAX_CONTAINERS = 50_000  # arrays, objects and fields
# Strings, also one that does not end, brackets and colons. No backtracking: each character once.
_TOKENS = re.compile(rb'"(?:[^"\\]|\\.)*+"?|[\[{]|[\]}]|:', re.DOTALL)


class StrictModel(BaseModel):
    """Unknown fields are errors, and "1" is no number."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


def one_by_one(texts: Texts) -> list[OneText]:
    """One or several as a list."""
    if isinstance(texts, str) or (texts and isinstance(texts[0], int)):
        return [texts]
    return list(texts)  # type: ignore[arg-type]


class HasModel(StrictModel):
    """A body that may say which model it is for."""

    model: str | None = None


ModelBody = TypeVar("ModelBody", bound=HasModel)


async def open_request(
    request: web.Request, model: type[ModelBody]
) -> tuple[ServerContext, ModelBody]:
    """How a request to the model begins: the engine is there, the body is sound, and the model is
    the one that is served. Raises ApiError."""
    context = request.app[CONTEXT]
    context.ready_engine()
    body = await read_body(request, model)
    context.check_model(body.model)
    request[RECORD].model = body.model or context.model_name
    return context, body


async def read_body(request: web.Request, model: type[Body]) -> Body:
    """The request's body as a model. Raises ApiError: 400, 413, 415."""
    raw = await _read_checked(request)
    max_depth = request.app[CONTEXT].options.max_json_depth
    if len(raw) <= QUICK_BYTES:
        return _parse_as(raw, max_depth, model)
    return await asyncio.to_thread(_parse_as, raw, max_depth, model)


def _parse_as(raw: bytes, max_depth: int, model: type[Body]) -> Body:
    content = _parse(raw, max_depth)
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise _of_validation(error, content) from None


def _parse(raw: bytes, max_depth: int) -> dict[str, Any]:
    if raw.count(b",") > MAX_COMMAS:
        raise ApiError(400, f"the JSON has more than {MAX_COMMAS} commas")
    if nesting(raw, max_depth) > max_depth:
        raise ApiError(400, f"the JSON is nested more than {max_depth} levels deep")
    try:
        content = json.loads(raw, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not valid JSON", code="invalid_json") from None
    if not isinstance(content, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    return content


async def _read_checked(request: web.Request) -> bytes:
    if request.content_type != "application/json":  # also keeps other origins' forms out
        raise ApiError(415, "the body must be JSON, with Content-Type: application/json")
    return await _read(request)


async def _read(request: web.Request) -> bytes:
    """The whole body. Raises ApiError if it is too large or comes too slowly."""
    options = request.app[CONTEXT].options
    raw = bytearray()
    try:
        async with asyncio.timeout(options.body_timeout):
            if hdrs.EXPECT in request.headers:  # _limit has looked at it
                await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                request.writer.output_size = 0  # of the answer, which has not begun
            async for chunk in request.content.iter_any():
                raw += chunk
                if len(raw) > options.max_body_bytes:
                    raise ApiError(
                        413, f"the request's body is larger than {options.max_body_bytes} bytes"
                    )
    except TimeoutError:
        raise ApiError(408, "the request's body did not come in time") from None
    except (web.RequestPayloadError, HttpProcessingError):
        raise ApiError(400, "the request's body is malformed or incomplete") from None
    return bytes(raw)


def nesting(raw: bytes, limit: int) -> int:
    """How deep brackets outside of strings are nested, without parsing; stops above the limit.
    Raises ApiError if there are more of them, or of fields, than any request needs."""
    depth = deepest = num_counted = 0
    for match in _TOKENS.finditer(raw):
        first = raw[match.start()]
        if first in b"]}":
            depth -= 1
            continue
        if first == QUOTE:
            continue
        num_counted += 1
        if num_counted > MAX_CONTAINERS:
            raise ApiError(
                400, f"the JSON has more than {MAX_CONTAINERS} arrays, objects and fields"
            )
        if first in b"[{":
            depth += 1
            deepest = max(deepest, depth)
            if deepest > limit:
                break
    return deepest


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _of_validation(error: ValidationError, content: Any) -> ApiError:
    """One of pydantic's errors, its place as a client wrote it: of a union's variants the one that
    fits furthest."""
    found = error.errors(include_url=False, include_input=False)
    places = [_place(one["loc"], content, missing=one["type"] == "missing") for one in found]
    best = max(range(len(found)), key=lambda i: places[i].count("."))
    first, param = found[best], places[best]
    if first["type"] == "extra_forbidden":
        message = f"unknown field {param[:100]!r}"
    elif first["type"] == "missing":
        message = f"{param} is missing"
    elif first["type"] in ("value_error", "assertion_error"):
        message = first["msg"].removeprefix("Value error, ")
        message = f"{param}: {message}" if param else message
    else:
        message = f"{param}: {first['msg'][:1].lower()}{first['msg'][1:]}"
    return ApiError(400, message, param=param[:100] or None)


def _place(loc: Sequence[int | str], content: Any, missing: bool) -> str:
    """messages.0.content. Parts of loc that name a variant of a union are left out."""
    parts = []
    for i, part in enumerate(loc):
        if _has(content, part):
            content = content[part]
        elif not (missing and i == len(loc) - 1):
            continue
        parts.append(str(part))
    return ".".join(parts)


def _has(content: Any, part: int | str) -> bool:
    if isinstance(content, list):
        return isinstance(part, int) and part < len(content)
    return isinstance(content, dict) and part in content
