"""Chat messages to the prompt text that a model was trained on.

A chat template is a Jinja program that comes with the model, so it runs in Jinja's sandbox and
sees plain data only. Names and behaviour are those that templates on the Hugging Face hub rely on:
https://huggingface.co/docs/transformers/chat_templating_writing
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jaxllm.request_error import RequestError

# Marks where the last message ends. The space shows whether the template trims messages.
END_MARK = "<<end of the message to continue>> "


ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # of an object that a template prints


class _GenerationTag(Extension):
    """``{% generation %}`` marks answers for training; for a prompt only its content counts."""

    tags = {"generation"}  # noqa: RUF012 (declared so by Jinja)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace without names that start with an underscore, which reach into Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # as in Jinja: "self" may be an attribute
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_attribute(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: Any) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot have an attribute {name!r}")


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.exceptions.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own tojson escapes HTML characters, which a model should not see."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@dataclass(frozen=True)
class _Compiled:
    template: jinja2.Template
    takes_parts: bool  # it walks over content that is a list of parts


@lru_cache(maxsize=32)
def _compile(template: str) -> _Compiled:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(
        raise_exception=_raise_exception,
        strftime_now=_strftime_now,
        dict=_make_dict,
        namespace=_Namespace,
    )
    tree = environment.parse(template)
    return _Compiled(environment.from_string(template), _takes_parts(tree))


def _takes_parts(tree: nodes.Template) -> bool:
    """Whether the template loops over something called content."""
    for loop in tree.find_all(nodes.For):
        walked = loop.iter
        if isinstance(walked, nodes.Getattr) and walked.attr == "content":
            return True
        if isinstance(walked, nodes.Getitem) and isinstance(walked.arg, nodes.Const):
            if walked.arg.value == "content":
                return True
        elif isinstance(walked, nodes.Name) and walked.name == "content":
            return True
    return False


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    special_tokens: Mapping[str, str],
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    **template_kwargs: Any,
) -> str:
    """The prompt for a conversation.

    messages: dicts with "role" and "content", a string or a list of {"type": "text", "text": ...}.
    add_generation_prompt: end with the header of an answer, so that the model gives one.
    continue_final_message: end inside the last message, so that the model goes on with it.
    special_tokens, template_kwargs: further variables of the template.

    Raises ValueError if the messages are malformed or the template refuses them.
    """
    if continue_final_message and add_generation_prompt:
        raise RequestError(
            "continue_final_message and add_generation_prompt exclude each other; set one to False",
            param="continue_final_message",
        )
    compiled = _compile_checked(template)
    try:
        chat = _checked_messages(messages, compiled.takes_parts)
    except RecursionError as error:
        raise RequestError("messages are nested too deeply", param="prompt") from error
    if continue_final_message:
        chat[-1]["content"] = _marked(chat[-1].get("content"))
    variables = _plain({**special_tokens, **template_kwargs}, "template option")
    variables |= {
        "messages": chat,
        "tools": None if tools is None else _checked_tools(tools),
        "documents": variables.get("documents"),
        "add_generation_prompt": add_generation_prompt,
    }
    try:
        text = compiled.template.render(variables)
    except Exception as error:  # a template may raise anything
        raise RequestError(
            f"the chat template failed: {_one_line(error)}", param="prompt"
        ) from error
    return _cut_at_mark(text) if continue_final_message else text


def _compile_checked(template: str) -> _Compiled:
    if not isinstance(template, str):
        raise RequestError(
            f"the chat template must be a string, got {type(template).__name__}", param="prompt"
        )
    try:
        return _compile(template)
    except (jinja2.TemplateError, RecursionError) as error:
        raise RequestError(
            f"the chat template is malformed: {_one_line(error)}", param="prompt"
        ) from error


def _one_line(error: Exception) -> str:
    lines = ADDRESS.sub("", str(error)).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _checked_messages(
    messages: Sequence[Mapping[str, Any]], takes_parts: bool
) -> list[dict[str, Any]]:
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise RequestError(
            f"messages must be a list of dicts, got {type(messages).__name__}", param="prompt"
        )
    if not messages:
        raise RequestError("messages must not be empty", param="prompt")
    return [_checked_message(i, message, takes_parts) for i, message in enumerate(messages)]


def _checked_message(index: int, message: Any, takes_parts: bool) -> dict[str, Any]:
    """A copy of plain data. Keys that are None are left out: templates test for their presence."""
    name = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise RequestError(f"{name} must be a dict, got {type(message).__name__}", param="prompt")
    if not isinstance(message.get("role"), str) or not message["role"]:
        raise RequestError(
            f"{name} needs a role, a non-empty string; got {message.get('role')!r}", param="prompt"
        )
    checked = _plain({k: v for k, v in message.items() if v is not None}, name)
    content = checked.get("content")
    if isinstance(content, list):
        texts = [_checked_part(f"{name}.content[{i}]", part) for i, part in enumerate(content)]
        if not takes_parts:
            checked["content"] = "\n".join(texts)
    elif content is None and "tool_calls" not in checked:
        raise RequestError(f"{name} has no content", param="prompt")
    elif content is not None and not isinstance(content, str):
        raise RequestError(
            f"{name}.content must be a string or a list of text parts, got "
            f"{type(content).__name__}",
            param="prompt",
        )
    return checked


def _checked_part(name: str, part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind != "text":
        raise RequestError(f"{name} is of type {kind!r}; only 'text' is supported", param="prompt")
    if not isinstance(part.get("text"), str):
        raise RequestError(
            f"{name}.text must be a string, got {part.get('text')!r}", param="prompt"
        )
    return part["text"]


def _checked_tools(tools: Sequence[Mapping[str, Any]]) -> list[Any]:
    is_list = isinstance(tools, Sequence) and not isinstance(tools, (str, bytes))
    if not is_list or not all(isinstance(tool, Mapping) for tool in tools):
        raise RequestError(
            "tools must be a list of dicts, each a JSON schema of a function", param="tools"
        )
    return [_plain(tool, f"tools[{i}]") for i, tool in enumerate(tools)]


def _plain(value: Any, name: str) -> Any:
    """A copy made of JSON's types: methods of richer objects would escape the sandbox."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{name}[{i}]") for i, item in enumerate(value)]
    if value is None or isinstance(value, bool):
        return value
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind.__str__(value) if kind is str else kind(value)
    raise RequestError(f"{name} must be JSON data, got {type(value).__name__}", param="prompt")


def _marked(content: Any) -> Any:
    """The content with END_MARK after its last text."""
    if isinstance(content, str):
        return content + END_MARK
    if not content:
        raise RequestError(
            "continue_final_message: the last message has no text to continue",
            param="continue_final_message",
        )
    return [*content[:-1], {**content[-1], "text": content[-1]["text"] + END_MARK}]


def _cut_at_mark(text: str) -> str:
    end = text.rfind(END_MARK.strip())
    if end < 0:
        raise RequestError(
            "continue_final_message: the chat template drops the last message's text",
            param="continue_final_message",
        )
    kept_space = text.startswith(END_MARK, end)
    return text[:end] if kept_space else text[:end].rstrip()
