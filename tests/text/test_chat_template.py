"""Chat templates, against transformers' apply_chat_template."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models
from transformers import PreTrainedTokenizerFast

from jaxllm.text.chat_template import render_chat

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
LLAMA3 = """{{- bos_token }}
{%- if tools is not none %}{{ 'Tools: ' + tools | tojson(indent=2) }}{% endif %}
{% for message in messages %}
    {%- if not loop.first and message.role == 'system' %}{% continue %}{% endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {%- if message.content is string %}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- else %}
        {%- for part in message.content %}{{ part.text }}{% endfor %}{{- '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
QWEN = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "<|im_end|>\\n" }}
{%- endif %}
{%- set ns = namespace(multi_step=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step and message.role == "user" and not message.content.startswith('<tool') %}
        {%- set ns.multi_step = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "assistant" and '</think>' in message.content %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
    {%- else %}
        {%- set content = message.content if message.content is defined else '' %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if loop.index0 > ns.last %}{% generation %}{{ content }}{% endgeneration %}
    {%- else %}{{ content }}{% endif %}
    {%- for call in message.tool_calls or [] %}{{ call.function.arguments | tojson }}{% endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think></think>' }}
    {%- endif %}
{%- endif %}"""
MISTRAL = """{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}
{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}
{% endfor %}"""
TEMPLATES = {"llama3": LLAMA3, "qwen": QWEN, "mistral": MISTRAL}
HELLO = [{"role": "user", "content": 'Héllo <b>"you"</b> & 日本 😀'}]
TALK: list[dict[str, Any]] = [
    *HELLO,
    {"role": "assistant", "content": "<think>so</think>\n\nHi there "},
    {"role": "user", "content": "  What is 1+1?\n"},
]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "a < b & 'é'"}}]


def transformers_chat(template: str, messages: list[dict[str, Any]], **options: Any) -> str:
    backend = Backend(models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=template
    )
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


def check(template: str, messages: list[dict[str, Any]], **options: Any) -> str:
    text = render_chat(template, messages, special_tokens=SPECIAL, **options)
    assert text == transformers_chat(template, messages, **options)
    return text


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("messages", [HELLO, TALK], ids=["hello", "talk"])
@pytest.mark.parametrize("prompt", [True, False])
def test_equals_transformers(name: str, messages: list[dict[str, Any]], prompt: bool) -> None:
    text = check(TEMPLATES[name], messages, add_generation_prompt=prompt)
    assert '<b>"you"</b> & 日本 😀' in text


def test_tools_and_further_options_equal_transformers() -> None:
    for template in (LLAMA3, QWEN):
        text = check(template, TALK, tools=TOOLS, add_generation_prompt=True)
        assert "a < b & 'é'" in text
    assert check(QWEN, HELLO, enable_thinking=False, add_generation_prompt=True).endswith(
        "<|im_start|>assistant\n<think></think>"
    )
    call = {"function": {"name": "add", "arguments": {"a": "é<"}}}
    messages = [*HELLO, {"role": "assistant", "content": "", "tool_calls": [call]}]
    assert '{"a": "é<"}' in check(QWEN, messages, add_generation_prompt=False)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("last", ["The answer is", "ends with spaces  "])
def test_continuing_the_final_message_equals_transformers(name: str, last: str) -> None:
    messages = [*HELLO, {"role": "assistant", "content": last}]
    options = {"continue_final_message": True, "add_generation_prompt": False}
    assert check(TEMPLATES[name], messages, **options).endswith(
        last.rstrip() if name == "llama3" else last
    )
    assert messages[-1]["content"] == last


def test_text_parts_go_to_templates_that_take_them_and_are_joined_for_others() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [{"role": "user", "content": parts}]
    assert "onetwo<|eot_id|>" in check(LLAMA3, messages, add_generation_prompt=True)
    text = render_chat(MISTRAL, messages, special_tokens=SPECIAL)
    assert text == "<s>[INST] one\ntwo [/INST]\n"
    options = {"continue_final_message": True, "add_generation_prompt": False}
    assert check(LLAMA3, messages, **options).endswith("onetwo")


def test_values_of_none_are_as_if_absent() -> None:
    messages = [{**HELLO[0], "tool_calls": None, "name": None}]
    assert check(QWEN, messages, add_generation_prompt=True) == check(
        QWEN, HELLO, add_generation_prompt=True
    )


def test_strftime_now_and_tojson_options() -> None:
    template = (
        "{{ strftime_now('%Y') | int > 2000 }} {{ {'b': 1, 'a': 'é'} | tojson(sort_keys=true) }}"
    )
    assert check(template, HELLO, add_generation_prompt=True) == 'True {"a": "é", "b": 1}'


def test_smollm2_equals_transformers(smollm2_metadata: Mapping[str, Any]) -> None:
    template = smollm2_metadata["tokenizer.chat_template"]
    for messages in (HELLO, TALK, [{"role": "system", "content": "Be brief."}, *TALK]):
        check(template, messages, add_generation_prompt=True)
    assert render_chat(template, HELLO, special_tokens=SPECIAL).startswith(
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM"
    )


class Colour(str, enum.Enum):  # noqa: UP042 (its str() is not its value)
    RED = "red"


def test_only_plain_data_reaches_the_template() -> None:
    text = render_chat("{{ messages[0].x }}", [{**HELLO[0], "x": Colour.RED}], special_tokens={})
    assert text == "red"
    with pytest.raises(ValueError, match=r"messages\[0\]\.x must be JSON data, got object"):
        render_chat("", [{**HELLO[0], "x": object()}], special_tokens={})


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "must not be empty"),
        ("hello", "must be a list of dicts, got str"),
        ({"role": "user"}, "must be a list of dicts, got dict"),
        (["hello"], r"messages\[0\] must be a dict, got str"),
        ([{"content": "a"}], r"messages\[0\] needs a role"),
        ([{"role": 1, "content": "a"}], r"needs a role, a non-empty string; got 1"),
        ([{"role": "user"}], r"messages\[0\] has no content"),
        ([{"role": "user", "content": 3}], "must be a string or a list of text parts, got int"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
            r"content\[0\] is of type 'image_url'; only 'text' is supported",
        ),
        ([{"role": "user", "content": ["a"]}], r"content\[0\] is of type 'str'"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"content\[0\]\.text must be a string"),
    ],
)
def test_malformed_messages_are_refused_by_name(messages: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render_chat(MISTRAL, messages, special_tokens=SPECIAL)


def test_messages_nested_too_deeply() -> None:
    nested: Any = "x"
    for _ in range(5000):
        nested = [nested]
    with pytest.raises(ValueError, match="nested too deeply"):
        render_chat(MISTRAL, [{**HELLO[0], "x": nested}], special_tokens=SPECIAL)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for x in %}", "malformed: Expected"),
        ("{{ 'a' | no_such_filter }}", "malformed: No filter named 'no_such_filter'"),
        ("{{ raise_exception('roles must\nalternate') }}", "failed: roles must$"),
        ("{{ messages.x.y }}", "failed: .* has no attribute 'x'"),
        ("{{ messages[0] + 1 }}", "failed: unsupported operand"),
        ("{{ 1 / 0 }}", "failed: division by zero"),
        ("{% for x in range(10**9) %}{% endfor %}", "failed: Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "failed: maximum recursion depth"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "'append' of 'list' object is unsafe"),
        ("{{ messages[0].update({'role': 'x'}) }}", "'update' of 'dict' object is unsafe"),
        ("{{ cycler.__init__.__globals__ }}", "unsafe"),
        ("{{ raise_exception.__globals__['json'] }}", "unsafe"),
        ("{% set ns = namespace(__class__=1) %}", "cannot have an attribute '__class__'"),
        ("{% set ns = namespace() %}{% set ns.__dict__ = 1 %}", "cannot have an attribute"),
        ("{% include 'other' %}", "failed"),
    ],
)
def test_a_template_cannot_do_harm_and_fails_in_one_line(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        render_chat(template, HELLO, special_tokens=SPECIAL)
    assert "\n" not in str(error.value)


def test_refused_combinations() -> None:
    talk = [*HELLO, {"role": "assistant", "content": "a"}]
    with pytest.raises(ValueError, match="exclude each other"):
        render_chat(QWEN, talk, special_tokens=SPECIAL, continue_final_message=True)
    options: dict[str, Any] = {"continue_final_message": True, "add_generation_prompt": False}
    with pytest.raises(ValueError, match="drops the last message"):
        render_chat("{{ bos_token }}", talk, special_tokens=SPECIAL, **options)
    no_text = [*HELLO, {"role": "assistant", "tool_calls": []}]
    with pytest.raises(ValueError, match="no text to continue"):
        render_chat(QWEN, no_text, special_tokens=SPECIAL, **options)
    with pytest.raises(ValueError, match="tools must be a list of dicts"):
        render_chat(QWEN, talk, special_tokens=SPECIAL, tools={"a": 1})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be a string, got NoneType"):
        render_chat(None, talk, special_tokens=SPECIAL)  # type: ignore[arg-type]
