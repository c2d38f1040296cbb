"""Tool calls in the text that models write, one format a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxllm.text.tool_calls.call_parser import CallParser
from jaxllm.text.tool_calls.events import (
    ContentDelta,
    Event,
    ToolCallArguments,
    ToolCallParser,
    ToolCallStart,
)
from jaxllm.text.tool_calls.forced import forced_grammar
from jaxllm.text.tool_calls.hermes import HermesParser
from jaxllm.text.tool_calls.llama3_json import Llama3JsonParser
from jaxllm.text.tool_calls.mistral import MistralParser
from jaxllm.text.tool_calls.qwen3 import Qwen3Parser
from jaxllm.text.tool_calls.tools import check_tools

__all__ = [
    "PARSERS",
    "ContentDelta",
    "Event",
    "ToolCallArguments",
    "ToolCallParser",
    "ToolCallStart",
    "check_tools",
    "choose_parser",
    "forced_calls",
    "get_parser",
    "needs_special_tokens",
]

PARSERS: Mapping[str, type[CallParser]] = {
    "hermes": HermesParser,
    "llama3_json": Llama3JsonParser,
    "mistral": MistralParser,
    "qwen3": Qwen3Parser,
}


def get_parser(
    name: str,
    tools: Sequence[Mapping[str, Any]],
    *,
    make_id: Callable[[], str] | None = None,
) -> ToolCallParser:
    """A parser for one answer. tools: as check_tools returns them; what names none of them is no
    call. make_id: gives each call its id, by default a random one. Raises ValueError for an unknown
    name."""
    parser = _parser_class(name)
    return parser(tools) if make_id is None else parser(tools, make_id)


def needs_special_tokens(name: str) -> bool:
    """Whether the format's marks are special tokens, so that the text must be decoded with
    skip_special_tokens=False."""
    return _parser_class(name).needs_special_tokens


def forced_calls(
    name: str,
    tools: Sequence[Mapping[str, Any]],
    special_token_ids: Mapping[str, int],
    *,
    single_call: bool,
) -> str:
    """A grammar for an answer of calls in this format and nothing else; see forced_grammar."""
    form = _parser_class(name).form
    return forced_grammar(form, tools, special_token_ids, single_call=single_call)


def _parser_class(name: str) -> type[CallParser]:
    if name not in PARSERS:
        raise ValueError(f"unknown tool call parser {name!r}; known: {', '.join(PARSERS)}")
    return PARSERS[name]


def choose_parser(chat_template: str) -> str | None:
    """The format that a chat template teaches its model; None for none of those known here."""
    if "<arg_key>" in chat_template:  # GLM: the same tag around another form
        return None
    if "<tool_call>" in chat_template:
        return "qwen3" if "<function=" in chat_template else "hermes"
    if "[TOOL_CALLS]" in chat_template:
        return "mistral"
    has_header = "<|start_header_id|>" in chat_template and '"parameters"' in chat_template
    return "llama3_json" if "<|python_tag|>" in chat_template or has_header else None
