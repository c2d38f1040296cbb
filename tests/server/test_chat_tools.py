"""Reasoning and tool calls over HTTP: what a scripted model writes, and what the client gets."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from scripted_chat import ScriptedChat
from server_on_a_thread import RunningServer, running_server

from jaxllm import AsyncEngine

TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather of a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
MESSAGES: Any = [{"role": "user", "content": "How is the weather?"}]


@pytest.fixture(scope="module")
def tool_server(make_engine: Callable[[], AsyncEngine]) -> Iterator[RunningServer]:
    with running_server(make_engine, tool_call_parser="hermes", reasoning_parser="think") as one:
        one.wait_started()
        yield one


@pytest.fixture
def client(tool_server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{tool_server.base_url}/v1", api_key="none", max_retries=0)


def ask(client: openai.OpenAI, **options: Any) -> Any:
    options = {"messages": MESSAGES, "tools": TOOLS, **options}
    return client.chat.completions.create(model="tiny", **options)


def test_reasoning_content_and_calls_are_told_apart(
    client: openai.OpenAI, script: ScriptedChat
) -> None:
    [choice] = ask(client).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.reasoning == "Which city?"
    assert choice.message.content.strip() == "Let me look."
    calls = choice.message.tool_calls
    assert [call.function.name for call in calls] == ["weather", "weather"]
    assert [json.loads(call.function.arguments)["city"] for call in calls] == ["Oslo", "Rome"]
    assert len({call.id for call in calls}) == 2
    assert script.seen["tools"][0]["function"]["name"] == "weather"


def test_a_stream_adds_up_to_the_same(client: openai.OpenAI, script: ScriptedChat) -> None:
    reasoning, content, calls, reasons = "", "", {}, []
    for chunk in ask(client, stream=True):
        [choice] = chunk.choices
        reasons.append(choice.finish_reason)
        reasoning += getattr(choice.delta, "reasoning", None) or ""
        content += choice.delta.content or ""
        for call in choice.delta.tool_calls or []:
            if call.id:
                assert call.index == len(calls)
                calls[call.index] = [call.function.name, ""]
            calls[call.index][1] += call.function.arguments
    assert reasoning == "Which city?"
    assert content.strip() == "Let me look."
    found = [(name, json.loads(arguments)) for name, arguments in calls.values()]
    assert found == [("weather", {"city": "Oslo"}), ("weather", {"city": "Rome"})]
    assert reasons[-1] == "tool_calls"
    assert set(reasons[:-1]) == {None}


@pytest.mark.parametrize("stream", [False, True])
def test_without_parallel_calls_only_the_first_counts(
    client: openai.OpenAI, script: ScriptedChat, stream: bool
) -> None:
    reply = ask(client, parallel_tool_calls=False, stream=stream)
    parts = [c.choices[0].delta for c in reply] if stream else [reply.choices[0].message]
    calls = [call for part in parts for call in part.tool_calls or []]
    assert "Oslo" in "".join(call.function.arguments for call in calls)
    assert "Rome" not in "".join(call.function.arguments for call in calls)


def test_with_choice_none_there_are_no_tools(client: openai.OpenAI, script: ScriptedChat) -> None:
    [choice] = ask(client, tool_choice="none").choices
    assert choice.message.tool_calls is None
    assert "<tool_call>" in choice.message.content
    assert choice.finish_reason == "stop"
    assert script.seen["tools"] is None


def test_results_of_calls_go_back_as_templates_read_them(
    client: openai.OpenAI, script: ScriptedChat
) -> None:
    first = ask(client).choices[0].message
    result = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "rain"}
    ask(client, messages=[*MESSAGES, first.model_dump(), result])
    _, assistant, tool = script.seen["messages"]
    assert assistant["tool_calls"][0]["function"] == {
        "name": "weather", "arguments": {"city": "Oslo"},
    }  # fmt: skip
    assert assistant["reasoning_content"] == "Which city?"
    assert (tool["role"], tool["content"]) == ("tool", "rain")


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "bad name"}}]}, "tools"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools"),
        ({"tools": ["weather"]}, "tools"),
        ({"tools": ["weather"], "tool_choice": "none"}, "tools"),
        ({"tools": [], "parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"tool_choice": "always"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "rain"}}}, "tool_choice"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [], "tool_choice": "auto"}, "tool_choice"),
    ],
)
def test_bad_tools_are_named(
    client: openai.OpenAI, script: ScriptedChat, options: Any, param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, **options)
    assert refused.value.param == param


def test_arguments_that_are_no_object_are_named(
    client: openai.OpenAI, script: ScriptedChat
) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "[1]"}}
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, messages=[*MESSAGES, {"role": "assistant", "tool_calls": [call]}])
    assert refused.value.param == "messages.1.tool_calls.0.function.arguments"
