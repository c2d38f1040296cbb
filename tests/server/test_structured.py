"""Answers of a form that the client asks for, from the random model, which would write anything."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jsonschema
import openai
import pydantic
import pytest
from server_on_a_thread import RunningServer, running_server

from jaxllm import AsyncEngine

MESSAGES: Any = [{"role": "user", "content": "How is the weather?"}]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"enum": [1, 2, 3]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": name, "parameters": PARAMETERS}}
    for name in ("weather", "tides")
]
SCHEMA: Any = {
    "type": "json_schema",
    "json_schema": {"name": "trip", "schema": PARAMETERS, "strict": True},
}


@pytest.fixture(scope="module")
def tool_server(make_engine: Callable[[], AsyncEngine]) -> Iterator[RunningServer]:
    with running_server(make_engine, tool_call_parser="hermes") as one:
        one.wait_started()
        yield one
        one.wait_idle()


@pytest.fixture(scope="module")
def client(tool_server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{tool_server.base_url}/v1", api_key="none", max_retries=0)


def ask(client: openai.OpenAI, **options: Any) -> Any:
    options = {"messages": MESSAGES, "max_tokens": 200, "temperature": 1.0, "seed": 1, **options}
    return client.chat.completions.create(model="tiny", **options)


def call_of(choice: Any) -> tuple[str, Any]:
    [call] = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    arguments = json.loads(call.function.arguments)
    jsonschema.validate(arguments, PARAMETERS)
    return call.function.name, arguments


def test_a_required_call_is_a_call(client: openai.OpenAI) -> None:
    options = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
    names = {call_of(choice)[0] for choice in ask(client, n=8, **options).choices}
    assert names == {"weather", "tides"}


def test_a_named_function_is_the_one_that_is_called(client: openai.OpenAI) -> None:
    choice = {"type": "function", "function": {"name": "tides"}}
    reply = ask(client, tools=TOOLS, tool_choice=choice, n=4)
    assert {call_of(one)[0] for one in reply.choices} == {"tides"}


@pytest.mark.parametrize("parser", ["llama3_json", "mistral", "qwen3"])
def test_a_required_call_in_every_format(
    make_engine: Callable[[], AsyncEngine], parser: str
) -> None:
    with running_server(make_engine, tool_call_parser=parser) as server:
        server.wait_started()
        client = openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0)
        options = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
        assert call_of(ask(client, **options).choices[0])[0] in ("weather", "tides")


def test_a_streamed_required_call_adds_up_to_the_same(client: openai.OpenAI) -> None:
    options = {"tools": TOOLS, "tool_choice": "required", "temperature": 0}
    [whole] = ask(client, **options).choices
    calls: dict[int, list[str]] = {}
    for chunk in ask(client, stream=True, **options):
        for call in chunk.choices[0].delta.tool_calls or []:
            calls.setdefault(call.index, [call.function.name, ""])[1] += call.function.arguments
    expected = [[c.function.name, c.function.arguments] for c in whole.message.tool_calls]
    assert list(calls.values()) == expected


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_json_of_a_schema(client: openai.OpenAI, api: str) -> None:
    if api == "chat":
        texts = [c.message.content for c in ask(client, n=4, response_format=SCHEMA).choices]
    else:
        reply = client.completions.create(
            model="tiny", prompt="x", n=4, max_tokens=200,
            extra_body={"response_format": SCHEMA},
        )  # fmt: skip
        texts = [choice.text for choice in reply.choices]
    for text in texts:
        jsonschema.validate(json.loads(text), PARAMETERS)


def test_the_client_parses_its_own_class(client: openai.OpenAI) -> None:
    class Trip(pydantic.BaseModel):
        city: Literal["Oslo", "Rome"]
        days: Literal[1, 2, 3]

    reply = client.chat.completions.parse(
        model="tiny", messages=MESSAGES, response_format=Trip, max_tokens=200
    )
    assert reply.choices[0].message.parsed is not None
    response = client.responses.parse(
        model="tiny", input="x", text_format=Trip, max_output_tokens=200
    )
    assert response.output_parsed is not None
    assert response.text.format.name == "Trip"  # type: ignore[union-attr]


def test_vllms_field(client: openai.OpenAI) -> None:
    def answer(**form: Any) -> str:
        found: str = ask(client, extra_body={"structured_outputs": form}).choices[0].message.content
        return found

    assert answer(choice=["red", "green"]) in ("red", "green")
    assert answer(regex="[0-9]{4}").isdecimal()
    assert isinstance(json.loads(answer(json=PARAMETERS)), dict)
    assert answer(grammar='start: "a" "b"') == "ab"


@pytest.mark.parametrize(
    ("options", "param", "says"),
    [
        ({"response_format": {"type": "xml"}}, "response_format", "json_object"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {
                "type": "object", "dependentSchemas": {}}}}},
            "response_format", "dependentSchemas",
        ),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs", "regex"),
        ({"structured_outputs": {}}, "structured_outputs", "needs one of"),
        ({"structured_outputs": {"xml": "a"}}, "structured_outputs", "xml"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
         "structured_outputs", "give one"),
        ({"structured_outputs": {"regex": "a"}, "min_tokens": 3}, "min_tokens", "combined"),
        ({"structured_outputs": {"regex": "a"}, "tools": TOOLS}, "structured_outputs", "tools"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {
                "type": "object", "dependentSchemas": {}}}}], "tool_choice": "required"},
            "tools", "dependentSchemas",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_named(
    client: openai.OpenAI, options: dict[str, Any], param: str, says: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=says) as refused:
        ask(client, extra_body=options)
    assert refused.value.param is not None
    assert refused.value.param.startswith(param)
