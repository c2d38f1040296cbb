"""POST /v1/responses."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from typing import Any

from aiohttp import web

from jaxllm.outputs import CompletionOutput, RequestOutput
from jaxllm.sampling_params import SamplingParams
from jaxllm.server.answers import (
    AnswerEvent,
    AnswerFormat,
    AnswerParser,
    answer_format,
    chat_starter,
)
from jaxllm.server.body import open_request
from jaxllm.server.context import CONTEXT, RECORD, REQUEST_ID, ServerContext
from jaxllm.server.errors import ApiError
from jaxllm.server.generation import Outputs, Usage, run_all, run_merged, run_request
from jaxllm.server.logprobs import chat_logprobs
from jaxllm.server.replies import json_reply
from jaxllm.server.responses_body import FunctionChoice, ResponseRequest, chat_messages
from jaxllm.server.responses_output import Event, OutputItems
from jaxllm.server.sampling import sampling_params
from jaxllm.server.sse import EventStream, event
from jaxllm.text.reasoning import ReasoningDelta
from jaxllm.text.tool_calls import ContentDelta

# In OpenAI's words, which have none for "timeout" and "abort": those stay as they are.
INCOMPLETE_REASONS = {"length": "max_output_tokens"}
# Of OpenAI's error codes those that fit; anything else is the server's fault.
ERROR_CODES = {400: "invalid_prompt", 429: "rate_limit_exceeded"}


def add_routes(app: web.Application) -> None:
    """Registers the route of this file."""
    app.router.add_post("/v1/responses", create_response)


async def create_response(request: web.Request) -> web.StreamResponse:
    """An answer to input items, at once or as a stream. Nothing is stored."""
    context, body = await open_request(request, ResponseRequest)
    context.check_room(1)
    body.check()
    with _own_names():
        form = _answer_format(body, context)
        params = _params(body, context, form)
    start = chat_starter(
        chat_messages(body), form, params, priority=body.priority, cache_salt=body.cache_salt
    )
    outputs = run_request(
        context, start, params, body.timeout, request[RECORD], prompt_field="input"
    )
    reply = _Reply(request, body, form, params)
    if body.stream:
        return await _stream(request, outputs, reply)
    [output] = await run_all([outputs])
    # The last level is an entry of logprobs.
    return await json_reply(lambda: reply.whole(output), levels=6)


@contextlib.contextmanager
def _own_names() -> Iterator[None]:
    """What routes share names fields as the chat route does."""
    try:
        yield
    except ApiError as error:
        if error.param == "tools":
            error.message = error.message.replace("].function", "]", 1)
        elif error.param == "max_tokens":
            error.param = "max_output_tokens"
            error.message = error.message.replace("max_tokens", "max_output_tokens")
        raise


def _answer_format(body: ResponseRequest, context: ServerContext) -> AnswerFormat:
    form = answer_format(
        context,
        [tool.nested() for tool in body.tools or ()],
        body.choice(),
        single_call=body.parallel_tool_calls is False,
        wanted=body.wanted(),
    )
    if body.include and (form.reasoning is not None or form.tool_calls is not None):
        raise ApiError(
            400,
            "include: logprobs cannot be told of answers that may have reasoning or calls in them",
            param="include",
        )
    return form


def _params(body: ResponseRequest, context: ServerContext, form: AnswerFormat) -> SamplingParams:
    return sampling_params(
        body,
        context,
        max_tokens=body.max_output_tokens,
        stream=body.stream,
        logprobs=body.num_logprobs,
        **form.sampling,
    )


class _Reply:
    """Turns outputs into what the client gets."""

    def __init__(
        self,
        request: web.Request,
        body: ResponseRequest,
        form: AnswerFormat,
        params: SamplingParams,
    ) -> None:
        context = request.app[CONTEXT]
        self._engine = context.ready_engine()
        self._form = form
        self._num_top = params.logprobs
        self._head = {
            "id": f"resp_{request[REQUEST_ID]}",
            "object": "response",
            "created_at": int(time.time()),
            "model": body.model or context.model_name,
            **_settings(body, params),
        }
        self._usage = Usage()
        self._parser: AnswerParser | None = None
        self._items = OutputItems()
        self._reasoning: list[str] = []
        self._finish_reason: str | None = None
        self._num_events = 0

    def take(self, output: RequestOutput) -> list[dict[str, Any]]:
        """The events of one output, of kind DELTA or final."""
        events: list[dict[str, Any]] = []
        if self._parser is None:
            self._parser = AnswerParser(self._form, output.prompt)
            self._usage.add_prompt(output)
            events = self._begin()
        self._usage.add_output(output)
        [answer] = output.outputs
        logprobs = self._logprobs(answer)
        deltas = self._parser.feed(answer.text, answer.finished())
        if logprobs and not deltas:
            deltas = [ContentDelta("")]
        found: list[Event] = []
        for delta in deltas:
            found += self._items.add(delta, logprobs)
            logprobs = []  # all of the output's with its first delta
            self._note_reasoning(delta)
        if answer.finished():
            self._finish_reason = answer.finish_reason
            found += self._items.finish(self._status())
        return events + [self._event(*one) for one in found]

    def _note_reasoning(self, delta: AnswerEvent) -> None:
        if isinstance(delta, ReasoningDelta):
            self._reasoning.append(delta.text)

    def _logprobs(self, answer: CompletionOutput) -> list[Any]:
        if self._num_top is None or answer.logprobs is None:
            return []
        tokenizer = self._engine.get_tokenizer()
        found = chat_logprobs(answer.token_ids, answer.logprobs, self._num_top, tokenizer)
        return list(found["content"])

    def _begin(self) -> list[dict[str, Any]]:
        response = self._response()
        return [
            self._event(f"response.{kind}", {"response": response})
            for kind in ("created", "in_progress")
        ]

    def _event(self, kind: str, fields: dict[str, Any]) -> dict[str, Any]:
        """The next event of the stream."""
        self._num_events += 1
        return {"type": kind, "sequence_number": self._num_events - 1, **fields}

    def whole(self, output: RequestOutput) -> dict[str, Any]:
        """The response that is not streamed."""
        self.take(output)
        return self._response(usage=self._usage_body())

    def last_event(self) -> str:
        """The stream's last, with the whole response."""
        response = self._response(usage=self._usage_body())
        return _sse(self._event(f"response.{self._status()}", {"response": response}))

    def failure(self, error: ApiError) -> str:
        """How a stream ends that fails: with what there is of the response."""
        events = [] if self._parser is not None else self._begin()
        self._items.close("incomplete")
        self._finish_reason = None
        told = {"code": error.code or error.type, "message": error.message, "param": error.param}
        events.append(self._event("error", told))
        code = ERROR_CODES.get(error.status, "server_error")
        failed = self._response(status="failed", error={"code": code, "message": error.message})
        events.append(self._event("response.failed", {"response": failed}))
        return "".join(map(_sse, events))

    def _status(self) -> str:
        if self._finish_reason is None:
            return "in_progress"
        return "completed" if self._finish_reason == "stop" else "incomplete"

    def _response(self, **changes: Any) -> dict[str, Any]:
        """The response as it is now. changes: of its fields."""
        status = self._status()
        is_completed, is_incomplete = status == "completed", status == "incomplete"
        reason = INCOMPLETE_REASONS.get(self._finish_reason or "", self._finish_reason)
        return {
            **self._head,
            "status": status,
            "completed_at": int(time.time()) if is_completed else None,
            "error": None,
            "incomplete_details": {"reason": reason} if is_incomplete else None,
            "output": list(self._items.done),
            "usage": None,
            **changes,
        }

    def _usage_body(self) -> dict[str, Any]:
        """As OpenAI sends it."""
        usage = self._usage
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {
                "cached_tokens": usage.cached_tokens,
                "cache_write_tokens": self._num_cache_writes(),
            },
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": self._num_reasoning_tokens()},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }

    def _num_cache_writes(self) -> int:
        """Tokens in whole blocks of the prompt that were not in the prefix cache, and now are."""
        config = self._engine.running.engine.config
        if not config.enable_prefix_caching:
            return 0
        num_tokens = self._usage.prompt_tokens // config.block_size * config.block_size
        return max(num_tokens - self._usage.cached_tokens, 0)

    def _num_reasoning_tokens(self) -> int:
        """Counted by tokenizing the reasoning again, without its tags: an output may have tokens
        of reasoning and of the answer, and does not tell them apart."""
        if not self._reasoning:
            return 0
        encode = self._engine.get_tokenizer().encode
        token_ids = encode("".join(self._reasoning), add_special_tokens=False)
        return min(len(token_ids), self._usage.completion_tokens)


def _settings(body: ResponseRequest, params: SamplingParams) -> dict[str, Any]:
    """What a response repeats of its request, with the values that were taken."""
    choice: Any = body.tool_choice or "auto"
    return {
        "background": False,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": False,
        "temperature": params.temperature,
        "text": {"format": _format_body(body)},
        "tool_choice": choice.model_dump() if isinstance(choice, FunctionChoice) else choice,
        "tools": [
            {**tool.model_dump(), "strict": tool.strict or False} for tool in body.tools or ()
        ],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": params.top_p,
        "truncation": "disabled",
        "user": body.user,
    }


def _format_body(body: ResponseRequest) -> dict[str, Any]:
    text = body.text
    if text is None or text.format is None:
        return {"type": "text"}
    return text.format.model_dump(by_alias=True)


def _sse(one: dict[str, Any]) -> str:
    """One event as it is sent: named by its type."""
    return event(one, one["type"])


async def _stream(request: web.Request, outputs: Outputs, reply: _Reply) -> web.StreamResponse:
    async with (
        EventStream(request, reply.failure) as stream,
        contextlib.aclosing(run_merged([outputs])) as merged,
    ):
        async for _, output in merged:
            events = reply.take(output)
            if events:
                await stream.send("".join(map(_sse, events)))
        await stream.send(await asyncio.to_thread(reply.last_event))  # it may tokenize
    return stream.response
