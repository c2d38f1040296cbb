"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from aiohttp import web
from pydantic import Field

from jaxllm.beam_search_params import BeamSearchParams
from jaxllm.outputs import CompletionOutput, RequestOutput
from jaxllm.sampling_params import MAX_LOGPROBS, SamplingParams
from jaxllm.server.answers import (
    AnswerEvent,
    AnswerFormat,
    AnswerParser,
    ToolChoice,
    ToolChoiceMode,
    answer_format,
    chat_starter,
    read_answer,
)
from jaxllm.server.best_answers import BestAnswerFields, search_params
from jaxllm.server.body import ListOf, StrictModel, open_request
from jaxllm.server.chat_messages import Messages, template_messages
from jaxllm.server.context import RECORD, ServerContext
from jaxllm.server.errors import ApiError
from jaxllm.server.generation import run_all, run_request
from jaxllm.server.logprobs import chat_logprobs, prompt_logprobs_body
from jaxllm.server.replies import Reply, StreamedFields
from jaxllm.server.response_format import ResponseFormat, WantedForm
from jaxllm.server.sampling import only, sampling_params
from jaxllm.text.reasoning import ReasoningDelta
from jaxllm.text.tool_calls import ContentDelta, ToolCallStart

OWN_TEMPLATE_OPTIONS = {"messages", "tools", "add_generation_prompt", "continue_final_message"}


class NamedFunction(StrictModel):
    """Of a tool_choice: the function that must be called."""

    name: str


class NamedToolChoice(StrictModel):
    """A tool_choice that names the function that must be called."""

    type: Literal["function"]
    function: NamedFunction


class ChatRequest(StreamedFields, BestAnswerFields):
    """OpenAI's fields and vLLM's. Those with `only` are not supported."""

    messages: Messages
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: ListOf[Any] | None = None
    tool_choice: ToolChoiceMode | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    metadata: dict[str, str] | None = Field(None, max_length=16)
    safety_identifier: str | None = Field(None, max_length=512)
    chat_template: Annotated[Any, only()] = None
    response_format: ResponseFormat | None = None
    structured_outputs: dict[str, Any] | None = None
    modalities: Annotated[Any, only(["text"])] = None
    service_tier: Annotated[Any, only("auto", "default")] = None
    store: Annotated[Any, only(False)] = None
    audio: Annotated[Any, only()] = None
    prediction: Annotated[Any, only()] = None
    reasoning_effort: Annotated[Any, only()] = None
    verbosity: Annotated[Any, only("medium")] = None
    web_search_options: Annotated[Any, only()] = None
    functions: Annotated[Any, only([])] = None
    function_call: Annotated[Any, only("none")] = None

    @property
    def longest(self) -> int | None:
        """In tokens, by either name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


def add_routes(app: web.Application) -> None:
    """Registers the route of this file."""
    app.router.add_post("/v1/chat/completions", create_chat_completion)


async def create_chat_completion(request: web.Request) -> web.StreamResponse:
    """An answer to a conversation, at once or as a stream."""
    context, body = await open_request(request, ChatRequest)
    form = answer_format(
        context,
        body.tools,
        _tool_choice(body.tool_choice),
        single_call=body.parallel_tool_calls is False,
        wanted=WantedForm(body.response_format, body.structured_outputs),
    )
    _check_combinations(body)
    search = _search(body, context, form)
    params = search.sampling_params() if search else _params(body, context, form)
    num_sequences = search.beam_width if search else params.num_sequences
    context.check_room(num_sequences)
    start = chat_starter(
        template_messages(body.messages),
        form,
        search or params,
        priority=body.priority,
        cache_salt=body.cache_salt,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        chat_template_kwargs=body.chat_template_kwargs,
    )
    outputs = run_request(
        context, start, params, body.timeout, request[RECORD], "messages", num_sequences
    )
    reply = _Reply(request, body, form, params)
    if body.stream:
        return await reply.stream(request, [outputs])
    return await reply.respond(await run_all([outputs]))


def _tool_choice(choice: NamedToolChoice | ToolChoiceMode | None) -> ToolChoice:
    if isinstance(choice, NamedToolChoice):
        return ToolChoice("required", choice.function.name)
    return ToolChoice(choice)


def _search(
    body: ChatRequest, context: ServerContext, form: AnswerFormat
) -> BeamSearchParams | None:
    return search_params(
        body,
        body,
        context,
        max_tokens=body.longest,
        logprobs=_num_logprobs(body),
        skip_special_tokens=form.sampling.get("skip_special_tokens"),
        structured_outputs=form.structured,
    )


def _num_logprobs(body: ChatRequest) -> int | None:
    return (body.top_logprobs or 0) if body.logprobs else None


def _params(body: ChatRequest, context: ServerContext, form: AnswerFormat) -> SamplingParams:
    other: dict[str, Any] = {
        "logprobs": _num_logprobs(body),
        "best_of": body.best_of,
    }
    return sampling_params(
        body,
        context,
        max_tokens=body.longest,
        stream=body.stream,
        **form.sampling,
        **other,
    )


def _check_combinations(body: ChatRequest) -> None:
    """Raises ApiError for fields that have no effect on each other's terms."""
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs = true", param="top_logprobs")
    body.check_stream()
    body.check_best(body.stream, body.n)
    if body.parallel_tool_calls is not None and not body.tools:
        raise ApiError(400, "parallel_tool_calls needs tools", param="parallel_tool_calls")
    lengths = {body.max_tokens, body.max_completion_tokens} - {None}
    if len(lengths) == 2:
        raise ApiError(
            400, "max_tokens and max_completion_tokens differ; give one", param="max_tokens"
        )
    for name in body.chat_template_kwargs or ():
        if name in OWN_TEMPLATE_OPTIONS or name.startswith("_") or name == "chat_template":
            raise ApiError(
                400,
                f"chat_template_kwargs must not have {name[:100]!r}",
                param="chat_template_kwargs",
            )


class _Reply(Reply):
    """Of one prompt."""

    def __init__(
        self, request: web.Request, body: ChatRequest, form: AnswerFormat, params: SamplingParams
    ) -> None:
        kind = "chat.completion.chunk" if body.stream else "chat.completion"
        super().__init__(request, body, params, id_prefix="chatcmpl", kind=kind)
        self._form = form
        self._parsers: dict[int, AnswerParser] = {}

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """The response that is not streamed."""
        [output] = outputs
        self.usage.add_prompt(output)
        self.usage.add_output(output)
        choices = [self._choice(output, answer) for answer in output.outputs]
        reply: dict[str, Any] = {**self._head, "choices": choices, "usage": self.usage.body()}
        if output.prompt_logprobs is not None:
            reply["prompt_logprobs"] = prompt_logprobs_body(output.prompt_logprobs)
        return reply

    def _choice(self, output: RequestOutput, answer: CompletionOutput) -> dict[str, Any]:
        parser = AnswerParser(self._form, output.prompt)
        read = read_answer(parser, answer.text)
        content = None if read.calls and not read.content else read.content
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if read.reasoning:
            message["reasoning"] = read.reasoning
        if read.calls:
            message["tool_calls"] = read.calls
        return {
            "index": answer.index,
            "message": message,
            "logprobs": self._logprobs(answer),
            "finish_reason": parser.finish_reason(answer.finish_reason),
            "stop_reason": answer.stop_reason,
        }

    def chunks(self, number: int, output: RequestOutput) -> list[dict[str, Any]]:
        """The chunks of one output of kind DELTA."""
        if not self._parsers:
            self.usage.add_prompt(output)
        self.usage.add_output(output)
        return [chunk for answer in output.outputs for chunk in self._answer_chunks(output, answer)]

    def _answer_chunks(
        self, output: RequestOutput, answer: CompletionOutput
    ) -> list[dict[str, Any]]:
        chunks, index = [], answer.index
        if index not in self._parsers:
            self._parsers[index] = AnswerParser(self._form, output.prompt)
            chunks.append(self._chunk(index, {"role": "assistant", "content": ""}))
        parser = self._parsers[index]
        deltas = [_delta(one) for one in parser.feed(answer.text, answer.finished())]
        logprobs = self._logprobs(answer) if answer.token_ids else None
        if logprobs is not None and not deltas:
            deltas = [{"content": ""}]
        chunks += [self._chunk(index, delta) for delta in deltas]
        if logprobs is not None:  # all of the output's with its first delta
            chunks[-len(deltas)]["choices"][0]["logprobs"] = logprobs
        if answer.finished():
            chunks.append(self._chunk(index, {}))
            chunks[-1]["choices"][0].update(
                finish_reason=parser.finish_reason(answer.finish_reason),
                stop_reason=answer.stop_reason,
            )
        return chunks

    def _chunk(self, index: int, delta: dict[str, Any]) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        return self.chunk([choice])

    def _logprobs(self, answer: CompletionOutput) -> dict[str, Any] | None:
        num_top = self._params.logprobs
        if num_top is None or answer.logprobs is None:
            return None
        return chat_logprobs(answer.token_ids, answer.logprobs, num_top, self._tokenizer)


def _delta(one: AnswerEvent) -> dict[str, Any]:
    if isinstance(one, ContentDelta):
        return {"content": one.text}
    if isinstance(one, ReasoningDelta):
        return {"reasoning": one.text}
    if isinstance(one, ToolCallStart):
        call = {"id": one.id, "type": "function", "function": {"name": one.name, "arguments": ""}}
        return {"tool_calls": [{"index": one.index, **call}]}
    return {"tool_calls": [{"index": one.index, "function": {"arguments": one.delta}}]}
