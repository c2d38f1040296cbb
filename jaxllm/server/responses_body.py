"""The body of POST /v1/responses, and the chat that its input items are.

https://platform.openai.com/docs/api-reference/responses/create
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from jaxllm.sampling_params import MAX_LOGPROBS
from jaxllm.server.answers import ToolChoice, ToolChoiceMode
from jaxllm.server.body import ListOf, StrictModel
from jaxllm.server.chat_messages import parse_arguments
from jaxllm.server.errors import ApiError
from jaxllm.server.response_format import (
    BY_TYPE,
    JsonObjectFormat,
    JsonSchema,
    JsonSchemaFormat,
    ResponseFormat,
    TextFormat,
    WantedForm,
)
from jaxllm.server.sampling import RequestFields, only

LOGPROBS = "message.output_text.logprobs"
Status = Literal["in_progress", "completed", "incomplete"]
Label = Annotated[str, Field(max_length=512)]


class ContentPart(StrictModel):
    """Text, of the client (input_text) or of an earlier answer (output_text), whose logprobs say
    nothing to the model. There are no images, sounds or files here."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: Annotated[Any, only([])] = None
    logprobs: ListOf[Any] | None = None


class Item(StrictModel):
    """What all items may have. id and status are those of an earlier answer: labels."""

    id: Label | None = None
    status: Status | None = None


class MessageItem(Item):
    """A message. The only item whose type may be left out."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | ListOf[ContentPart]
    phase: Annotated[Any, only()] = None


class ReasoningText(StrictModel):
    """A part of what a model thought."""

    type: Literal["reasoning_text", "summary_text"]
    text: str


class ReasoningItem(Item):
    """What a model thought before its answer. The summary counts where there is no content."""

    type: Literal["reasoning"]
    summary: ListOf[ReasoningText] | None = None
    content: ListOf[ReasoningText] | None = None
    encrypted_content: Annotated[Any, only()] = None


class FunctionCallItem(Item):
    """A call in an earlier answer. arguments: a JSON object, as text."""

    type: Literal["function_call"]
    call_id: Label
    name: str
    arguments: str
    caller: Annotated[Any, only({"type": "direct"})] = None
    namespace: Annotated[Any, only()] = None


class FunctionCallOutputItem(Item):
    """What a call has returned. name: of the function."""

    type: Literal["function_call_output"]
    call_id: Label
    output: str | ListOf[ContentPart]
    name: str | None = None
    caller: Annotated[Any, only({"type": "direct"})] = None
    namespace: Annotated[Any, only()] = None


def _item_type(item: Any) -> str | None:
    kind = item.get("type", "message") if isinstance(item, dict) else None
    return kind if isinstance(kind, str) else None


InputItem = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[ReasoningItem, Tag("reasoning")]
    | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[FunctionCallOutputItem, Tag("function_call_output")],
    Discriminator(
        _item_type,
        custom_error_type="item_type",
        custom_error_message="type must be message, reasoning, function_call or "
        "function_call_output",
    ),
]


Items = Annotated[ListOf[InputItem], Field(min_length=1, max_length=4096)]
# Told apart by what is given, so that an error is about that.
Input = Annotated[
    Annotated[str, Tag("text")] | Annotated[Items, Tag("items")],
    Discriminator(lambda given: "items" if isinstance(given, list) else "text"),
]


class FunctionTool(StrictModel):
    """A function that the model may call. check_tools checks the rest of it."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def nested(self) -> dict[str, Any]:
        """As the chat route takes it."""
        return {"type": "function", "function": {k: v for k, v in self if k != "type"}}


class FunctionChoice(StrictModel):
    """A tool_choice that names the function that must be called."""

    type: Literal["function"]
    name: str


class JsonSchemaTextFormat(JsonSchema):
    """JSON of a schema; flat here, nested in the chat route."""

    type: Literal["json_schema"]


class TextConfig(StrictModel):
    """The form of the answer's text."""

    format: (
        Annotated[
            Annotated[TextFormat, Tag("text")]
            | Annotated[JsonObjectFormat, Tag("json_object")]
            | Annotated[JsonSchemaTextFormat, Tag("json_schema")],
            BY_TYPE,
        ]
        | None
    ) = None
    verbosity: Annotated[Any, only("medium")] = None

    def response_format(self) -> ResponseFormat | None:
        """As the chat route takes it."""
        if not isinstance(self.format, JsonSchemaTextFormat):
            return self.format
        schema = self.format.model_dump(by_alias=True, exclude={"type"})
        return JsonSchemaFormat(type="json_schema", json_schema=JsonSchema(**schema))


class ReasoningConfig(StrictModel):
    """How much a model thinks is its own affair."""

    effort: Annotated[Any, only()] = None
    summary: Annotated[Any, only()] = None
    generate_summary: Annotated[Any, only()] = None


class ResponseStreamOptions(StrictModel):
    """Events are not padded."""

    include_obfuscation: Annotated[Any, only(False)] = None


class ResponseRequest(RequestFields):
    """OpenAI's fields, and vLLM's for sampling. Those with `only` are not supported; the labels
    (metadata, user, safety_identifier, prompt_cache_key) change nothing."""

    input: Input
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    tools: ListOf[FunctionTool] | None = None
    tool_choice: ToolChoiceMode | FunctionChoice | None = None
    parallel_tool_calls: bool | None = None
    include: ListOf[Literal["message.output_text.logprobs"]] | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    stream_options: ResponseStreamOptions | None = None
    text: TextConfig | None = None
    structured_outputs: dict[str, Any] | None = None
    reasoning: ReasoningConfig | None = None
    metadata: dict[Annotated[str, Field(max_length=64)], Label] | None = Field(None, max_length=16)
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None
    store: Annotated[Any, only(False)] = None
    service_tier: Annotated[Any, only("auto", "default")] = None
    truncation: Annotated[Any, only("disabled")] = None
    background: Annotated[Any, only(False)] = None
    previous_response_id: Annotated[Any, only()] = None
    conversation: Annotated[Any, only()] = None
    prompt: Annotated[Any, only()] = None
    context_management: Annotated[Any, only([])] = None
    max_tool_calls: Annotated[Any, only()] = None
    moderation: Annotated[Any, only()] = None
    prompt_cache_retention: Annotated[Any, only()] = None
    n: Annotated[Any, only(1)] = None
    prompt_logprobs: Annotated[Any, only()] = None

    @property
    def num_logprobs(self) -> int | None:
        """How many tokens to tell of at each place; None for no logprobs at all."""
        return (self.top_logprobs or 0) if self.include else None

    def choice(self) -> ToolChoice:
        """The tool_choice. "auto" without tools asks for nothing."""
        if isinstance(self.tool_choice, FunctionChoice):
            return ToolChoice("required", self.tool_choice.name)
        is_neutral = self.tool_choice == "auto" and not self.tools
        return ToolChoice(None if is_neutral else self.tool_choice)

    def wanted(self) -> WantedForm:
        """The form that the answer is to have."""
        response_format = None if self.text is None else self.text.response_format()
        return WantedForm(response_format, self.structured_outputs, "text.format")

    def check(self) -> None:
        """Raises ApiError for fields that need another."""
        if self.top_logprobs and not self.include:
            raise ApiError(
                400, f"top_logprobs needs include = [{LOGPROBS!r}]", param="top_logprobs"
            )
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options needs stream = true", param="stream_options")


def chat_messages(body: ResponseRequest) -> list[dict[str, Any]]:
    """The input for the chat template, as template_messages gives that of the chat route. Raises
    ApiError, naming the item."""
    messages: list[dict[str, Any]] = []
    if body.instructions is not None:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    for i, item in enumerate(body.input):
        if isinstance(item, FunctionCallOutputItem):
            messages.append(_tool_message(item))
        elif isinstance(item, MessageItem) and item.role != "assistant":
            role = "user" if item.role == "user" else "system"  # developer: OpenAI's newer word
            messages.append({"role": role, "content": _content(item.content)})
        else:
            _add_to_answer(messages, item, f"input.{i}")
    return messages


def _tool_message(item: FunctionCallOutputItem) -> dict[str, Any]:
    message = {"role": "tool", "tool_call_id": item.call_id, "content": _content(item.output)}
    return message if item.name is None else {**message, "name": item.name}


def _add_to_answer(
    messages: list[dict[str, Any]],
    item: MessageItem | ReasoningItem | FunctionCallItem,
    place: str,
) -> None:
    """An answer is several items here and one message in a chat: reasoning, text, calls."""
    answer = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
    if answer is None or _begins_answer(item, answer):
        answer = {"role": "assistant", "content": ""}
        messages.append(answer)
    if isinstance(item, ReasoningItem):
        parts = item.content or item.summary or ()
        answer["reasoning_content"] = "\n".join(part.text for part in parts)
    elif isinstance(item, MessageItem):
        answer["content"] += _joined(item.content)
    else:
        arguments = parse_arguments(item.arguments, f"{place}.arguments")
        function = {"name": item.name, "arguments": arguments}
        call = {"id": item.call_id, "type": "function", "function": function}
        answer.setdefault("tool_calls", []).append(call)


def _begins_answer(
    item: MessageItem | ReasoningItem | FunctionCallItem, answer: dict[str, Any]
) -> bool:
    """Whether an item after an answer is of the next one. Text after a call is still of the same:
    templates want the call's result right after the message that has the call."""
    if isinstance(item, ReasoningItem):
        return True
    return isinstance(item, MessageItem) and bool(answer["content"]) and "tool_calls" not in answer


def _content(content: str | Sequence[ContentPart]) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    return [{"type": "text", "text": part.text} for part in content]


def _joined(content: str | Sequence[ContentPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)
