"""What the answers of OpenAI's two older routes have in common, and JSON that others do not wait
for."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Annotated, Any

from aiohttp import web

import jaxllm
from jaxllm.outputs import RequestOutput
from jaxllm.sampling_params import SamplingParams
from jaxllm.server.body import StrictModel
from jaxllm.server.context import CONTEXT, REQUEST_ID
from jaxllm.server.errors import ApiError
from jaxllm.server.generation import Outputs, Usage, run_merged
from jaxllm.server.sampling import RequestFields, only
from jaxllm.server.sse import EventStream, event
from jaxllm.text.tokenizer import Tokenizer

SYSTEM_FINGERPRINT = f"jaxllm-{jaxllm.__version__}"


class StreamOptions(StrictModel):
    """include_usage: a last chunk with the tokens used."""

    include_usage: bool | None = None
    include_obfuscation: Annotated[Any, only(False)] = None


class StreamedFields(RequestFields):
    """Of a request whose answer is streamed in chunks, if it asks for that."""

    stream_options: StreamOptions | None = None

    def check_stream(self) -> None:
        """Raises ApiError for what does not go together."""
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options needs stream = true", param="stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise ApiError(400, "prompt_logprobs cannot be streamed", param="prompt_logprobs")


class Reply(ABC):
    """Turns outputs into what the client gets: a whole response, or chunks. usage: so far."""

    def __init__(
        self,
        request: web.Request,
        body: StreamedFields,
        params: SamplingParams,
        *,
        id_prefix: str,
        kind: str,
    ) -> None:
        context = request.app[CONTEXT]
        options = body.stream_options
        self.usage = Usage()
        self.include_usage = bool(options is not None and options.include_usage)
        self._params = params
        self._tokenizer: Tokenizer = context.ready_engine().get_tokenizer()
        self._head = {
            "id": f"{id_prefix}-{request[REQUEST_ID]}",
            "object": kind,
            "created": int(time.time()),
            "model": body.model or context.model_name,
            "system_fingerprint": SYSTEM_FINGERPRINT,
        }

    @abstractmethod
    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """The response to all prompts' final outputs."""

    @abstractmethod
    def chunks(self, number: int, output: RequestOutput) -> list[dict[str, Any]]:
        """The chunks of an output of kind DELTA to one of the prompts."""

    def chunk(self, choices: list[Any], usage: dict[str, Any] | None = None) -> dict[str, Any]:
        """One chunk. Where usage was asked for, all have the field."""
        body = {**self._head, "choices": choices}
        return {**body, "usage": usage} if self.include_usage else body

    async def respond(self, outputs: Sequence[RequestOutput]) -> web.Response:
        """The response that is not streamed."""
        return await json_reply(lambda: self.whole(outputs))

    async def stream(self, request: web.Request, requests: Sequence[Outputs]) -> web.StreamResponse:
        """The chunks as they come."""
        async with (
            EventStream(request) as stream,
            contextlib.aclosing(run_merged(requests)) as merged,
        ):
            async for number, output in merged:
                chunks = self.chunks(number, output)
                if chunks:
                    await stream.send("".join(map(event, chunks)))
            end = event(self.chunk([], self.usage.body())) if self.include_usage else ""
            await stream.send(end + event("[DONE]"))
        return stream.response


async def json_reply(make: Callable[[], Any], levels: int = 5) -> web.Response:
    """What `make` makes, as JSON; both on a thread. levels: see json_text."""
    text = await asyncio.to_thread(lambda: json_text(make(), levels))
    return web.Response(text=text, content_type="application/json")


def json_text(value: Any, levels: int) -> str:
    """JSON, written level by level down to `levels`: the library lets no other thread run while it
    writes one value, and log-probabilities of a long answer may be a million numbers."""
    if levels and isinstance(value, dict):
        items = (f"{json.dumps(key)}: {json_text(one, levels - 1)}" for key, one in value.items())
        return "{" + ", ".join(items) + "}"
    if levels and isinstance(value, list):
        return "[" + ", ".join(json_text(one, levels - 1) for one in value) + "]"
    return json.dumps(value)
