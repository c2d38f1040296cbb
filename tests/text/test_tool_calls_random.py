"""Tool call parsers on random calls, random cuts, random noise, and a lot of text."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.text.tool_calls import (
    PARSERS,
    ContentDelta,
    Event,
    ToolCallArguments,
    ToolCallStart,
    get_parser,
)

# Every property is typed, since the XML form itself has no types.
PROPERTIES = {
    "text": st.text(max_size=20),
    "number": st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    "flag": st.booleans(),
    "list": st.lists(st.integers() | st.text(st.sampled_from('"\\]}<'), max_size=4), max_size=4),
    "object": st.dictionaries(st.text(max_size=4), st.none() | st.text(max_size=4), max_size=3),
}
TYPES = {"text": "string", "flag": "boolean", "list": "array"}
SCHEMA = {"properties": {name: {"type": TYPES.get(name, name)} for name in PROPERTIES}}
NAMES = ["search", "search_more", "a-b"]
TOOLS = [{"type": "function", "function": {"name": name, "parameters": SCHEMA}} for name in NAMES]
Call = tuple[str, dict[str, Any]]
calls = st.lists(
    st.tuples(st.sampled_from(NAMES), st.fixed_dictionaries({}, optional=PROPERTIES)),
    min_size=1,
    max_size=3,
)


def as_json(call: Call, key: str = "arguments", indent: int | None = None) -> str:
    return json.dumps({"name": call[0], key: call[1]}, indent=indent)


def as_xml(call: Call) -> str:
    lines = ["<tool_call>", f"<function={call[0]}>"]
    for key, value in call[1].items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        lines += [f"<parameter={key}>", text, "</parameter>"]
    return "\n".join([*lines, "</function>", "</tool_call>"])


RENDER: dict[str, tuple[str, Callable[[list[Call]], str]]] = {
    "hermes": (
        "hermes",
        lambda calls: "\n".join(f"<tool_call>\n{as_json(c)}\n</tool_call>" for c in calls),
    ),
    "llama": ("llama3_json", lambda calls: "; ".join(as_json(c, "parameters", 2) for c in calls)),
    "mistral list": (
        "mistral",
        lambda calls: f"[TOOL_CALLS] [{', '.join(map(as_json, calls))}]",
    ),
    "mistral names": (
        "mistral",
        lambda calls: "".join(f"[TOOL_CALLS]{n}[ARGS]{json.dumps(a)}" for n, a in calls),
    ),
    "qwen3": ("qwen3", lambda calls: "\n".join(map(as_xml, calls))),
}


def collect(events: list[Event]) -> tuple[str, list[list[str]]]:
    content, found = "", list[list[str]]()
    for event in events:
        if isinstance(event, ContentDelta):
            content += event.text
        elif isinstance(event, ToolCallStart):
            found.append([event.name, ""])
        else:
            assert isinstance(event, ToolCallArguments)
            found[event.index][1] += event.delta
    return content, found


def parse(name: str, pieces: list[str]) -> tuple[str, list[list[str]]]:
    parser = get_parser(name, TOOLS)
    events = [event for piece in pieces for event in parser.feed(piece)]
    return collect(events + parser.finish())


def cut(text: str, places: list[int]) -> list[str]:
    ends = sorted({place % (len(text) + 1) for place in places})
    return [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]


@pytest.mark.parametrize("form", RENDER)
@settings(max_examples=50, deadline=None)
@given(calls=calls, places=st.lists(st.integers(0, 10**6), max_size=12))
def test_rendered_calls_come_back(form: str, calls: list[Call], places: list[int]) -> None:
    name, render = RENDER[form]
    text = render(calls)
    content, found = parse(name, cut(text, places))
    assert content == ""
    assert [(name, json.loads(arguments)) for name, arguments in found] == calls


FRAGMENTS = [
    "<tool_call>", "</tool_call>", "<function=search>", "</function>", "<parameter=text>",
    "<parameter=list>", "</parameter>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>",
    '{"name": "search"', '"arguments": {', '"parameters": ', "search", '"name"', '{"text": "a"}',
    "{", "}", "[", "]", ",", ":", ";", '"', "\\", "\\u00e9", "1", "-", ".5", "e", "true", "nul",
    " ", "\n", "a", "é", "<", "</", "\x00",
]  # fmt: skip
noise = st.lists(st.sampled_from(FRAGMENTS), max_size=25).map("".join)


@pytest.mark.parametrize("name", PARSERS)
@settings(max_examples=100, deadline=None)
@given(text=noise, places=st.lists(st.integers(0, 10**6), max_size=8))
def test_where_noise_is_cut_does_not_matter(name: str, text: str, places: list[int]) -> None:
    whole = parse(name, [text])
    assert parse(name, list(text)) == whole
    assert parse(name, cut(text, places)) == whole
    if not whole[1]:
        assert whole[0] == text


@pytest.mark.parametrize("form", RENDER)
@settings(max_examples=40, deadline=None)
@given(calls=calls, end=st.integers(0, 10**6))
def test_a_truncated_call_has_the_start_of_its_arguments(
    form: str, calls: list[Call], end: int
) -> None:
    name, render = RENDER[form]
    text = render(calls)
    whole = parse(name, [text])[1]
    _, found = parse(name, [text[: end % len(text)]])
    assert len(found) <= len(whole)
    if not found:
        return
    *before, last = found
    assert before == whole[: len(before)]
    assert last[0] == whole[len(before)][0]
    if form != "qwen3":  # there, what stands of a value's end tag may be its text
        assert whole[len(before)][1].startswith(last[1])


OBJECT = '{"name": "search", "arguments": '
ADVERSARIAL = {
    "openings cut short": "<tool_call" * 100_000,
    "openings": "<tool_call>" * 90_000,
    "openings and objects": '<tool_call>{"' * 80_000,
    "openings in strings": '<tool_call>{"a": "' * 28_000,
    "unknown names": '<tool_call>{"name": "x", ' * 20_000,
    "calls without end": ("<tool_call>" + OBJECT) * 11_000,
    "brackets": "<tool_call>" + OBJECT + "[" * 10**6,
    "a long string": "<tool_call>" + OBJECT + '{"a": "' + "x\\n\n" * 80_000,
    "a long name": '<tool_call>{"name": "' + "x" * 10**6,
    "a long number": "<tool_call>" + OBJECT + '{"a": ' + "1" * 10**6,
    "arguments first": '<tool_call>{"arguments": {"a": "' + "x" * 10**6,
    "space": " " * 10**6,
    "space after a tag": "<tool_call>" + " " * 10**6,
    "mistral tags": "[TOOL_CALLS]" * 80_000,
    "mistral lists": "[TOOL_CALLS] [{" * 60_000,
    "python tags": "<|python_tag|>" * 70_000,
    "separators": OBJECT + "{}}" + ";" * 10**6,
    "llama calls": (OBJECT + "{}};") * 25_000,
    "functions": "<function=search>" * 55_000,
    "parameters": "<function=search>" + "<parameter=list>" * 60_000,
    "end tags cut short": "<function=search><parameter=text>" + "\n</parameter" * 80_000,
    "values": "<function=search>" + "".join(f"<parameter={i}>1</parameter>" for i in range(30_000)),
}


@pytest.mark.parametrize("case", ADVERSARIAL)
def test_much_adversarial_text_takes_linear_time(case: str) -> None:
    text = ADVERSARIAL[case]
    start = time.perf_counter()
    for size, name in zip((len(text), 1000, 50, len(text)), PARSERS, strict=True):
        parse(name, [text[i : i + size] for i in range(0, len(text), size)])
    # About a second; a quadratic loop over characters would take hours.
    assert time.perf_counter() - start < 20
