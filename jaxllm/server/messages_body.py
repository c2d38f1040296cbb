"""The body of POST /v1/messages as Anthropic's clients send it, and what becomes of it for the
chat template."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from jaxllm.server.answers import ToolChoice, ToolChoiceMode
from jaxllm.server.body import HasModel, ListOf, StrictModel
from jaxllm.server.errors import ApiError
from jaxllm.server.sampling import only


class CacheControl(StrictModel):
    """A hint that a prompt is worth caching up to here."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class Cacheable(StrictModel):
    """What may carry the hint. Every prompt is cached as far as there is room, so it changes
    nothing; clients send it by habit."""

    cache_control: CacheControl | None = None


class TextBlock(Cacheable):
    """Text of a message, of the system prompt or of a call's result."""

    type: Literal["text"]
    text: str
    citations: Annotated[Any, only([])] = None


class ThinkingBlock(StrictModel):
    """What the model thought before an earlier answer. It is not kept from clients here, so there
    is nothing to sign, and any signature is taken."""

    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class ToolUseBlock(Cacheable):
    """A call in an earlier answer."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    caller: Annotated[Any, only({"type": "direct"})] = None


class ToolResultBlock(Cacheable):
    """What came of a call. is_error: it failed; the text says why."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | ListOf[TextBlock] | None = None
    is_error: bool | None = None


def _told_apart_by(field: str, must: str) -> Discriminator:
    """Of a union whose tags are the field's name and value. The value alone would look like one of
    the fields in the place of an error."""

    def tag(value: Any) -> str:
        found = value.get(field) if isinstance(value, dict) else getattr(value, field, None)
        return f"{field} {found}"

    return Discriminator(tag, custom_error_type="union_tag", custom_error_message=f"Must {must}")


NO_OTHER_BLOCKS = "others, such as images and documents, are not supported"
UserBlock = Annotated[
    Annotated[TextBlock, Tag("type text")] | Annotated[ToolResultBlock, Tag("type tool_result")],
    _told_apart_by("type", f"be a block of type text or tool_result; {NO_OTHER_BLOCKS}"),
]
AssistantBlock = Annotated[
    Annotated[TextBlock, Tag("type text")]
    | Annotated[ThinkingBlock, Tag("type thinking")]
    | Annotated[ToolUseBlock, Tag("type tool_use")],
    _told_apart_by("type", f"be a block of type text, thinking or tool_use; {NO_OTHER_BLOCKS}"),
]
Block = TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock


class UserMessage(StrictModel):
    """A message of the user, or results of calls."""

    role: Literal["user"]
    content: str | ListOf[UserBlock]

    @field_validator("content")
    @classmethod
    def _is_not_empty(cls, content: str | list[Any]) -> str | list[Any]:
        if content == []:
            raise ValueError("must have at least one block")
        return content


class AssistantMessage(StrictModel):
    """An earlier answer; or, as the last message, the beginning of this one."""

    role: Literal["assistant"]
    content: str | ListOf[AssistantBlock]


Message = Annotated[
    Annotated[UserMessage, Tag("role user")] | Annotated[AssistantMessage, Tag("role assistant")],
    _told_apart_by("role", "have the role user or assistant; the system prompt goes to system"),
]


class ToolDefinition(Cacheable):
    """A function that the client offers."""

    type: Literal["custom"] | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, Any]
    strict: Annotated[Any, only(False)] = None


class ToolChoiceField(StrictModel):
    """name: with type tool, the tool that must be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _fits(self) -> ToolChoiceField:
        if (self.name is not None) != (self.type == "tool"):
            raise ValueError("type tool needs a name, and no other type has one")
        if self.disable_parallel_tool_use and self.type == "none":
            raise ValueError("type none makes no calls; leave disable_parallel_tool_use out")
        return self


class ThinkingField(StrictModel):
    """A budget for it is not supported: whether a model thinks is up to its chat template."""

    type: Literal["disabled"]


class Metadata(StrictModel):
    """A label, which changes nothing."""

    user_id: str | None = Field(None, max_length=512)


class PromptFields(HasModel, Cacheable):
    """What POST /v1/messages/count_tokens takes: all that the prompt is made of."""

    model: str
    messages: ListOf[Message] = Field(min_length=1, max_length=4096)
    system: str | ListOf[TextBlock] | None = None
    tools: ListOf[ToolDefinition] | None = None
    tool_choice: ToolChoiceField | None = None
    thinking: ThinkingField | None = None
    output_config: Annotated[Any, only()] = None
    speed: Annotated[Any, only("standard")] = None


class MessageRequest(PromptFields):
    """Anthropic's fields, and of vLLM's those that say when and where a request is computed. Those
    with `only` are not supported."""

    max_tokens: int = Field(ge=1)
    temperature: float | None = Field(None, ge=0, le=1)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    stop_sequences: ListOf[str] | None = None
    stream: bool | None = None
    metadata: Metadata | None = None
    service_tier: Annotated[Any, only("auto", "standard_only")] = None
    container: Annotated[Any, only()] = None
    diagnostics: Annotated[Any, only()] = None
    inference_geo: Annotated[Any, only()] = None
    priority: int | None = None
    cache_salt: str | None = Field(None, min_length=1, max_length=256)
    timeout: float | None = Field(None, gt=0, lt=1e9, allow_inf_nan=False)


TOOL_CHOICE_MODES: dict[str, ToolChoiceMode] = {
    "auto": "auto", "any": "required", "tool": "required", "none": "none",
}  # fmt: skip


def tool_choice(body: PromptFields) -> ToolChoice:
    """As the other APIs have it."""
    choice = body.tool_choice
    if choice is None:
        return ToolChoice(None)
    return ToolChoice(TOOL_CHOICE_MODES[choice.type], choice.name)


def function_tools(tools: Sequence[ToolDefinition] | None) -> list[dict[str, Any]] | None:
    """In OpenAI's form, which chat templates read."""
    if tools is None:
        return None
    return [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": tool.description,
                "parameters": tool.input_schema,
            },
        }
        for tool in tools
    ]


def template_messages(body: PromptFields) -> list[dict[str, Any]]:
    """For the chat template: the system prompt first, neighbouring messages of one role as one, and
    each result of a call a message of its own. Raises ApiError for a result of no call."""
    system = _texts(body.system or ())
    found = [{"role": "system", "content": _content(system)}] if any(system) else []
    tool_names: dict[str, str] = {}
    for role, blocks in _turns(body.messages):
        if role == "assistant":
            found.append(_assistant_message(blocks))
            tool_names |= {one.id: one.name for one in blocks if isinstance(one, ToolUseBlock)}
        else:
            found += _user_messages(blocks, tool_names)
    return found


def is_prefilled(body: PromptFields) -> bool:
    """Whether the last message is the beginning of the answer. Raises ApiError if no answer can go
    on with it."""
    *_, (role, blocks) = _turns(body.messages)
    if role == "user":
        return False
    has_calls = any(isinstance(block, ToolUseBlock) for block in blocks)
    if has_calls or not blocks or not isinstance(blocks[-1], TextBlock):
        raise ApiError(
            400,
            "messages: the answer goes on with the text of the last message if that is an "
            "assistant's; it must end in text and hold no tool_use",
            param="messages",
        )
    return True


def _turns(messages: Sequence[UserMessage | AssistantMessage]) -> Iterator[tuple[str, list[Block]]]:
    for role, group in groupby(messages, key=lambda message: message.role):
        yield role, [block for message in group for block in _blocks(message.content)]


def _blocks(content: str | Sequence[Block]) -> Sequence[Block]:
    return [TextBlock(type="text", text=content)] if isinstance(content, str) else content


def _texts(content: str | Sequence[Block]) -> list[str]:
    return [block.text for block in _blocks(content) if isinstance(block, TextBlock)]


def _content(texts: Sequence[str]) -> str | list[dict[str, str]]:
    """Parts only where there are several: some templates know nothing but strings."""
    if len(texts) > 1:
        return [{"type": "text", "text": text} for text in texts]
    return "".join(texts)


def _assistant_message(blocks: Sequence[Block]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant"}
    texts = _texts(blocks)
    calls = [
        {"id": one.id, "type": "function", "function": {"name": one.name, "arguments": one.input}}
        for one in blocks
        if isinstance(one, ToolUseBlock)
    ]
    thinking = [block.thinking for block in blocks if isinstance(block, ThinkingBlock)]
    if texts or not calls:
        message["content"] = _content(texts)
    if thinking:
        message["reasoning_content"] = "\n".join(thinking)
    if calls:
        message["tool_calls"] = calls
    return message


def _user_messages(blocks: Sequence[Block], tool_names: dict[str, str]) -> Iterator[dict[str, Any]]:
    for is_text, group in groupby(blocks, key=lambda block: isinstance(block, TextBlock)):
        if is_text:
            yield {"role": "user", "content": _content(_texts(list(group)))}
            continue
        for block in group:
            assert isinstance(block, ToolResultBlock)
            yield _result_message(block, tool_names)


def _result_message(block: ToolResultBlock, tool_names: dict[str, str]) -> dict[str, Any]:
    if block.tool_use_id not in tool_names:
        raise ApiError(
            400,
            f"messages: a tool_result has the tool_use_id {block.tool_use_id[:100]!r}, which no "
            "tool_use before it has",
            param="messages",
        )
    text = "\n".join(_texts(block.content or ""))
    return {
        "role": "tool",
        "tool_call_id": block.tool_use_id,
        "name": tool_names[block.tool_use_id],
        # Chat templates have no field for it, so the model reads it.
        "content": f"Error: {text}" if block.is_error else text,
    }
