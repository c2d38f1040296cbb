"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API, in text."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from pydantic_core import from_json

from jaxllm.outputs import CompletionOutput, RequestOutput
from jaxllm.prompts import tokenize_chat
from jaxllm.sampling_params import SamplingParams
from jaxllm.server.answers import (
    AnswerEvent,
    AnswerFormat,
    AnswerParser,
    answer_format,
    chat_starter,
)
from jaxllm.server.body import open_request
from jaxllm.server.context import RECORD, REQUEST_ID, ServerContext
from jaxllm.server.errors import ApiError, anthropic_error_body
from jaxllm.server.generation import Outputs, Usage, run_all, run_merged, run_request
from jaxllm.server.messages_body import (
    MessageRequest,
    PromptFields,
    function_tools,
    is_prefilled,
    template_messages,
    tool_choice,
)
from jaxllm.server.replies import json_reply
from jaxllm.server.sampling import SamplingFields, sampling_params
from jaxllm.server.sse import EventStream, event
from jaxllm.text.reasoning import ReasoningDelta
from jaxllm.text.tool_calls import ToolCallArguments, ToolCallStart
from jaxllm.text.tool_calls.json_text import MalformedCall, pass_value
from jaxllm.text.tool_calls.source import TextSource

PATH = "/v1/messages"
# An answer that was cut off in time can be sent back to go on with, which is what a pause means.
STOP_REASONS = {
    "stop": "end_turn", "tool_calls": "tool_use", "length": "max_tokens",
    "timeout": "pause_turn", "abort": "pause_turn",
}  # fmt: skip
SIGNATURE = "unsigned"  # of thinking; some clients drop what has none


def add_routes(app: web.Application) -> None:
    """Registers the routes of this file."""
    app.router.add_post(PATH, create_message)
    app.router.add_post(f"{PATH}/count_tokens", count_tokens)


async def create_message(request: web.Request) -> web.StreamResponse:
    """An answer to a conversation, at once or as a stream."""
    context, body = await open_request(request, MessageRequest)
    context.check_room(1)
    prompt = _read_prompt(body, context)
    params = _params(body, context, prompt.form)
    start = chat_starter(
        prompt.messages,
        prompt.form,
        params,
        priority=body.priority,
        cache_salt=body.cache_salt,
        add_generation_prompt=not prompt.is_prefilled,
        continue_final_message=prompt.is_prefilled,
        chat_template_kwargs=prompt.template_options,
    )
    outputs = run_request(
        context, start, params, body.timeout, request[RECORD], prompt_field="messages"
    )
    reply = _Reply(f"msg_{request[REQUEST_ID]}", body.model, prompt.form, params)
    if body.stream:
        return await _stream(request, outputs, reply)
    [output] = await run_all([outputs])
    return await json_reply(lambda: reply.whole(output))


async def count_tokens(request: web.Request) -> web.Response:
    """How many tokens a conversation has as a prompt, cached or not."""
    context, body = await open_request(request, PromptFields)
    prompt = _read_prompt(body, context)
    tokenized = await asyncio.to_thread(
        tokenize_chat,
        prompt.messages,
        context.ready_engine().get_tokenizer(),
        tools=list(prompt.form.tools) or None,
        add_generation_prompt=not prompt.is_prefilled,
        continue_final_message=prompt.is_prefilled,
        **prompt.template_options,
    )
    return web.json_response({"input_tokens": len(tokenized.token_ids)})


@dataclass(frozen=True)
class _Prompt:
    """A conversation as the chat template takes it. is_prefilled: the answer begins with the last
    message."""

    messages: list[dict[str, Any]]
    form: AnswerFormat
    is_prefilled: bool
    template_options: dict[str, Any]


def _read_prompt(body: PromptFields, context: ServerContext) -> _Prompt:
    choice = body.tool_choice
    with _own_names():
        form = answer_format(
            context,
            function_tools(body.tools),
            tool_choice(body),
            single_call=choice is not None and choice.disable_parallel_tool_use is True,
        )
    options = _template_options(body, context, form)
    return _Prompt(template_messages(body), form, is_prefilled(body), options)


def _template_options(
    body: PromptFields, context: ServerContext, form: AnswerFormat
) -> dict[str, Any]:
    """Raises ApiError if a model that thinks cannot be told not to."""
    if body.thinking is None:
        return {}
    if "enable_thinking" in (context.ready_engine().get_tokenizer().chat_template or ""):
        return {"enable_thinking": False}
    if form.reasoning is not None:
        raise ApiError(
            400, "thinking: this model always thinks; leave the field out", param="thinking"
        )
    return {}


def _params(body: MessageRequest, context: ServerContext, form: AnswerFormat) -> SamplingParams:
    given = body.model_dump(include={"temperature", "top_p", "top_k"})
    fields = SamplingFields(**given, stop=body.stop_sequences)
    with _own_names():
        return sampling_params(
            fields,
            context,
            max_tokens=body.max_tokens,
            stream=body.stream,
            **form.sampling,
        )


@contextlib.contextmanager
def _own_names() -> Iterator[None]:
    """What all APIs share speaks of OpenAI's fields in its errors; here they have other names."""
    try:
        yield
    except ApiError as error:
        if error.param == "stop":
            error.message = re.sub(r"^stop\b", "stop_sequences", error.message)
        elif error.param == "tools":
            message = error.message.replace(".function.parameters", ".input_schema")
            error.message = message.replace(".function", "")
        raise


class _ObjectText:
    """Text of a call's arguments, as far as it can be a JSON object's: clients parse what they get
    while it comes, and fail at anything else."""

    def __init__(self) -> None:
        self._source = TextSource()
        self._parts: list[str] = []
        self._steps = pass_value(self._source, self._parts.append)
        self._is_malformed = False
        self.text = ""

    def feed(self, text: str) -> str:
        """What may be told of it now."""
        if not self.text:
            text = text.lstrip()
            self._is_malformed |= text[:1] not in ("", "{")
        if self._is_malformed:
            return ""
        self._source.feed(text)
        try:
            next(self._steps, None)
        except MalformedCall:
            self._is_malformed = True
        found = "".join(self._parts)
        self._parts.clear()
        self.text += found
        return found

    def value(self) -> dict[str, Any]:
        """The object, or of one that was cut off what came before; a client's helper for streams
        reads it so too."""
        try:
            value = from_json(self.text or "{}", allow_partial=True)
        except ValueError:  # half of a surrogate pair
            return {}
        return value if isinstance(value, dict) else {}


class _ContentBlocks:
    """An answer's events as content blocks, and as the events of a stream that tells of these.
    blocks: whole once they are closed."""

    def __init__(self) -> None:
        self.blocks: list[dict[str, Any]] = []
        self._is_open = False
        self._arguments = _ObjectText()  # of the last call

    def add(self, found: AnswerEvent) -> list[dict[str, Any]]:
        """The stream's events for one of the answer's."""
        if isinstance(found, ToolCallStart):
            block = {"type": "tool_use", "id": found.id, "name": found.name, "input": {}}
            events = self._open(block)
            self._arguments = _ObjectText()  # not before the last call is closed
            return events
        if isinstance(found, ToolCallArguments):
            text = self._arguments.feed(found.delta)
            return [self._delta("input_json_delta", partial_json=text)] if text else []
        if isinstance(found, ReasoningDelta):
            return self._add_text("thinking", found.text, signature="")
        return self._add_text("text", found.text)

    def _add_text(self, kind: str, text: str, **others: str) -> list[dict[str, Any]]:
        events = []
        if not self._is_open or self.blocks[-1]["type"] != kind:
            events = self._open({"type": kind, kind: "", **others})
        self.blocks[-1][kind] += text
        return [*events, self._delta(f"{kind}_delta", **{kind: text})]

    def _open(self, block: dict[str, Any]) -> list[dict[str, Any]]:
        events = self.close()
        self.blocks.append(block)
        self._is_open = True
        return [*events, self._event("content_block_start", content_block=dict(block))]

    def close(self) -> list[dict[str, Any]]:
        """Ends the last block."""
        if not self._is_open:
            return []
        self._is_open = False
        block, events = self.blocks[-1], []
        if block["type"] == "thinking":
            block["signature"] = SIGNATURE
            events.append(self._delta("signature_delta", signature=SIGNATURE))
        elif block["type"] == "tool_use":
            block["input"] = self._arguments.value()
        return [*events, self._event("content_block_stop")]

    def _delta(self, kind: str, **values: str) -> dict[str, Any]:
        return self._event("content_block_delta", delta={"type": kind, **values})

    def _event(self, kind: str, **values: Any) -> dict[str, Any]:
        return {"type": kind, "index": len(self.blocks) - 1, **values}


@dataclass
class _Reply:
    """Turns outputs into what the client gets."""

    id: str
    model: str
    form: AnswerFormat
    params: SamplingParams
    usage: Usage = field(default_factory=Usage)
    content: _ContentBlocks = field(default_factory=_ContentBlocks)
    parser: AnswerParser | None = None
    stop_reason: str | None = None
    stop_sequence: str | None = None

    def whole(self, output: RequestOutput) -> dict[str, Any]:
        """The response that is not streamed."""
        self.events(output)
        return self._message()

    def events(self, output: RequestOutput) -> list[dict[str, Any]]:
        """A stream's events for one output, of kind DELTA or the only one."""
        events = []
        if self.parser is None:
            self.parser = AnswerParser(self.form, output.prompt)
            self.usage.add_prompt(output)
            events.append({"type": "message_start", "message": self._message()})
        self.usage.add_output(output)
        for answer in output.outputs:
            for found in self.parser.feed(answer.text, answer.finished()):
                events += self.content.add(found)
            if answer.finished():
                events += [*self.content.close(), *self._end(answer, self.parser)]
        return events

    def _end(self, answer: CompletionOutput, parser: AnswerParser) -> list[dict[str, Any]]:
        reason = parser.finish_reason(answer.finish_reason)
        assert reason is not None
        self.stop_reason = STOP_REASONS[reason]
        if isinstance(answer.stop_reason, str):
            self.stop_sequence = answer.stop_reason
            if reason == "stop":
                self.stop_reason = "stop_sequence"
        elif reason == "length" and self.usage.completion_tokens < (self.params.max_tokens or 0):
            self.stop_reason = "model_context_window_exceeded"
        delta = {"stop_reason": self.stop_reason, "stop_sequence": self.stop_sequence}
        return [
            {"type": "message_delta", "delta": delta, "usage": self._usage()},
            {"type": "message_stop"},
        ]

    def _message(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": [*self.content.blocks],
            "stop_reason": self.stop_reason,
            "stop_sequence": self.stop_sequence,
            "usage": self._usage(),
        }

    def _usage(self) -> dict[str, int]:
        """input_tokens is without those that were cached; to write the cache costs nothing."""
        return {
            "input_tokens": self.usage.prompt_tokens - self.usage.cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": self.usage.cached_tokens,
            "output_tokens": self.usage.completion_tokens,
        }


async def _stream(request: web.Request, outputs: Outputs, reply: _Reply) -> web.StreamResponse:
    def error_events(error: ApiError) -> str:
        return event(anthropic_error_body(error, request[REQUEST_ID]), "error")

    async with (
        EventStream(request, error_events) as stream,
        contextlib.aclosing(run_merged([outputs])) as merged,
    ):
        async for _, output in merged:
            events = reply.events(output)
            if events:
                await stream.send("".join(event(one, one["type"]) for one in events))
    return stream.response
