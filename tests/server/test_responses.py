"""/v1/responses with the official client: the chat route's text, as items and events."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
import requests
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter
from scripted_chat import TEXT, ScriptedChat
from server_on_a_thread import RunningServer, running_server

from jaxllm import AsyncEngine

INPUT = "Hello"
GREEDY: Any = {"temperature": 0, "max_output_tokens": 12, "extra_body": {"ignore_eos": True}}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS: Any = [
    {
        "type": "function",
        "name": "weather",
        "description": "Weather of a city",
        "parameters": PARAMETERS,
        "strict": False,
    }
]
EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
VARYING = ("id", "created_at", "completed_at", "call_id")


@pytest.fixture(scope="module")
def client(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def chat_text(client: openai.OpenAI) -> str:
    """What the chat route answers to the same."""
    return ask_chat(client, [{"role": "user", "content": INPUT}])


def ask_chat(client: openai.OpenAI, messages: Any, max_tokens: int = 12) -> str:
    answer = client.chat.completions.create(
        model="tiny",
        messages=messages,
        temperature=0,
        max_tokens=max_tokens,
        extra_body={"ignore_eos": True},
    )
    return answer.choices[0].message.content or ""


def ask(client: openai.OpenAI, **options: Any) -> Any:
    return client.responses.create(**{"model": "tiny", "input": INPUT, **options})


def plain(value: Any) -> Any:
    """Without what differs from one response to the next."""
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items() if key not in VARYING}
    return [plain(one) for one in value] if isinstance(value, list) else value


def checked_events(events: Any) -> list[dict[str, Any]]:
    """The events of a stream: each valid, numbered from 0, placed in the item that is open."""
    found = [one.to_dict(mode="json") for one in events]
    open_item: Any = None
    num_items = 0
    for number, one in enumerate(found):
        EVENTS.validate_python(one)
        assert one["sequence_number"] == number
        if one["type"] == "response.output_item.added":
            assert open_item is None
            assert one["output_index"] == num_items
            open_item = one["item"]
        elif "item_id" in one:
            assert (one["item_id"], one["output_index"]) == (open_item["id"], num_items)
            assert one.get("content_index", 0) == 0
        elif one["type"] == "response.output_item.done":
            assert one["item"]["id"] == open_item["id"]
            assert one["output_index"] == num_items
            open_item, num_items = None, num_items + 1
    assert open_item is None
    return found


def kinds(events: list[dict[str, Any]]) -> list[str]:
    """Types of events without their common prefix, a run of equal ones told once."""
    names = [one["type"].removeprefix("response.") for one in events]
    return [name for i, name in enumerate(names) if i == 0 or name != names[i - 1]]


MESSAGE_KINDS = [
    "output_item.added",
    "content_part.added",
    "output_text.delta",
    "output_text.done",
    "content_part.done",
    "output_item.done",
]


def test_a_greedy_answer_is_the_chat_routes(client: openai.OpenAI, chat_text: str) -> None:
    answer = ask(client, **GREEDY, metadata={"a": "b"}, user="someone")
    Response.model_validate(answer.to_dict())  # the client itself checks nothing
    assert answer.output_text == chat_text
    assert (answer.object, answer.model, answer.id[:5]) == ("response", "tiny", "resp_")
    assert (answer.store, answer.metadata, answer.user) == (False, {"a": "b"}, "someone")
    assert (answer.temperature, answer.top_p, answer.max_output_tokens) == (0, 1, 12)
    [message] = answer.output
    assert (message.type, message.role, message.content[0].annotations) == (
        "message", "assistant", [],
    )  # fmt: skip


def test_an_answer_that_is_cut_off_is_incomplete(client: openai.OpenAI) -> None:
    answer = ask(client, **GREEDY)
    assert (answer.status, answer.output[0].status) == ("incomplete", "incomplete")
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.completed_at is None
    events = checked_events(ask(client, **GREEDY, stream=True))
    assert events[-1]["type"] == "response.incomplete"
    assert plain(events[-1]["response"]) == plain(answer.to_dict(mode="json"))


def test_an_answer_that_ends_by_itself_is_completed(client: openai.OpenAI, chat_text: str) -> None:
    stop = chat_text[5:7]
    options = {**GREEDY, "extra_body": {"ignore_eos": True, "stop": stop}}
    answer = ask(client, **options)
    assert (answer.status, answer.output[0].status) == ("completed", "completed")
    assert answer.output_text == chat_text[: chat_text.index(stop)]
    assert answer.incomplete_details is None
    assert answer.completed_at >= answer.created_at


def test_a_stream_has_the_events_and_adds_up_to_the_same(
    client: openai.OpenAI, chat_text: str
) -> None:
    events = checked_events(ask(client, **GREEDY, stream=True))
    assert kinds(events) == ["created", "in_progress", *MESSAGE_KINDS, "incomplete"]
    deltas = [one["delta"] for one in events if one["type"] == "response.output_text.delta"]
    assert len(deltas) > 3
    assert "".join(deltas) == chat_text
    begun = events[0]["response"]
    assert (begun["status"], begun["output"], begun["usage"]) == ("in_progress", [], None)
    assert {one["response"]["id"] for one in events if "response" in one} == {begun["id"]}
    done = {one["type"]: one for one in events}
    assert done["response.output_text.done"]["text"] == chat_text
    assert done["response.content_part.done"]["part"]["text"] == chat_text
    assert [done["response.output_item.done"]["item"]] == events[-1]["response"]["output"]


def test_the_clients_stream_helper_accumulates(client: openai.OpenAI, chat_text: str) -> None:
    stop = chat_text[5:7]
    extra = {"ignore_eos": True, "stop": stop}
    with client.responses.stream(
        model="tiny", input=INPUT, temperature=0, max_output_tokens=12, extra_body=extra
    ) as stream:
        snapshots = [one.snapshot for one in stream if one.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert snapshots[-1] == final.output_text == chat_text[: chat_text.index(stop)]
    whole = ask(client, temperature=0, max_output_tokens=12, extra_body=extra)
    without_parsed = json.loads(final.to_json())
    del without_parsed["output"][0]["content"][0]["parsed"]
    assert plain(without_parsed) == plain(whole.to_dict(mode="json"))


def test_on_the_wire_each_event_is_named_by_its_type(server: RunningServer) -> None:
    body = {"input": INPUT, "max_output_tokens": 3, "stream": True}
    with requests.post(f"{server.base_url}/v1/responses", json=body, timeout=30) as reply:
        assert reply.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        blocks = reply.content.decode().split("\n\n")
    assert blocks.pop() == ""
    for block in blocks:
        name, data = block.split("\n")
        assert name == "event: " + json.loads(data.removeprefix("data: "))["type"]
    assert len(blocks) >= 9  # and no [DONE], which would be no JSON


def test_instructions_come_before_the_input(client: openai.OpenAI) -> None:
    told = ask(client, instructions="Be brief.", **GREEDY)
    system = {"role": "system", "content": "Be brief."}
    user = {"role": "user", "content": INPUT}
    assert told.output_text == ask_chat(client, [system, user])
    assert told.instructions == "Be brief."
    assert told.output_text != ask(client, **GREEDY).output_text


def test_a_conversation_goes_on_from_output_items(client: openai.OpenAI, chat_text: str) -> None:
    items: list[Any] = [
        {"role": "developer", "content": [{"type": "input_text", "text": "Short."}]},
        {"type": "message", "role": "user", "content": INPUT},
    ]
    first = ask(client, input=items, **GREEDY)
    items += [*first.output, {"role": "user", "content": [{"type": "input_text", "text": "So?"}]}]
    second = ask(client, input=items, **GREEDY)
    messages = [{"role": "system", "content": "Short."}, {"role": "user", "content": INPUT}]
    assert first.output_text == ask_chat(client, messages)
    messages += [{"role": "assistant", "content": first.output_text}]
    assert second.output_text == ask_chat(client, [*messages, {"role": "user", "content": "So?"}])


def test_usage_tells_of_cached_and_written_tokens(client: openai.OpenAI) -> None:
    options: Any = {"input": "responses with the same beginning " * 4, "max_output_tokens": 2}
    first = ask(client, **options).usage
    again = ask(client, **options).usage
    assert first.input_tokens_details.cached_tokens == 0
    assert 0 < first.input_tokens_details.cache_write_tokens <= first.input_tokens
    cached = again.input_tokens_details.cached_tokens
    assert again.input_tokens - 17 <= cached < again.input_tokens
    assert again.input_tokens_details.cache_write_tokens < 16
    assert (again.output_tokens, again.output_tokens_details.reasoning_tokens) == (2, 0)
    assert again.total_tokens == again.input_tokens + 2


def test_logprobs_are_those_of_the_chat_route(client: openai.OpenAI) -> None:
    wanted = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": INPUT}],
        logprobs=True,
        top_logprobs=2,
        temperature=0,
        max_tokens=12,
        extra_body={"ignore_eos": True},
    ).choices[0]
    assert wanted.logprobs is not None
    expected = [one.to_dict() for one in wanted.logprobs.content or []]
    options: Any = {"include": ["message.output_text.logprobs"], "top_logprobs": 2, **GREEDY}
    whole = ask(client, **options)
    assert [one.to_dict() for one in whole.output[0].content[0].logprobs] == expected
    events = checked_events(ask(client, stream=True, **options))
    deltas = [one for one in events if one["type"] == "response.output_text.delta"]
    assert [entry for one in deltas for entry in one["logprobs"]] == expected
    assert plain(events[-1]["response"]) == plain(whole.to_dict(mode="json"))
    assert ask(client, **GREEDY).output[0].content[0].logprobs == []


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_ends_a_response_with_what_it_has(
    client: openai.OpenAI, server: RunningServer, stream: bool
) -> None:
    extra = {"timeout": 0.03, "ignore_eos": True}
    reply = ask(client, max_output_tokens=200, stream=stream, extra_body=extra)
    answer = list(reply)[-1].response if stream else reply
    assert answer.status == "incomplete"
    assert answer.incomplete_details.reason == "timeout"
    assert answer.usage.output_tokens < 200
    server.wait_idle()


IMAGE = {"type": "input_image", "image_url": "data:"}
FUNCTION = {"type": "function", "name": "f"}


@pytest.mark.parametrize(
    ("field", "value", "says", "param"),
    [
        ("temperature", 3.0, "temperature", "temperature"),
        ("n", 2, "not supported", "n"),
        ("max_output_tokens", 0, "max_output_tokens", "max_output_tokens"),
        ("max_tokens", 5, "unknown field", "max_tokens"),
        ("prompt_logprobs", 1, "not supported", "prompt_logprobs"),
        ("store", True, "not supported", "store"),
        ("previous_response_id", "resp_1", "not supported", "previous_response_id"),
        ("conversation", "conv_1", "not supported", "conversation"),
        ("background", True, "not supported", "background"),
        ("prompt", {"id": "p"}, "not supported", "prompt"),
        ("truncation", "auto", "not supported", "truncation"),
        ("service_tier", "flex", "not supported", "service_tier"),
        ("include", ["reasoning.encrypted_content"], "logprobs", "include.0"),
        ("top_logprobs", 2, "include", "top_logprobs"),
        ("top_logprobs", 21, "20", "top_logprobs"),
        ("reasoning", {"effort": "low"}, "not supported", "reasoning.effort"),
        ("text", {"format": {"type": "xml"}}, "json_object", "text.format"),
        ("text", {"verbosity": "low"}, "not supported", "text.verbosity"),
        ("stream_options", {"include_obfuscation": False}, "stream", "stream_options"),
        ("metadata", {"a" * 65: "b"}, "64", "metadata"),
        ("unknown_thing", 1, "unknown field", "unknown_thing"),
        ("input", [], "at least 1", "input"),
        ("input", "a" * 5000, "max_model_len", "input"),
        ("input", [{"role": "robot", "content": "x"}], "assistant", "input.0.role"),
        ("input", [{"role": "user"}], "missing", "input.0.content"),
        ("input", [{"role": "user", "content": [IMAGE]}], "text", "input.0.content.0"),
        ("input", [{"type": "item_reference", "id": "x"}], "type must be", "input.0"),
        ("input", [{"role": "user", "content": "x", "mood": 1}], "unknown", "input.0.mood"),
        ("tools", [FUNCTION], "not supported", "tools"),
        ("tools", [{"type": "web_search"}], "function", "tools.0.type"),
        ("tool_choice", "required", "needs tools", "tool_choice"),
        ("tool_choice", {"type": "web_search"}, "function", "tool_choice"),
    ],
)
def test_what_is_not_supported_is_refused_and_named(
    client: openai.OpenAI, field: str, value: Any, says: str, param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, extra_body={field: value})
    error: Any = refused.value.body
    assert says in error["message"]
    assert error["type"] == "invalid_request_error"
    assert error["param"].startswith(param)


def test_values_that_ask_for_nothing_are_taken(client: openai.OpenAI, chat_text: str) -> None:
    neutral: Any = {
        "store": False, "truncation": "disabled", "background": False, "service_tier": "auto",
        "text": {"format": {"type": "text"}, "verbosity": "medium"}, "tools": [], "include": [],
        "tool_choice": "auto", "reasoning": {"effort": None}, "parallel_tool_calls": True,
        "previous_response_id": None, "prompt_cache_key": "k", "safety_identifier": "s",
    }  # fmt: skip
    assert ask(client, **neutral, **GREEDY).output_text == chat_text


def test_another_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        ask(client, model="gpt-5")
    assert refused.value.code == "model_not_found"


@pytest.fixture(scope="module")
def tool_server(make_engine: Callable[[], AsyncEngine]) -> Iterator[RunningServer]:
    options: Any = {"tool_call_parser": "hermes", "reasoning_parser": "think"}
    with running_server(make_engine, keep_alive_seconds=0.1, **options) as one:
        one.wait_started()
        yield one


@pytest.fixture
def scripted(tool_server: RunningServer, script: ScriptedChat) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{tool_server.base_url}/v1", api_key="none", max_retries=0)


def test_reasoning_text_and_calls_are_items(scripted: openai.OpenAI, script: ScriptedChat) -> None:
    answer = ask(scripted, tools=TOOLS)
    Response.model_validate(answer.to_dict())
    reasoning, message, *calls = answer.output
    assert (reasoning.type, reasoning.content[0].type) == ("reasoning", "reasoning_text")
    assert (reasoning.summary, reasoning.content[0].text) == ([], "Which city?")
    assert message.content[0].text.strip() == "Let me look."
    assert [(call.type, call.name, call.status) for call in calls] == [
        ("function_call", "weather", "completed")
    ] * 2
    assert [json.loads(call.arguments)["city"] for call in calls] == ["Oslo", "Rome"]
    assert len({one.id for one in answer.output} | {call.call_id for call in calls}) == 6
    assert answer.status == "completed"
    assert answer.tools[0].parameters == PARAMETERS
    assert (answer.tool_choice, answer.parallel_tool_calls) == ("auto", True)
    assert script.seen["tools"][0]["function"]["name"] == "weather"
    assert answer.usage.output_tokens == len(TEXT)


def test_a_stream_of_items_adds_up_to_the_same(
    scripted: openai.OpenAI, script: ScriptedChat
) -> None:
    whole = ask(scripted, tools=TOOLS)
    events = checked_events(ask(scripted, tools=TOOLS, stream=True))
    call_kinds = [
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
    ]
    reasoning_kinds = [kind.replace("output_text", "reasoning_text") for kind in MESSAGE_KINDS]
    assert kinds(events) == [
        "created", "in_progress", *reasoning_kinds, *MESSAGE_KINDS, *call_kinds, *call_kinds,
        "completed",
    ]  # fmt: skip
    assert plain(events[-1]["response"]) == plain(whole.to_dict(mode="json"))
    assert plain([one["item"] for one in events if one["type"] == "response.output_item.done"]) == (
        plain(whole.to_dict(mode="json")["output"])
    )
    with scripted.responses.stream(model="tiny", input=INPUT, tools=TOOLS) as stream:
        arguments = [e.arguments for e in stream if e.type.endswith("arguments.done")]
        final = stream.get_final_response()
    assert arguments == [one.arguments for one in whole.output[2:]]
    assert [one.type for one in final.output] == [one.type for one in whole.output]


def test_reasoning_tokens_are_counted(
    scripted: openai.OpenAI, script: ScriptedChat, tool_server: RunningServer
) -> None:
    encode = tool_server.engine.get_tokenizer().encode
    expected = len(encode("Which city?", add_special_tokens=False))
    assert expected > 3
    for stream in (False, True):
        reply = ask(scripted, stream=stream)
        answer = list(reply)[-1].response if stream else reply
        assert answer.usage.output_tokens_details.reasoning_tokens == expected


def test_what_was_being_written_when_it_was_cut_off_is_incomplete(
    scripted: openai.OpenAI, script: ScriptedChat
) -> None:
    script.text, script.finish_reason = TEXT[: TEXT.index("look")], "length"
    answer = ask(scripted, tools=TOOLS)
    assert [one.status for one in answer.output] == ["completed", "incomplete"]
    script.text = TEXT[: TEXT.index(" city")]
    answer = ask(scripted, tools=TOOLS)
    assert [(one.type, one.status) for one in answer.output] == [("reasoning", "incomplete")]
    assert answer.output_text == ""


def test_an_empty_answer_is_an_empty_message(scripted: openai.OpenAI, script: ScriptedChat) -> None:
    script.text = ""
    answer = ask(scripted)
    assert (answer.status, [one.type for one in answer.output]) == ("completed", ["message"])
    assert answer.output[0].content[0].text == ""
    events = checked_events(ask(scripted, stream=True))
    assert kinds(events)[2:-1] == [kind for kind in MESSAGE_KINDS if kind != "output_text.delta"]


def test_without_parallel_calls_only_the_first_counts(
    scripted: openai.OpenAI, script: ScriptedChat
) -> None:
    options: Any = {"tools": TOOLS, "parallel_tool_calls": False}
    whole = ask(scripted, **options)
    calls = [one for one in whole.output if one.type == "function_call"]
    assert [json.loads(call.arguments)["city"] for call in calls] == ["Oslo"]
    assert whole.parallel_tool_calls is False
    events = checked_events(ask(scripted, stream=True, **options))
    assert plain(events[-1]["response"]) == plain(whole.to_dict(mode="json"))


def test_with_choice_none_there_are_no_calls(scripted: openai.OpenAI, script: ScriptedChat) -> None:
    answer = ask(scripted, tools=TOOLS, tool_choice="none")
    assert [one.type for one in answer.output] == ["reasoning", "message"]
    assert "<tool_call>" in answer.output_text
    assert answer.tool_choice == "none"
    assert script.seen["tools"] is None


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}])
def test_a_forced_call_constrains_the_answer(
    scripted: openai.OpenAI, script: ScriptedChat, choice: Any
) -> None:
    answer = ask(scripted, tools=TOOLS, tool_choice=choice)
    assert script.seen["params"].structured_outputs is not None
    told = answer.tool_choice
    assert (told if isinstance(told, str) else told.to_dict()) == choice
    assert answer.output[2].type == "function_call"
    ask(scripted, tools=TOOLS)
    assert script.seen["params"].structured_outputs is None


def test_output_items_and_results_go_back_as_templates_read_them(
    scripted: openai.OpenAI, script: ScriptedChat
) -> None:
    items: list[Any] = [{"role": "user", "content": "How is the weather?"}]
    answer = ask(scripted, input=items, tools=TOOLS)
    calls = answer.output[2:]
    items += answer.output
    items += [
        {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
        for call in calls
    ]
    ask(scripted, input=[*items, *answer.output], tools=TOOLS)
    _, assistant, *results, again = script.seen["messages"]
    assert assistant["reasoning_content"] == "Which city?"
    assert assistant["content"].strip() == "Let me look."
    assert [call["function"] for call in assistant["tool_calls"]] == [
        {"name": "weather", "arguments": {"city": city}} for city in ("Oslo", "Rome")
    ]
    assert results == [
        {"role": "tool", "tool_call_id": call.call_id, "content": "rain"} for call in calls
    ]
    assert again == assistant


@pytest.mark.parametrize(
    ("options", "param", "says"),
    [
        ({"tools": [{**FUNCTION, "name": "bad name"}]}, "tools", "tools[0].name must"),
        ({"tools": [FUNCTION, FUNCTION]}, "tools", "tools[1].name 'f' is taken"),
        ({"tools": [{**FUNCTION, "parameters": {"type": "string"}}]}, "tools", "[0].parameters"),
        ({"tools": [{**FUNCTION, "defer_loading": True}]}, "tools.0.defer_loading", "unknown"),
        ({"tool_choice": "always"}, "tool_choice", "required"),
        ({"include": ["message.output_text.logprobs"]}, "include", "reasoning"),
        (
            {"input": [{**FUNCTION, "type": "function_call", "call_id": "c", "arguments": "[1]"}]},
            "input.0.arguments",
            "JSON object",
        ),
    ],
)
def test_bad_tools_and_calls_are_named(
    scripted: openai.OpenAI, options: Any, param: str, says: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(scripted, **{"tools": TOOLS, **options})
    assert refused.value.param == param
    assert says in refused.value.message


def test_a_stream_that_fails_half_way_ends_with_a_failed_response(
    scripted: openai.OpenAI, script: ScriptedChat
) -> None:
    script.text, script.raises_after = "The weather is nice today.", 3
    events = [one.to_dict() for one in ask(scripted, stream=True)]
    for number, one in enumerate(events):
        EVENTS.validate_python(one)
        assert one["sequence_number"] == number
    *_, error, failed = events
    assert (error["type"], failed["type"]) == ("error", "response.failed")
    assert (error["message"], error["code"]) == ("internal error", "server_error")
    response = failed["response"]
    assert (response["status"], response["error"]["code"]) == ("failed", "server_error")
    assert response["output"][0]["content"][0]["text"] == "The weath"
    assert response["output"][0]["status"] == "incomplete"
    assert "secret" not in json.dumps(events)


def test_a_stream_that_fails_while_it_waits_is_still_a_whole_stream(
    scripted: openai.OpenAI, script: ScriptedChat
) -> None:
    """Keep-alive comments have sent the status already."""
    script.delay, script.raises_after = 0.3, 0
    with scripted.responses.stream(model="tiny", input=INPUT) as stream:
        events = [one.to_dict() for one in stream]
    assert kinds(events) == ["created", "in_progress", "error", "failed"]
    assert events[-1]["response"]["output"] == []


def test_what_fails_before_it_begins_is_an_error_with_its_status(
    scripted: openai.OpenAI, script: ScriptedChat
) -> None:
    script.raises_after = 0
    for stream in (False, True):
        with pytest.raises(openai.InternalServerError) as caught:
            ask(scripted, stream=stream)
        assert caught.value.status_code == 500
        assert "secret" not in caught.value.response.text
