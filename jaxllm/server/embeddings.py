"""POST /v1/embeddings."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from aiohttp import web
from pydantic import Field

from jaxllm.async_engine import AsyncEngine
from jaxllm.engine.request import NO_SAMPLING
from jaxllm.outputs import RequestOutput
from jaxllm.pooling_params import PoolingParams
from jaxllm.server.body import HasModel, OneText, Texts, one_by_one, open_request
from jaxllm.server.context import RECORD, ServerContext
from jaxllm.server.errors import RETRY_AFTER, ApiError
from jaxllm.server.generation import Outputs, Start, as_prompt, run_all, run_request
from jaxllm.server.replies import json_reply


class EmbeddingRequest(HasModel):
    """OpenAI's fields, and pooling, normalize, priority, cache_salt and timeout. user is a label,
    which changes nothing."""

    input: Texts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    pooling: Literal["mean", "last"] = "mean"
    normalize: bool = True
    priority: int | None = None
    cache_salt: str | None = Field(None, min_length=1, max_length=256)
    timeout: float | None = Field(None, gt=0, lt=1e9, allow_inf_nan=False)
    user: str | None = Field(None, max_length=512)

    def inputs(self) -> list[OneText]:
        """One or several, each text or token ids. Raises ApiError for none and for empty ones."""
        inputs = one_by_one(self.input)
        if not inputs:
            raise ApiError(400, "input must not be empty", param="input")
        for number, one in enumerate(inputs):
            if not one:
                raise ApiError(400, f"input {number} is empty", param="input")
        return inputs


def add_routes(app: web.Application) -> None:
    """Registers the route of this file."""
    app.router.add_post("/v1/embeddings", create_embeddings)


async def create_embeddings(request: web.Request) -> web.Response:
    """One vector for each input."""
    context, body = await open_request(request, EmbeddingRequest)
    inputs, params = body.inputs(), _params(body, context)
    limit = context.options.max_completions
    if len(inputs) > limit:
        raise ApiError(400, f"{len(inputs)} inputs; the limit is {limit}", param="input")
    context.check_room(len(inputs))
    starts = [_starter(body, one, params) for one in inputs]
    requests = [
        run_request(
            context, start, NO_SAMPLING, body.timeout, request[RECORD], prompt_field="input"
        )
        for start in starts
    ]
    outputs = await run_all(requests)
    _check_finished(outputs)
    # The last level is a vector: one is written at a time.
    return await json_reply(lambda: _reply(outputs, body, context.model_name), levels=3)


def _params(body: EmbeddingRequest, context: ServerContext) -> PoolingParams:
    params = PoolingParams(
        pooling=body.pooling, normalize=body.normalize, dimensions=body.dimensions
    )
    params.check_size(context.ready_engine().running.model_config.hidden_size)
    return params


def _starter(body: EmbeddingRequest, one: OneText, params: PoolingParams) -> Start:
    def start(engine: AsyncEngine, request_id: str) -> Outputs:
        return engine.encode(
            as_prompt(one),
            params,
            request_id,
            priority=body.priority or 0,
            cache_salt=body.cache_salt,
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


def _reply(
    outputs: Sequence[RequestOutput], body: EmbeddingRequest, model_name: str
) -> dict[str, Any]:
    data = []
    for index, output in enumerate(outputs):
        assert output.embedding is not None
        vector = _encode(output.embedding, body.encoding_format == "base64")
        data.append({"object": "embedding", "index": index, "embedding": vector})
    num_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    return {
        "object": "list",
        "data": data,
        "model": body.model or model_name,
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }


def _encode(embedding: np.ndarray, as_base64: bool) -> str | list[float]:
    if as_base64:
        return base64.b64encode(embedding.astype("<f4").tobytes()).decode()
    numbers: list[float] = embedding.tolist()
    return numbers
