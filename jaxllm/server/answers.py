"""What a model wrote, told apart: reasoning, content, tool calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from jaxllm.async_engine import AsyncEngine
from jaxllm.beam_search_params import BeamSearchParams
from jaxllm.sampling_params import SamplingParams
from jaxllm.server.context import ServerContext
from jaxllm.server.errors import ApiError
from jaxllm.server.generation import Outputs, Start
from jaxllm.server.options import ServerOptions
from jaxllm.server.response_format import NO_FORM, WantedForm
from jaxllm.structured_outputs import StructuredOutputsParams
from jaxllm.text.reasoning import (
    REASONING_PARSERS,
    ReasoningDelta,
    ReasoningParser,
    choose_reasoning_parser,
    get_reasoning_parser,
    opens_reasoning,
)
from jaxllm.text.tokenizer import Tokenizer
from jaxllm.text.tool_calls import (
    PARSERS,
    ContentDelta,
    Event,
    ToolCallArguments,
    ToolCallParser,
    ToolCallStart,
    check_tools,
    choose_parser,
    forced_calls,
    get_parser,
    needs_special_tokens,
)

AnswerEvent = Event | ReasoningDelta


ToolChoiceMode = Literal["none", "auto", "required"]


@dataclass(frozen=True)
class ToolChoice:
    """Whether the answer must be a call. mode None: the client does not say, which is auto where
    there are tools. name: with required, the only function that may be called."""

    mode: ToolChoiceMode | None
    name: str | None = None


@dataclass(frozen=True)
class AnswerFormat:
    """How to read the answers of one request. tools: as check_tools returns them.
    structured: the form that they must have, which may be that of calls."""

    reasoning: str | None
    tool_calls: str | None
    tools: Sequence[dict[str, Any]] = ()
    single_call: bool = False
    structured: StructuredOutputsParams | None = None

    @property
    def sampling(self) -> dict[str, Any]:
        """SamplingParams that go with it."""
        options: dict[str, Any] = {}
        if self.tool_calls is not None and needs_special_tokens(self.tool_calls):
            options["skip_special_tokens"] = False
        if self.structured is not None:
            options["structured_outputs"] = self.structured
        return options


def check_parsers(options: ServerOptions) -> None:
    """Raises ValueError if the operator named a parser that does not exist."""
    for name, value, known in (
        ("tool_call_parser", options.tool_call_parser, PARSERS),
        ("reasoning_parser", options.reasoning_parser, REASONING_PARSERS),
    ):
        if value not in ("auto", "none", *known):
            raise ValueError(f"{name} must be auto, none, {', '.join(known)}; got {value!r}")


def answer_format(
    context: ServerContext,
    tools: list[dict[str, Any]] | None,
    choice: ToolChoice = ToolChoice(None),
    *,
    single_call: bool = False,
    wanted: WantedForm = NO_FORM,
) -> AnswerFormat:
    """The server's parsers, or those that the model's chat template asks for. Raises ApiError if
    the tools cannot be used, or not in the form that is wanted."""
    tokenizer, options = context.ready_engine().get_tokenizer(), context.options
    template = tokenizer.chat_template or ""
    reasoning = _parser(options.reasoning_parser, choose_reasoning_parser, template)
    if not tools and choice.mode in ("auto", "required"):
        raise ApiError(400, "tool_choice needs tools", param="tool_choice")
    structured = wanted.structured(after_reasoning=reasoning is not None)
    checked = _checked(tools)
    if not checked or choice.mode == "none":
        return AnswerFormat(reasoning, None, structured=structured)
    if structured is not None:
        raise ApiError(
            400,
            f"{structured.source} cannot be combined with tools that may be called; set "
            f'tool_choice to "none"',
            param=structured.source,
        )
    calls = _parser(options.tool_call_parser, choose_parser, template)
    if calls is None:
        raise ApiError(400, "tools are not supported with this model", param="tools")
    form = AnswerFormat(reasoning, calls, checked, single_call)
    return _forced(form, choice, tokenizer) if choice.mode == "required" else form


def _parser(option: str, choose: Callable[[str], str | None], template: str) -> str | None:
    """A parser's name: the operator's, or the one that suits the chat template."""
    name = choose(template) if option == "auto" else option
    return None if name == "none" else name


def _forced(form: AnswerFormat, choice: ToolChoice, tokenizer: Tokenizer) -> AnswerFormat:
    """The format of answers that are calls and nothing else."""
    assert form.tool_calls is not None
    tools = [tool for tool in form.tools if choice.name in (None, tool["function"]["name"])]
    if not tools:
        raise ApiError(400, f"tool_choice: no tool is {choice.name!r:.80}", param="tool_choice")
    grammar = forced_calls(
        form.tool_calls,
        tools,
        tokenizer.special_token_texts(),
        single_call=form.single_call or choice.name is not None,
    )
    structured = StructuredOutputsParams(
        grammar=grammar, after_reasoning=form.reasoning is not None, source="tools"
    )
    return replace(form, structured=structured)


def _checked(tools: list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    if not tools:
        return []
    try:
        return check_tools(tools)
    except ValueError as error:
        raise ApiError(400, str(error), param="tools") from None


def chat_starter(
    messages: list[dict[str, Any]],
    form: AnswerFormat,
    params: SamplingParams | BeamSearchParams,
    *,
    priority: int | None = None,
    cache_salt: str | None = None,
    **options: Any,
) -> Start:
    """Starts the request of a conversation. messages: as template_messages returns them. options:
    of AsyncEngine.chat, for the chat template."""

    def start(engine: AsyncEngine, request_id: str) -> Outputs:
        return engine.chat(
            messages,
            params,
            request_id,
            priority=priority or 0,
            cache_salt=cache_salt,
            tools=list(form.tools) or None,
            **options,
        )

    return start


class AnswerParser:
    """Reads one answer's text, which may come in pieces."""

    def __init__(self, form: AnswerFormat, prompt: str | None) -> None:
        self._reasoning: ReasoningParser | None = None
        if form.reasoning is not None:
            starts_open = opens_reasoning(prompt or "")
            self._reasoning = get_reasoning_parser(form.reasoning, starts_open=starts_open)
        self._calls: ToolCallParser | None = None
        if form.tool_calls is not None:
            self._calls = get_parser(form.tool_calls, form.tools)
        self._single_call = form.single_call
        self.num_calls = 0

    def feed(self, text: str, finished: bool) -> list[AnswerEvent]:
        """What is certain with this piece. finished: it is the last."""
        events = self._split_reasoning(text, finished)
        if self._calls is not None:
            events = self._split_calls(events, finished)
        return [event for event in events if not isinstance(event, ContentDelta) or event.text]

    def _split_reasoning(self, text: str, finished: bool) -> list[AnswerEvent]:
        if self._reasoning is None:
            return [ContentDelta(text)]
        parts = self._reasoning.feed(text)
        return [*parts, *(self._reasoning.finish() if finished else ())]

    def _split_calls(self, events: list[AnswerEvent], finished: bool) -> list[AnswerEvent]:
        assert self._calls is not None
        found: list[AnswerEvent] = []
        for event in events:
            if isinstance(event, ContentDelta):
                found += self._calls.feed(event.text)
            else:
                found.append(event)
        if finished:
            found += self._calls.finish()
        kept = [event for event in found if not self._is_refused(event)]
        self.num_calls += sum(isinstance(event, ToolCallStart) for event in kept)
        return kept

    def _is_refused(self, event: AnswerEvent) -> bool:
        """parallel_tool_calls = false: only the first call counts."""
        is_call = isinstance(event, ToolCallStart | ToolCallArguments)
        return self._single_call and is_call and event.index > 0  # type: ignore[union-attr]

    def finish_reason(self, reason: str | None) -> str | None:
        """An answer that ended by itself after a call ended for the call."""
        return "tool_calls" if reason == "stop" and self.num_calls else reason


@dataclass
class Answer:
    """A whole answer. calls: {"id", "type", "function": {"name", "arguments"}}."""

    content: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)


def read_answer(parser: AnswerParser, text: str) -> Answer:
    """All of an answer's text at once."""
    answer = Answer()
    for event in parser.feed(text, finished=True):
        if isinstance(event, ContentDelta):
            answer.content += event.text
        elif isinstance(event, ReasoningDelta):
            answer.reasoning += event.text
        elif isinstance(event, ToolCallStart):
            function = {"name": event.name, "arguments": ""}
            answer.calls.append({"id": event.id, "type": "function", "function": function})
        else:
            answer.calls[event.index]["function"]["arguments"] += event.delta
    return answer
