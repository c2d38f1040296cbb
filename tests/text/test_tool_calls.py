"""Tool call parsers on text as real models write it, whole and cut anywhere."""

from __future__ import annotations

import json
from typing import Any

import pytest

from jaxllm.text.tool_calls import (
    PARSERS,
    ContentDelta,
    Event,
    ToolCallArguments,
    ToolCallStart,
    choose_parser,
    get_parser,
    needs_special_tokens,
)


def tool(name: str, **properties: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


WEATHER = tool("get_weather", city={"type": "string"}, days={"type": "integer"})
TIME = tool("get-time_2")
TOOLS = [WEATHER, TIME]


def summary(events: list[Event]) -> tuple[str, list[tuple[str, str]]]:
    """The content and the calls (name, arguments) that events add up to."""
    content, calls = "", list[tuple[str, str]]()
    for event in events:
        if isinstance(event, ContentDelta):
            content += event.text
        elif isinstance(event, ToolCallStart):
            assert event.index == len(calls)
            calls.append((event.name, ""))
        else:
            assert event.index == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + event.delta)
    return content, calls


def parse(
    name: str, text: str, tools: list[dict[str, Any]] = TOOLS
) -> tuple[str, list[tuple[str, str]]]:
    """Parses the text whole, char by char, and in threes; all must agree."""
    found = []
    for size in (len(text) or 1, 1, 3):
        parser = get_parser(name, tools)
        events = [e for i in range(0, len(text), size) for e in parser.feed(text[i : i + size])]
        found.append(summary(events + parser.finish()))
    assert found[0] == found[1] == found[2]
    return found[0]


PARIS = '{"city": "Paris", "days": 3}'
REAL = {
    "hermes": (
        "hermes",
        f'I will look.\n<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>'
        '\n<tool_call>\n{"name": "get-time_2", "arguments": {}}\n</tool_call>',
        ("I will look.\n", [("get_weather", PARIS), ("get-time_2", "{}")]),
    ),
    "hermes, arguments first": (
        "hermes",
        f'<tool_call>{{"arguments": {PARIS}, "name": "get_weather"}}</tool_call>',
        ("", [("get_weather", PARIS)]),
    ),
    "hermes, no end tag": (
        "hermes",
        f'<tool_call>{{"name": "get_weather", "arguments": {PARIS}}}',
        ("", [("get_weather", PARIS)]),
    ),
    "hermes, one brace too many": (
        "hermes",
        f'<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}}}\n</tool_call>\nDone.',
        ("}\n\nDone.", [("get_weather", PARIS)]),
    ),
    "llama": (
        "llama3_json",
        f'{{"name": "get_weather", "parameters": {PARIS}}}',
        ("", [("get_weather", PARIS)]),
    ),
    "llama, type, tag, two calls": (
        "llama3_json",
        f'<|python_tag|>{{"type": "function", "name": "get_weather", "parameters": {PARIS}}}; '
        '{"name": "get-time_2", "arguments": {}};',
        ("", [("get_weather", PARIS), ("get-time_2", "{}")]),
    ),
    "llama, lines, text after": (
        "llama3_json",
        '\n{"name": "get-time_2", "parameters": {}}\n{"name": "get-time_2", "parameters": {}} ok',
        (" ok", [("get-time_2", "{}"), ("get-time_2", "{}")]),
    ),
    "llama, tag in the middle": (
        "llama3_json",
        'Wait. <|python_tag|>{"name": "get-time_2", "parameters": {}}',
        ("Wait. ", [("get-time_2", "{}")]),
    ),
    "mistral list": (
        "mistral",
        f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {PARIS}}}, '
        '{"arguments": {}, "name": "get-time_2"}]',
        ("", [("get_weather", PARIS), ("get-time_2", "{}")]),
    ),
    "mistral by name": (
        "mistral",
        f"Let me see.[TOOL_CALLS]get_weather{PARIS}[TOOL_CALLS]get-time_2[ARGS]{{}}",
        ("Let me see.", [("get_weather", PARIS), ("get-time_2", "{}")]),
    ),
    "mistral with an id": (
        "mistral",
        f"[TOOL_CALLS]get_weather[CALL_ID]a1B2c3D4e[ARGS]{PARIS}",
        ("", [("get_weather", PARIS)]),
    ),
    "qwen3 as hermes": (
        "qwen3",
        f'<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>',
        ("", [("get_weather", PARIS)]),
    ),
    "qwen3-coder": (
        "qwen3",
        "Sure:\n<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n"
        "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>\n"
        "<tool_call>\n<function=get-time_2>\n</function>\n</tool_call>",
        ("Sure:\n", [("get_weather", PARIS), ("get-time_2", "{}")]),
    ),
    "qwen3-coder without first and last tag": (
        "qwen3",
        "<function=get_weather><parameter=city>Paris</parameter><parameter=days>3</parameter>"
        "</tool_call>",
        ("", [("get_weather", PARIS)]),
    ),
}


@pytest.mark.parametrize("case", REAL)
def test_real_examples(case: str) -> None:
    name, text, expected = REAL[case]
    assert parse(name, text) == expected


def wrapped(arguments: str) -> dict[str, str]:
    """One call of get_weather with these arguments in each JSON format."""
    return {
        "hermes": f'<tool_call>{{"name": "get_weather", "arguments": {arguments}}}</tool_call>',
        "qwen3": f'<tool_call>{{"name": "get_weather", "arguments": {arguments}}}</tool_call>',
        "llama3_json": f'{{"name": "get_weather", "parameters": {arguments}}}',
        "mistral": f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {arguments}}}]',
    }


VALID_ARGUMENTS = [
    "{}",
    "{ }",
    '{\n  "a": [1, -2.5e+10, 0, true, false, null],\n  "b": {"c": {}, "d": []}\n}',
    r'{"a": "\"}]</tool_call>\\", "\u00e9\ud83d\ude00": "é😀 {[\n"}',
    '{"a": "</tool_call>[TOOL_CALLS]<tool_call>{"}',
    '{"big": 123456789012345678901234567890, "exp": 1E400}',
    '{"a": ' + "[" * 63 + "]" * 63 + "}",
]


@pytest.mark.parametrize("name", PARSERS)
@pytest.mark.parametrize("arguments", VALID_ARGUMENTS)
def test_valid_arguments_come_verbatim(name: str, arguments: str) -> None:
    json.loads(arguments)
    assert parse(name, wrapped(arguments)[name]) == ("", [("get_weather", arguments)])


@pytest.mark.parametrize("name", PARSERS)
@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (json.dumps(PARIS), PARIS),
        (json.dumps('{"a": "\ud83d"}'), r'{"a": "\ud83d"}'),
        ('""', "{}"),
        ("null", "{}"),
        ('{"code": "a\n\tb"}', r'{"code": "a\n\tb"}'),
    ],
    ids=["string", "string with half a surrogate", "empty string", "null", "raw line break"],
)
def test_forgiven_arguments(name: str, written: str, expected: str) -> None:
    assert parse(name, wrapped(written)[name]) == ("", [("get_weather", expected)])


def test_no_arguments_are_an_empty_object_where_a_tag_says_that_it_is_a_call() -> None:
    text = '{"name": "get_weather"}'
    assert parse("hermes", f"<tool_call>{text}</tool_call>") == ("", [("get_weather", "{}")])
    assert parse("llama3_json", text) == (text, [])


NO_CALLS = [
    ("hermes", "Use the <tool_call> tag, then </tool_call>."),
    ("hermes", '<tool_call>\n{"name": "unknown", "arguments": {}}\n</tool_call>'),
    ("hermes", '<tool_call>\n{"name": "get_wea'),
    ("hermes", "<tool_call>\n{'name': 'get_weather'}\n</tool_call>"),
    ("hermes", '<tool_call>{"arguments": {"a": 1}, "id": 5}</tool_call> and more'),
    ("hermes", '<tool_call>{"name": 5}</tool_call>'),
    ("hermes", '<tool_call>{"name": "get_\\ud83d"}</tool_call>'),
    ("hermes", "<tool_call></tool_call>"),
    ("hermes", "a <tool_cal"),
    ("hermes", '  {"name": "get_weather", "arguments": {}}  '),
    ("llama3_json", '{"name": "get_weather", "age": 5}'),
    ("llama3_json", '{"answer": 42}'),
    ("llama3_json", '<|python_tag|>print("hello")'),
    ("llama3_json", 'The object {"name": "get_weather", "parameters": {}} is a call.'),
    ("llama3_json", '{"name": "get_weather"'),
    ("mistral", "[TOOL_CALLS] []"),
    ("mistral", "[TOOL_CALLS]get_weather is what I would call"),
    ("mistral", "[TOOL_CALLS]get_weather_now{}"),
    ("mistral", "[TOOL_CALLS]get_weather[CALL_ID]x{}"),
    ("mistral", "[TOOL_CALLS]"),
    ("qwen3", "<tool_call>\n<function=unknown>\n</function>\n</tool_call>"),
    ("qwen3", "<tool_call>\n<function get_weather>"),
    ("qwen3", "<tool_call>text</tool_call>"),
    ("qwen3", "<function=get_weather"),
]


@pytest.mark.parametrize(("name", "text"), NO_CALLS)
def test_what_is_no_call_is_given_back_unchanged(name: str, text: str) -> None:
    assert parse(name, text) == (text, [])


BEGUN = '<tool_call>{"name": "get_weather", "arguments": '
CLOSED = [
    ("hermes", BEGUN, "", ""),
    ("hermes", BEGUN + '{"city": "Par', '{"city": "Par', ""),
    ("hermes", BEGUN + r'{"city": "\u00', '{"city": "', ""),
    ("hermes", BEGUN + '{"on": True}}</tool_call>', '{"on": ', "True}}"),
    ("hermes", BEGUN + '{"a": 01}', '{"a": 0', "1}"),
    ("hermes", BEGUN + '{"a": 1,}}', '{"a": 1,', "}}"),
    ("hermes", BEGUN + r'{"a": "\x"}}', '{"a": "', r'\x"}}'),
    ("hermes", BEGUN + "[1]}", "", "[1]}"),
    ("hermes", BEGUN + '{"a": NaN}}', '{"a": ', "NaN}}"),
    ("hermes", BEGUN + "[" * 3, "", "[[["),
    ("hermes", BEGUN + '{"a":' + "[" * 65, '{"a":' + "[" * 63, "[["),
    ("hermes", BEGUN + '{}, "arguments": {}}', "{}", "{}}"),
    ("llama3_json", '{"name": "get_weather", "parameters": {"a": 1]', '{"a": 1', "]"),
    ("mistral", '[TOOL_CALLS]get_weather{"a": tru', '{"a": tru', ""),
    ("mistral", '[TOOL_CALLS]get_weather{"a": trx', '{"a": tr', "x"),
    ("qwen3", "<function=get_weather><parameter=city>\nPar", '{"city": "Par', ""),
    (
        "qwen3",
        "<function=get_weather><parameter=city>\nParis\n</para",
        r'{"city": "Paris\n</para',
        "",
    ),
    ("qwen3", "<function=get_weather><parameter=days>\n3", '{"days": ', ""),
    ("qwen3", "<function=get_weather>oops</function>", "", "oops</function>"),
    (
        "qwen3",
        "<function=get_weather><parameter=city>a</parameter><parameter=city>b</parameter>",
        '{"city": "a"',
        "b</parameter>",
    ),
]


@pytest.mark.parametrize(("name", "text", "arguments", "content"), CLOSED)
def test_a_call_that_fails_midway_keeps_what_it_has(
    name: str, text: str, arguments: str, content: str
) -> None:
    assert parse(name, text) == (content, [("get_weather", arguments)])


def test_the_next_call_is_found_after_a_failed_one() -> None:
    whole = f'<tool_call>{{"name": "get_weather", "arguments": {PARIS}}}</tool_call>'
    for failed in ("<tool_call>{'name'", '<tool_call>{"name": "unknown", '):
        assert parse("hermes", failed + whole) == (failed, [("get_weather", PARIS)])
    begun = BEGUN + '{"city": '
    assert parse("hermes", begun + whole)[1] == [
        ("get_weather", '{"city": '),
        ("get_weather", PARIS),
    ]


SPACES = [
    ("\n\nHello \n", "\n\nHello \n", 0),
    (" \n", " \n", 0),
    ("", "", 0),
    ("\n{call}\n", "", 1),
    ("a\n{call}\n{call}\n", "a\n", 2),
    ("a\n{call}\n\nb\n{call}", "a\n\n\nb\n", 2),
]


@pytest.mark.parametrize(("text", "content", "num_calls"), SPACES)
def test_space_around_calls_is_dropped_and_other_text_is_not_touched(
    text: str, content: str, num_calls: int
) -> None:
    call = '<tool_call>\n{"name": "get-time_2", "arguments": {}}\n</tool_call>'
    text = text.replace("{call}", call)
    assert parse("hermes", text) == (content, [("get-time_2", "{}")] * num_calls)


def test_events_come_as_soon_as_they_are_certain() -> None:
    ids = iter(["first", "second"])
    parser = get_parser("hermes", TOOLS, make_id=lambda: next(ids))
    assert parser.feed("Look <tool") == [ContentDelta("Look ")]
    assert parser.feed("box> <tool_call>") == [ContentDelta("<toolbox> ")]
    assert parser.feed('{"name": "get_weather') == []
    assert parser.feed('"') == [ToolCallStart(0, "first", "get_weather")]
    assert parser.feed(', "arguments": ') == []
    assert parser.feed('{"city": "Pa') == [ToolCallArguments(0, '{"city": "Pa')]
    assert parser.feed('r\\"}"}') == [ToolCallArguments(0, 'r\\"}"}')]
    assert parser.feed("}</tool_call>") == []
    assert parser.feed(BEGUN) == [ToolCallStart(1, "second", "get_weather")]
    assert parser.feed("{") == [ToolCallArguments(1, "{")]
    assert parser.finish() == []


def test_strings_of_the_xml_form_are_streamed() -> None:
    parser = get_parser("qwen3", TOOLS, make_id=lambda: "id")
    assert parser.feed("<function=get_weather>") == [ToolCallStart(0, "id", "get_weather")]
    assert parser.feed("<parameter=city>\nNew") == [ToolCallArguments(0, '{"city": "New')]
    assert parser.feed('\n"York"\n</') == [ToolCallArguments(0, r"\n\"York\"")]
    assert parser.feed("parameter>") == [ToolCallArguments(0, '"')]
    assert parser.feed("<parameter=days>4") == [ToolCallArguments(0, ', "days": ')]
    assert parser.feed("2</parameter></function>") == [ToolCallArguments(0, "42}")]


def test_ids_are_random_and_as_the_format_wants_them() -> None:
    ids = []
    for name, text in (("hermes", wrapped("{}")["hermes"]), ("mistral", wrapped("{}")["mistral"])):
        for _ in range(2):
            (start, _) = get_parser(name, TOOLS).feed(text)
            assert isinstance(start, ToolCallStart)
            ids.append(start.id)
    assert len(set(ids)) == 4
    assert all(i.startswith("call_") and len(i) > 20 for i in ids[:2])
    assert all(len(i) == 9 and i.isalnum() and i.isascii() for i in ids[2:])


SCHEMA = {
    "type": "object",
    "$defs": {"Unit": {"enum": ["C", "F"]}, "Loop": {"anyOf": [{"$ref": "#/$defs/Loop"}] * 50}},
    "properties": {
        "text": {"type": "string"},
        "number": {"type": "number"},
        "flag": {"type": "boolean"},
        "list": {"type": "array"},
        "object": {"type": "object"},
        "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "several": {"type": ["integer", "null"]},
        "unit": {"$ref": "#/$defs/Unit"},
        "loop": {"$ref": "#/$defs/Loop"},
        "level": {"enum": [1, 2]},
    },
}
TYPED = [
    ("text", "5", '"5"'),
    ("text", "null", '"null"'),
    ("text", '{"a": 1}', r'"{\"a\": 1}"'),
    ("text", "", '""'),
    ("text", "\n a \n", r'"\n a \n"'),
    ("text", "</parameter", '"</parameter"'),
    ("number", "-1.5e3", "-1.5e3"),
    ("number", "about 5", '"about 5"'),
    ("number", "05", '"05"'),
    ("number", "Infinity", '"Infinity"'),
    ("flag", "True", "true"),
    ("flag", "false", "false"),
    ("list", '[1, {"a": "]"}]', '[1, {"a": "]"}]'),
    ("list", "[1, 2", '"[1, 2"'),
    ("list", "[" * 10_000, '"' + "[" * 10_000 + '"'),
    ("object", '{"a": {}}', '{"a": {}}'),
    ("object", "5", '"5"'),
    ("maybe", "null", "null"),
    ("maybe", "None", "null"),
    ("maybe", "5", '"5"'),
    ("several", "7", "7"),
    ("unit", "C", '"C"'),
    ("loop", "1", '"1"'),
    ("level", "2", "2"),
    ("not in the schema", "1", '"1"'),
]


@pytest.mark.parametrize(("key", "text", "expected"), TYPED)
def test_the_schema_types_values_of_the_xml_form(key: str, text: str, expected: str) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}]
    written = f"<tool_call>\n<function=f>\n<parameter={key}>\n{text}\n</parameter>\n</function>"
    assert parse("qwen3", written, tools) == ("", [("f", f'{{"{key}": {expected}}}')])


TEMPLATES = [
    ("{# #}<tool_call>\\n<function=example>", "qwen3"),
    ('within <tool_call></tool_call> XML tags: {"name": <function-name>}', "hermes"),
    ("{{ '[TOOL_CALLS] [' }}", "mistral"),
    ("{{- '<|python_tag|>' }}", "llama3_json"),
    ('<|start_header_id|> {"name": function name, "parameters": dictionary}', "llama3_json"),
    ("<|start_header_id|>{{ message.role }}<|end_header_id|>", None),
    ("<tool_call>{name}<arg_key>", None),
    ("<|im_start|>{{ message.role }}", None),
]


@pytest.mark.parametrize(("template", "name"), TEMPLATES)
def test_choose_parser(template: str, name: str | None) -> None:
    assert choose_parser(template) == name


def test_get_parser_refuses_an_unknown_name() -> None:
    with pytest.raises(ValueError, match=r"'pythonic'; known: hermes, llama3_json, mistral, qwen3"):
        get_parser("pythonic", TOOLS)


def test_only_mistrals_marks_are_asked_of_the_tokenizer() -> None:
    assert [name for name in PARSERS if needs_special_tokens(name)] == ["mistral"]
