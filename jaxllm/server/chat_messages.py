"""The messages of a chat as OpenAI's clients send them, and as chat templates read them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from jaxllm.server.body import ListOf, StrictModel
from jaxllm.server.errors import ApiError
from jaxllm.server.sampling import only


class TextPart(StrictModel):
    """A part of a message's content. There are no images or sounds here."""

    type: Literal["text"]
    text: str


class FunctionCall(StrictModel):
    """arguments: a JSON object, as text."""

    name: str
    arguments: str


class ToolCall(StrictModel):
    """A call in an earlier answer. index: as it was streamed."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class ChatMessage(StrictModel):
    """One message. What answers of OpenAI's carry beside the text is taken if it is empty."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | ListOf[TextPart] | None = None
    name: str | None = None
    tool_calls: ListOf[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    refusal: Annotated[Any, only()] = None
    audio: Annotated[Any, only()] = None
    function_call: Annotated[Any, only()] = None
    annotations: Annotated[Any, only([])] = None


Messages = Annotated[ListOf[ChatMessage], Field(min_length=1, max_length=4096)]


def template_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """For the chat template: roles that templates know, arguments of calls as objects."""
    return [_template_message(i, message) for i, message in enumerate(messages)]


def _template_message(index: int, message: ChatMessage) -> dict[str, Any]:
    plain = message.model_dump(
        exclude_none=True, exclude={"annotations", "reasoning", "tool_calls"}
    )
    if message.role == "developer":  # OpenAI's newer word for it
        plain["role"] = "system"
    if message.reasoning is not None:
        plain.setdefault("reasoning_content", message.reasoning)
    if message.tool_calls:
        place = f"messages.{index}.tool_calls"
        plain["tool_calls"] = [
            _template_call(call, f"{place}.{i}") for i, call in enumerate(message.tool_calls)
        ]
    elif message.content is None:
        raise ApiError(
            400, f"messages.{index}.content is missing", param=f"messages.{index}.content"
        )
    return plain


def _template_call(call: ToolCall, place: str) -> dict[str, Any]:
    arguments = parse_arguments(call.function.arguments, f"{place}.function.arguments")
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}


def parse_arguments(text: str, place: str) -> dict[str, Any]:
    """The arguments of a call, for a template. Raises ApiError, naming the place, if they are no
    JSON object."""
    try:
        arguments = json.loads(text or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise ApiError(400, f"{place} must be the text of a JSON object", param=place)
    return arguments
