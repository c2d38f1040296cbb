"""The Messages API with Anthropic's own client: what it gets is what the engine answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import httpx2 as httpx
import openai
import pytest
from scripted_chat import CALL, TEXT, ScriptedChat
from server_on_a_thread import RunningServer, running_server

from jaxllm import AsyncEngine, RequestOutput, SamplingParams
from jaxllm.server.messages import SIGNATURE

URL = "/v1/messages"
MESSAGES: Any = [{"role": "user", "content": "Hello"}]
# The client has no temperature, top_p and top_k of its own any more; older ones do.
GREEDY: Any = {"model": "tiny", "max_tokens": 12, "extra_body": {"temperature": 0}}
TOOLS: Any = [
    {
        "name": "weather",
        "description": "Weather of a city",
        "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
    }
]


@pytest.fixture(scope="module")
def client(server: RunningServer) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.base_url, api_key="none", max_retries=0)


def ask(client: anthropic.Anthropic, messages: Any = MESSAGES, **options: Any) -> Any:
    return client.messages.create(messages=messages, **{**GREEDY, **options})


def text_of(message: Any) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def continuation(server: RunningServer, prompt: str, max_tokens: int = 12) -> str:
    """What the engine itself says after a prompt that the tiny model's chat template made."""

    async def last() -> RequestOutput:
        params = SamplingParams(temperature=0, max_tokens=max_tokens)
        outputs = server.engine.generate(prompt, params)
        return [output async for output in outputs][-1]

    return server.call(last()).outputs[0].text


@pytest.fixture(scope="module")
def expected(server: RunningServer) -> Any:
    """The chat route's answer."""
    chat = openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0)
    return chat.chat.completions.create(
        model="tiny", messages=MESSAGES, temperature=0, max_tokens=12
    )


def test_an_answer_is_the_chat_routes(client: anthropic.Anthropic, expected: Any) -> None:
    message = ask(client)
    [block] = message.content
    assert (block.type, block.text) == ("text", expected.choices[0].message.content)
    assert expected.choices[0].finish_reason == "length"
    assert (message.stop_reason, message.stop_sequence) == ("max_tokens", None)
    assert (message.type, message.role, message.model) == ("message", "assistant", "tiny")
    assert message.id == f"msg_{message._request_id}"
    usage = message.usage
    assert usage.input_tokens + usage.cache_read_input_tokens == expected.usage.prompt_tokens
    assert (usage.output_tokens, usage.cache_creation_input_tokens) == (12, 0)


def test_a_stream_has_the_events_that_clients_expect(
    client: anthropic.Anthropic, expected: Any
) -> None:
    start, block, *deltas, stop, delta, end = list(ask(client, stream=True))
    assert (start.type, start.message.content, start.message.stop_reason) == (
        "message_start", [], None,
    )  # fmt: skip
    assert start.message.usage.output_tokens == 0
    assert block.model_dump(exclude_none=True) == {
        "type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""},
    }  # fmt: skip
    assert {(one.type, one.index, one.delta.type) for one in deltas} == {
        ("content_block_delta", 0, "text_delta")
    }
    assert "".join(one.delta.text for one in deltas) == expected.choices[0].message.content
    assert (stop.type, stop.index, end.type) == ("content_block_stop", 0, "message_stop")
    assert (delta.delta.stop_reason, delta.usage.output_tokens) == ("max_tokens", 12)
    assert delta.usage.input_tokens == start.message.usage.input_tokens > 0


def comparable(message: Any) -> dict[str, Any]:
    """All but what differs from request to request."""
    found = message.model_dump(exclude={"id"}, exclude_none=True)
    for block in found["content"]:
        block.pop("id", None)
        block.pop("parsed_output", None)
    return found


def test_the_streams_helper_adds_up_to_the_whole_answer(client: anthropic.Anthropic) -> None:
    with client.messages.stream(messages=MESSAGES, **GREEDY) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    whole = ask(client)
    assert comparable(final) == comparable(whole)
    assert text == text_of(whole) != ""


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_sequence_is_named(client: anthropic.Anthropic, expected: Any, stream: bool) -> None:
    text = expected.choices[0].message.content
    stop = text[3:5]
    options = {**GREEDY, "stop_sequences": ["@@@", stop]}
    if stream:
        with client.messages.stream(messages=MESSAGES, **options) as events:
            message: Any = events.get_final_message()
    else:
        message = ask(client, **options)
    assert text_of(message) == text[: text.index(stop)]
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", stop)


def test_ends_of_their_own_and_of_the_context_are_told_apart(
    client: anthropic.Anthropic, scripted: anthropic.Anthropic, script: ScriptedChat
) -> None:
    full = ask(client, [{"role": "user", "content": "a" * 240}], max_tokens=200)
    assert full.stop_reason == "model_context_window_exceeded"
    assert full.usage.output_tokens < 200
    script.text = "All."
    assert ask(scripted).stop_reason == "end_turn"


@pytest.mark.parametrize(
    ("fields", "prompt"),
    [
        ({"system": "Be brief."}, "<|system|>Be brief.<|end|><|user|>Hello<|end|><|assistant|>"),
        (
            {
                "system": [
                    {"type": "text", "text": "Be", "cache_control": {"type": "ephemeral"}},
                    {"type": "text", "text": "brief."},
                ]
            },
            "<|system|>Be\nbrief.<|end|><|user|>Hello<|end|><|assistant|>",
        ),
        ({"system": ""}, "<|user|>Hello<|end|><|assistant|>"),
        (
            {
                "messages": [
                    {"role": "user", "content": "One"},
                    {"role": "user", "content": [{"type": "text", "text": "two"}]},
                    {"role": "assistant", "content": "three"},
                    {"role": "user", "content": "four"},
                ]
            },
            "<|user|>One\ntwo<|end|><|assistant|>three<|end|><|user|>four<|end|><|assistant|>",
        ),
        (
            {"messages": [*MESSAGES, {"role": "assistant", "content": "The quick"}]},
            "<|user|>Hello<|end|><|assistant|>The quick",  # the answer goes on with it
        ),
    ],
)
def test_the_conversation_reaches_the_model(
    client: anthropic.Anthropic, server: RunningServer, fields: Any, prompt: str
) -> None:
    assert text_of(ask(client, **fields)) == continuation(server, prompt)
    num_tokens = len(server.engine.get_tokenizer().encode(prompt, add_special_tokens=False))
    counted = {"messages": MESSAGES, **fields}
    assert client.messages.count_tokens(model="tiny", **counted).input_tokens == num_tokens


def test_sampling_values_reach_the_engine(client: anthropic.Anthropic, expected: Any) -> None:
    hot = {"temperature": 1.0, "top_k": 1, "top_p": 1.0}
    assert text_of(ask(client, extra_body=hot)) == expected.choices[0].message.content


def test_counted_tokens_are_those_of_the_usage_cached_or_not(client: anthropic.Anthropic) -> None:
    messages: Any = [{"role": "user", "content": "a count of tokens that are cached " * 4}]
    count = client.messages.count_tokens(model="tiny", messages=messages).input_tokens
    fresh, again = (ask(client, messages, max_tokens=1).usage for _ in range(2))
    assert (fresh.input_tokens, fresh.cache_read_input_tokens) == (count, 0)
    assert again.cache_read_input_tokens >= count - 17
    assert again.input_tokens + again.cache_read_input_tokens == count
    salted = {"temperature": 0, "cache_salt": "mine"}
    assert ask(client, messages, max_tokens=1, extra_body=salted).usage.input_tokens == count


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_pauses_the_turn(
    client: anthropic.Anthropic, server: RunningServer, stream: bool
) -> None:
    extra = {"temperature": 0, "timeout": 0.03}
    reply = ask(client, max_tokens=240, stream=stream, extra_body=extra)
    if stream:
        [reason] = [one.delta.stop_reason for one in reply if one.type == "message_delta"]
    else:
        reason = reply.stop_reason
    assert reason == "pause_turn"
    server.wait_idle()


# Tools and thinking, with what a scripted model writes.


@pytest.fixture(scope="module")
def tool_server(make_engine: Callable[[], AsyncEngine]) -> Iterator[RunningServer]:
    with running_server(
        make_engine,
        tool_call_parser="hermes",
        reasoning_parser="think",
        api_key=("key",),
        max_body_bytes=50_000,
    ) as one:
        one.wait_started()
        yield one
        one.wait_idle()


@pytest.fixture
def scripted(tool_server: RunningServer) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=tool_server.base_url, api_key="key", max_retries=0)


def test_thinking_text_and_calls_are_blocks(
    scripted: anthropic.Anthropic, script: ScriptedChat
) -> None:
    message = ask(scripted, tools=TOOLS)
    thinking, text, *calls = message.content
    assert (thinking.type, thinking.thinking) == ("thinking", "Which city?")
    assert thinking.signature == SIGNATURE
    assert (text.type, text.text.strip()) == ("text", "Let me look.")
    assert [(one.type, one.name, one.input) for one in calls] == [
        ("tool_use", "weather", {"city": "Oslo"}),
        ("tool_use", "weather", {"city": "Rome"}),
    ]
    assert calls[0].id != calls[1].id
    assert message.stop_reason == "tool_use"
    [tool] = script.seen["tools"]
    assert tool["function"] == {
        "name": "weather",
        "description": "Weather of a city",
        "parameters": TOOLS[0]["input_schema"],
    }


@pytest.mark.parametrize(
    ("text", "inputs"),
    [
        (TEXT, [{"city": "Oslo"}, {"city": "Rome"}]),
        (CALL % '"hello"', [{}]),
        (CALL % '"[1, 2]"', [{}]),
        (CALL % r'"{\"city\": \"Oslo\"} and more"', [{"city": "Oslo"}]),
        (CALL % '{"city": "Oslo", "days": [1, 2, oops]}', [{"city": "Oslo", "days": [1, 2]}]),
        ('<tool_call>\n{"name": "weather", "arguments": {"a": 1, "city": "Os', [{"a": 1}]),
    ],
)
def test_a_stream_of_blocks_adds_up_to_the_whole_whatever_the_arguments(
    scripted: anthropic.Anthropic, script: ScriptedChat, text: str, inputs: list[Any]
) -> None:
    script.text = text
    with scripted.messages.stream(messages=MESSAGES, tools=TOOLS, **GREEDY) as stream:
        final = stream.get_final_message()
    whole = ask(scripted, tools=TOOLS)
    assert [block.input for block in whole.content if block.type == "tool_use"] == inputs
    assert comparable(final) == comparable(whole)


def test_arguments_come_in_pieces(scripted: anthropic.Anthropic, script: ScriptedChat) -> None:
    events = list(ask(scripted, tools=TOOLS, stream=True))
    pieces = [
        event.delta.partial_json
        for event in events
        if event.type == "content_block_delta" and event.delta.type == "input_json_delta"
    ]
    assert "".join(pieces) == '{"city": "Oslo"}{"city": "Rome"}'
    assert len(pieces) > 4
    assert [event.index for event in events if event.type == "content_block_stop"] == [0, 1, 2, 3]


def test_choices_of_tools(scripted: anthropic.Anthropic, script: ScriptedChat) -> None:
    single = {"type": "auto", "disable_parallel_tool_use": True}
    message = ask(scripted, tools=TOOLS, tool_choice=single)
    assert [one.input for one in message.content if one.type == "tool_use"] == [{"city": "Oslo"}]
    message = ask(scripted, tools=TOOLS, tool_choice={"type": "none"})
    assert "<tool_call>" in text_of(message)
    assert message.stop_reason == "end_turn"
    assert script.seen["tools"] is None


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
def test_a_forced_call_is_a_form_of_the_answer(
    scripted: anthropic.Anthropic, script: ScriptedChat, choice: Any
) -> None:
    ask(scripted, tools=TOOLS)
    assert script.seen["params"].structured_outputs is None
    ask(scripted, tools=TOOLS, tool_choice=choice)
    assert script.seen["params"].structured_outputs is not None
    with pytest.raises(anthropic.BadRequestError, match="no tool is 'other'"):
        ask(scripted, tools=TOOLS, tool_choice={"type": "tool", "name": "other"})


def test_answers_and_results_go_back_as_templates_read_them(
    scripted: anthropic.Anthropic, script: ScriptedChat
) -> None:
    with scripted.messages.stream(messages=MESSAGES, tools=TOOLS, **GREEDY) as stream:
        content = stream.get_final_message().content
    oslo, rome = (block.id for block in content if block.type == "tool_use")
    results = [
        {"type": "tool_result", "tool_use_id": oslo, "content": "rain"},
        {
            "type": "tool_result", "tool_use_id": rome, "is_error": True,
            "content": [{"type": "text", "text": "no such"}, {"type": "text", "text": "city"}],
        },
        {"type": "text", "text": "So?", "cache_control": {"type": "ephemeral", "ttl": "1h"}},
    ]  # fmt: skip
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": content},
        {"role": "user", "content": results},
    ]
    ask(scripted, messages, tools=TOOLS)
    _, assistant, *others = script.seen["messages"]
    assert assistant["reasoning_content"] == "Which city?"
    assert assistant["content"].strip() == "Let me look."
    assert [call["function"] for call in assistant["tool_calls"]] == [
        {"name": "weather", "arguments": {"city": "Oslo"}},
        {"name": "weather", "arguments": {"city": "Rome"}},
    ]
    assert others == [
        {"role": "tool", "tool_call_id": oslo, "name": "weather", "content": "rain"},
        {
            "role": "tool", "tool_call_id": rome, "name": "weather",
            "content": "Error: no such\ncity",
        },
        {"role": "user", "content": "So?"},
    ]  # fmt: skip


def test_thinking_is_disabled_where_the_template_can(
    scripted: anthropic.Anthropic,
    script: ScriptedChat,
    tool_server: RunningServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(anthropic.BadRequestError, match="thinking: this model always thinks"):
        ask(scripted, thinking={"type": "disabled"})
    tokenizer = tool_server.engine.get_tokenizer()
    template = "{{ enable_thinking }}"
    monkeypatch.setattr(type(tokenizer), "chat_template", template, raising=False)
    monkeypatch.setattr(tokenizer, "chat_template", template, raising=False)
    ask(scripted, thinking={"type": "disabled"})
    assert script.seen["chat_template_kwargs"] == {"enable_thinking": False}
    count = scripted.messages.count_tokens(
        model="tiny", messages=MESSAGES, thinking={"type": "disabled"}
    )
    assert count.input_tokens == len(tokenizer.encode("False", add_special_tokens=False))


# Errors, in Anthropic's shape.


def shape_of(error: anthropic.APIStatusError) -> tuple[str, str]:
    """The type and the message, after a look at the rest."""
    body: Any = error.body
    assert set(body) == {"type", "error", "request_id"}
    assert body["type"] == "error"
    assert set(body["error"]) == {"type", "message"}
    assert body["request_id"] == error.response.headers["Request-Id"]
    return body["error"]["type"], body["error"]["message"]


IMAGE = {"type": "image", "source": {"type": "url", "url": "http://127.0.0.1/"}}
USE = {"type": "tool_use", "id": "u", "name": "f", "input": {}}
RESULT = {"type": "tool_result", "tool_use_id": "u"}


def user(*content: Any) -> list[Any]:
    return [{"role": "user", "content": list(content)}]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"max_tokens": None}, "max_tokens: input should be a valid integer"),
        ({"max_tokens": 0}, "max_tokens: "),
        ({"temperature": 1.5}, "temperature: input should be less than or equal to 1"),
        ({"top_p": 0.0}, "top_p: "),
        ({"top_k": -1}, "top_k"),
        ({"stop_sequences": [""]}, "stop_sequences must be non-empty"),
        ({"stop_sequences": ["a"] * 17}, "stop_sequences may have 16"),
        ({"n": 2}, "unknown field 'n'"),
        ({"metadata": {"name": "x"}}, "unknown field 'metadata.name'"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking.type"),
        ({"output_config": {"effort": "low"}}, "output_config: is not supported"),
        ({"service_tier": "flex"}, "service_tier: is not supported"),
        ({"speed": "fast"}, "speed: is not supported"),
        ({"cache_control": {"type": "eternal"}}, "cache_control.type"),
        ({"timeout": 0}, "timeout"),
        ({"priority": 1}, "scheduling_policy"),
        ({"messages": []}, "messages: list should have at least 1"),
        ({"messages": user()}, "messages.0.content: must have at least one block"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages.0: must have the role user"),
        ({"messages": ["Hello"]}, "messages.0: must have the role user"),
        ({"messages": [{"role": "user"}]}, "messages.0.content is missing"),
        ({"messages": user(IMAGE)}, "messages.0.content.0: must be a block of type text or tool_r"),
        ({"messages": user({"type": "text"})}, "messages.0.content.0.text is missing"),
        (
            {"messages": user({"type": "text", "text": "x", "colour": "red"})},
            "unknown field 'messages.0.content.0.colour'",
        ),
        ({"messages": user(USE)}, "messages.0.content.0: must be a block of type"),
        ({"messages": user(RESULT)}, "tool_use_id 'u', which no tool_use before it has"),
        (
            {"messages": user({**RESULT, "content": [IMAGE]})},
            "messages.0.content.0.content.0.type: input should be 'text'",
        ),
        (
            {"messages": [*MESSAGES, {"role": "assistant", "content": [USE]}]},
            "messages: the answer goes on with the text of the last message",
        ),
        ({"messages": [{"role": "user", "content": "a" * 5000}]}, "max_model_len"),
        ({"tools": TOOLS}, "tools are not supported with this model"),
        ({"tool_choice": {"type": "auto"}}, "tool_choice needs tools"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice: type tool needs a name"),
        ({"tool_choice": {"type": "any", "name": "f"}}, "tool_choice: type tool needs a name"),
    ],
)
def test_what_is_not_supported_is_refused_and_named(
    client: anthropic.Anthropic, fields: Any, says: str
) -> None:
    with pytest.raises(anthropic.BadRequestError) as refused:
        ask(client, extra_body=fields)
    kind, message = shape_of(refused.value)
    assert kind == "invalid_request_error"
    assert says in message


@pytest.mark.parametrize(
    ("tool", "says"),
    [
        ({"name": "bad name", "input_schema": {}}, "tools[0].name must be"),
        ({"name": "f", "input_schema": {"type": "array"}}, "tools[0].input_schema must be"),
        ({"name": "f"}, "tools.0.input_schema is missing"),
        ({"type": "web_search_20250305", "name": "web_search"}, "tools.0"),
        ({"name": "f", "input_schema": {}, "strict": True}, "tools.0.strict: is not supported"),
    ],
)
def test_bad_tools_are_named(
    scripted: anthropic.Anthropic, script: ScriptedChat, tool: Any, says: str
) -> None:
    with pytest.raises(anthropic.BadRequestError) as refused:
        ask(scripted, tools=[tool])
    assert says in shape_of(refused.value)[1]


def test_statuses_are_errors_of_their_classes(
    scripted: anthropic.Anthropic, script: ScriptedChat, tool_server: RunningServer
) -> None:
    wrong = scripted.copy(api_key="wrong")
    with pytest.raises(anthropic.AuthenticationError) as refused:
        ask(wrong)
    assert shape_of(refused.value)[0] == "authentication_error"
    with pytest.raises(anthropic.NotFoundError) as missing:
        ask(scripted, model="claude-0")
    assert shape_of(missing.value)[0] == "not_found_error"
    with pytest.raises(anthropic.NotFoundError) as nowhere:
        scripted.messages.batches.list()
    assert shape_of(nowhere.value) == ("not_found_error", "there is no such route")
    with pytest.raises(anthropic.APIStatusError) as large:
        ask(scripted, [{"role": "user", "content": "a" * 60_000}])
    assert large.value.status_code == 413
    assert shape_of(large.value)[0] == "request_too_large"


def test_a_busy_or_closing_server_says_when_to_come_back(
    scripted: anthropic.Anthropic, script: ScriptedChat, tool_server: RunningServer
) -> None:
    tool_server.context.live["held"] = 10_000
    try:
        with pytest.raises(anthropic.RateLimitError) as busy:
            ask(scripted)
        assert scripted.messages.count_tokens(model="tiny", messages=MESSAGES).input_tokens > 0
    finally:
        del tool_server.context.live["held"]
    assert shape_of(busy.value)[0] == "rate_limit_error"
    assert int(busy.value.response.headers["Retry-After"]) >= 1
    tool_server.context.status = "draining"
    try:
        with pytest.raises(anthropic.InternalServerError) as closing:
            ask(scripted)
    finally:
        tool_server.context.status = "ready"
    assert closing.value.status_code == 503
    assert shape_of(closing.value)[0] == "overloaded_error"
    assert "Retry-After" in closing.value.response.headers


def test_errors_before_the_route_have_the_same_shape(server: RunningServer) -> None:
    url, headers = server.base_url + URL, {"Content-Type": "application/json"}
    replies: dict[int, httpx.Response] = {
        405: httpx.get(url),
        415: httpx.post(url, content=b"{}", headers={"Content-Type": "text/plain"}),
        400: httpx.post(url, content=b"{", headers=headers),
        404: httpx.post(f"{url}/nowhere", content=b"{}", headers=headers),
    }
    for status, reply in replies.items():
        assert reply.status_code == status
        assert (reply.json()["type"], set(reply.json()["error"])) == ("error", {"type", "message"})
    assert replies[405].headers["Allow"] == "POST"
    other = httpx.get(f"{server.base_url}/v1/messages_of_others")  # a path that only looks like it
    assert set(other.json()["error"]) == {"message", "type", "param", "code"}
    assert "Request-Id" not in other.headers


@pytest.mark.parametrize("num_outputs", [0, 2])
def test_an_engine_that_fails_is_an_error_before_and_half_way(
    scripted: anthropic.Anthropic, script: ScriptedChat, num_outputs: int
) -> None:
    script.text, script.raises_after = "a long answer", num_outputs
    seen: list[str] = []
    with pytest.raises(anthropic.APIStatusError) as failed:
        seen.extend(event.type for event in ask(scripted, stream=True))
    assert shape_of(failed.value) == ("api_error", "internal error")
    assert failed.value.status_code == (200 if num_outputs else 500)  # half way it has been sent
    assert ("message_start" in seen) == bool(num_outputs)
    assert "message_stop" not in seen


def test_a_failed_step_is_a_500(scripted: anthropic.Anthropic, script: ScriptedChat) -> None:
    script.finish_reason = "error"
    with pytest.raises(anthropic.InternalServerError) as failed:
        ask(scripted)
    assert shape_of(failed.value)[0] == "api_error"


def test_tokens_of_a_stream_are_events_with_names(server: RunningServer) -> None:
    """For clients that read the names of events and not the types in them."""
    body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 2, "stream": True}
    reply = httpx.post(
        server.base_url + URL, json=body, headers={"anthropic-version": "2023-06-01"}
    )
    assert reply.headers["Content-Type"].startswith("text/event-stream")
    names = [line[7:] for line in reply.text.splitlines() if line.startswith("event: ")]
    data = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: ")]
    assert names == [one["type"] for one in data]
    assert (names[0], names[-1]) == ("message_start", "message_stop")
