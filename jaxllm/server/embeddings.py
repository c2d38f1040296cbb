"""POST /v1/embeddings."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from aiohttp import web
from pydantic import Field

from jaxllm.async_engine import AsyncEngine
from jaxllm.engine.request import NO_SAMPLING
from jaxllm.outputs import RequestOutput
from jaxllm.pooling_params import PoolingParams
from jaxllm.server.body import StrictModel, read_body
from jaxllm.server.context import CONTEXT, RECORD, ServerContext
from jaxllm.server.errors import RETRY_AFTER, ApiError
from jaxllm.server.generation import Outputs, Start, run_all, run_request

OneInput = str | list[int]


class EmbeddingRequest(StrictModel):
    """OpenAI's fields, and pooling, normalize, priority, cache_salt and timeout. user is a label,
    which changes nothing."""

    input: str | list[str] | list[int] | list[list[int]]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    pooling: Literal["mean", "last"] = "mean"
    normalize: bool = True
    priority: int | None = None
    cache_salt: str | None = Field(None, min_length=1, max_length=256)
    timeout: float | None = Field(None, gt=0, lt=1e9, allow_inf_nan=False)
    user: str | None = Field(None, max_length=512)

    def inputs(self) -> list[OneInput]:
        """One or several, each text or token ids. Raises ApiError for none and for empty ones."""
        inputs: Sequence[Any] = self.input
        if isinstance(inputs, str) or (inputs and isinstance(inputs[0], int)):
            inputs = [inputs]
        if not inputs:
            raise ApiError(400, "input must not be empty", param="input")
        for number, one in enumerate(inputs):
            if not one:
                raise ApiError(400, f"input {number} is empty", param="input")
        return list(inputs)


def add_routes(app: web.Application) -> None:
    """Registers the route of this file."""
    app.router.add_post("/v1/embeddings", create_embeddings)


async def create_embeddings(request: web.Request) -> web.Response:
    """One vector for each input."""
    context = request.app[CONTEXT]
    context.ready_engine()
    body = await read_body(request, EmbeddingRequest)
    context.check_model(body.model)
    record = request[RECORD]
    record.model = body.model or context.model_name
    inputs, params = body.inputs(), _params(body, context)
    limit = context.options.max_completions
    if len(inputs) > limit:
        raise ApiError(400, f"{len(inputs)} inputs; the limit is {limit}", param="input")
    context.check_room(len(inputs))
    starts = [_starter(body, one, params) for one in inputs]
    try:
        outputs = await run_all(
            [run_request(context, start, NO_SAMPLING, body.timeout, record) for start in starts]
        )
    except ValueError as error:  # too long, outside the vocabulary
        param = "priority" if str(error).startswith("priority") else "input"
        raise ApiError(400, str(error), param=param) from None
    _check_finished(outputs)
    text = await asyncio.to_thread(_reply, outputs, body, context.model_name)
    return web.Response(text=text, content_type="application/json")


def _params(body: EmbeddingRequest, context: ServerContext) -> PoolingParams:
    params = PoolingParams(
        pooling=body.pooling, normalize=body.normalize, dimensions=body.dimensions
    )
    try:
        params.check_size(context.ready_engine().running.model_config.hidden_size)
    except ValueError as error:
        raise ApiError(400, str(error), param="dimensions") from None
    return params


def _starter(body: EmbeddingRequest, one: OneInput, params: PoolingParams) -> Start:
    given = {"prompt" if isinstance(one, str) else "prompt_token_ids": one}

    def start(engine: AsyncEngine, request_id: str) -> Outputs:
        return engine.encode(
            given, params, request_id, priority=body.priority or 0, cache_salt=body.cache_salt
        )

    return start


def _check_finished(outputs: Sequence[RequestOutput]) -> None:
    """Part of an embedding is none."""
    for output in outputs:
        if output.embedding is None:
            reason = output.outputs[0].finish_reason
            if reason == "timeout":
                raise ApiError(
                    503, "the time of this request is over", code=reason, headers=RETRY_AFTER
                )
            raise ApiError(503, "the server ended this request", headers=RETRY_AFTER)


def _reply(outputs: Sequence[RequestOutput], body: EmbeddingRequest, model_name: str) -> str:
    """The response's JSON. Vector by vector: writing a million numbers in one call would hold up
    the event loop, on whichever thread it is."""
    data = []
    for index, output in enumerate(outputs):
        assert output.embedding is not None
        vector = _encode(output.embedding, body.encoding_format == "base64")
        data.append(json.dumps({"object": "embedding", "index": index, "embedding": vector}))
    num_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    rest = json.dumps({"object": "list", "model": body.model or model_name, "usage": usage})
    return f'{rest[:-1]}, "data": [{", ".join(data)}]}}'


def _encode(embedding: np.ndarray, as_base64: bool) -> str | list[float]:
    if as_base64:
        return base64.b64encode(embedding.astype("<f4").tobytes()).decode()
    numbers: list[float] = embedding.tolist()
    return numbers
