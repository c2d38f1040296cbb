"""Chat with the official client: what it gets is what the engine answers."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any

import openai
import pytest
from server_on_a_thread import RunningServer

from jaxllm import BeamSearchParams, RequestOutput, SamplingParams

MESSAGES: Any = [{"role": "user", "content": "Hello"}]
GREEDY: Any = {"temperature": 0, "max_tokens": 12, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def client(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0)


def engine_chat(server: RunningServer, messages: Any, **params: Any) -> RequestOutput:
    """What the engine itself answers."""

    async def last() -> RequestOutput:
        outputs = server.engine.chat(messages, SamplingParams(**params))
        return [output async for output in outputs][-1]

    return server.call(last())


@pytest.fixture(scope="module")
def expected(server: RunningServer) -> RequestOutput:
    return engine_chat(server, MESSAGES, temperature=0, max_tokens=12, ignore_eos=True, logprobs=3)


def test_a_greedy_answer_is_the_engines(client: openai.OpenAI, expected: RequestOutput) -> None:
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, **GREEDY)
    [choice] = answer.choices
    assert choice.message.content == expected.outputs[0].text
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == "tiny"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert (answer.usage.completion_tokens, answer.usage.total_tokens) == (
        12,
        12 + len(expected.prompt_token_ids),
    )


def test_a_stream_has_the_same_text_and_the_shape_that_clients_expect(
    client: openai.OpenAI, expected: RequestOutput
) -> None:
    chunks = list(
        client.chat.completions.create(
            model="alias",
            messages=MESSAGES,
            stream=True,
            stream_options={"include_usage": True},
            **GREEDY,
        )
    )
    first, *middle, finish, usage = chunks
    assert first.choices[0].delta.model_dump(exclude_none=True) == {
        "role": "assistant", "content": "",
    }  # fmt: skip
    text = "".join(chunk.choices[0].delta.content or "" for chunk in middle)
    assert text == expected.outputs[0].text
    assert all(chunk.choices[0].finish_reason is None for chunk in middle)
    assert finish.choices[0].finish_reason == "length"
    assert finish.choices[0].delta.content is None
    assert usage.choices == []
    assert usage.usage is not None
    assert usage.usage.completion_tokens == 12
    assert {chunk.id for chunk in chunks} == {first.id}
    assert {chunk.model for chunk in chunks} == {"alias"}


def test_logprobs_have_tokens_bytes_and_the_most_likely(
    client: openai.OpenAI, expected: RequestOutput
) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=3, **GREEDY
    )
    streamed = client.chat.completions.create(
        model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=3, stream=True, **GREEDY
    )
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content or []
    chunks = [chunk.choices[0].logprobs for chunk in streamed]
    assert [one for part in chunks if part for one in part.content or []] == content
    assert expected.outputs[0].logprobs is not None
    for entry, token_id, logprobs in zip(
        content, expected.outputs[0].token_ids, expected.outputs[0].logprobs, strict=True
    ):
        assert math.isclose(entry.logprob, logprobs[token_id].logprob, abs_tol=1e-4)
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].token == entry.token  # greedy
        assert entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob
    text = b"".join(bytes(entry.bytes or []) for entry in content).decode(errors="replace")
    assert "".join(c for c in text if c != "�") == "".join(
        c for c in expected.outputs[0].text if c != "�"
    )


def test_several_answers_are_seeded_each_with_its_own_seed(client: openai.OpenAI) -> None:
    def texts(stream: bool) -> list[str]:
        found = ["", "", ""]
        options: Any = {"n": 3, "seed": 7, "temperature": 1.0, "max_tokens": 8, "stream": stream}
        reply = client.chat.completions.create(model="tiny", messages=MESSAGES, **options)
        for chunk in reply if stream else [reply]:
            for choice in chunk.choices:
                piece = choice.delta if stream else choice.message
                found[choice.index] += piece.content or ""
        return found

    whole = texts(stream=False)
    assert len(set(whole)) == 3
    assert texts(stream=True) == whole


def test_beam_search_and_best_of_return_the_likeliest(
    client: openai.OpenAI, server: RunningServer
) -> None:
    search = BeamSearchParams(beam_width=4, n=2, max_tokens=8)
    outputs = server.engine.chat(MESSAGES, search)

    async def last() -> RequestOutput:
        return [output async for output in outputs][-1]

    expected = [answer.text for answer in server.call(last()).outputs]
    beams: Any = {"use_beam_search": True, "best_of": 4}
    drawn: Any = {"best_of": 4}
    options: Any = {"n": 2, "max_tokens": 8, "temperature": 1.0}
    for extra, texts in ((beams, expected), (drawn, None)):
        reply = client.chat.completions.create(
            model="tiny", messages=MESSAGES, extra_body=extra, **options
        )
        assert [choice.index for choice in reply.choices] == [0, 1]
        if texts is not None:
            assert [choice.message.content for choice in reply.choices] == texts


def test_beams_of_a_form_with_their_log_probabilities(client: openai.OpenAI) -> None:
    colour = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "green", "blue"]}},
        "required": ["colour"],
        "additionalProperties": False,
    }
    reply = client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        n=3,
        max_tokens=100,
        logprobs=True,
        top_logprobs=1,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "c", "schema": colour},
        },
        extra_body={"use_beam_search": True, "best_of": 6},
    )
    colours = [json.loads(choice.message.content or "")["colour"] for choice in reply.choices]
    assert set(colours) <= {"red", "green", "blue"}
    sums = [
        sum(token.logprob for token in (choice.logprobs and choice.logprobs.content) or [])
        for choice in reply.choices
    ]
    lengths = [len((c.logprobs and c.logprobs.content) or []) for c in reply.choices]
    scores = [total / length for total, length in zip(sums, lengths, strict=True)]
    assert scores == sorted(scores, reverse=True)
    assert max(sums) < 0


def test_stop_logit_bias_and_token_lists_reach_the_engine(
    client: openai.OpenAI, expected: RequestOutput
) -> None:
    text = expected.outputs[0].text
    stop = text[3:5]
    cut = client.chat.completions.create(model="tiny", messages=MESSAGES, stop=stop, **GREEDY)
    assert cut.choices[0].message.content == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    assert cut.choices[0].stop_reason == stop  # type: ignore[attr-defined]
    biased = client.chat.completions.create(
        model="tiny", messages=MESSAGES, logit_bias={"70": 100}, temperature=0, max_tokens=3
    )
    only = client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        temperature=0,
        max_tokens=3,
        extra_body={"allowed_token_ids": [70]},
    )
    assert biased.choices[0].message.content == only.choices[0].message.content
    assert len(only.choices[0].message.content or "") >= 3


def test_unset_values_come_from_generation_config(client: openai.OpenAI) -> None:
    """Its temperature of 0.5 and top_k of 20, not OpenAI's 1 and none."""

    def text(**options: Any) -> str | None:
        answer = client.chat.completions.create(
            model="tiny", messages=MESSAGES, seed=11, max_tokens=24, **options
        )
        return answer.choices[0].message.content

    assert text() == text(temperature=0.5, extra_body={"top_k": 20})
    assert text() != text(temperature=1.0, extra_body={"top_k": 0})


def test_content_parts_developer_and_continued_messages(
    client: openai.OpenAI, server: RunningServer
) -> None:
    messages: Any = [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "assistant", "content": "The quick", "refusal": None},
    ]
    extra = {"add_generation_prompt": False, "continue_final_message": True, "ignore_eos": True}
    answer = client.chat.completions.create(
        model="tiny", messages=messages, temperature=0, max_tokens=5, extra_body=extra
    )

    async def raw() -> str:
        prompt = "<|system|>Be brief.<|end|><|assistant|>The quick"
        params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
        outputs = server.engine.generate(prompt, params)
        return [output async for output in outputs][-1].outputs[0].text

    assert answer.choices[0].message.content == server.call(raw())


def test_cached_tokens_are_told(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "the same beginning of a prompt " * 6}]
    ask = client.chat.completions.create
    ask(model="tiny", messages=messages, max_tokens=1)
    usage = ask(model="tiny", messages=messages, max_tokens=1).usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    cached = usage.prompt_tokens_details.cached_tokens or 0
    assert usage.prompt_tokens - 17 <= cached < usage.prompt_tokens
    salted = ask(
        model="tiny", messages=messages, max_tokens=1, extra_body={"cache_salt": "mine"}
    ).usage
    assert salted is not None
    assert salted.prompt_tokens_details is not None
    assert salted.prompt_tokens_details.cached_tokens == 0


def test_prompt_logprobs_come_in_the_form_of_vllm(client: openai.OpenAI) -> None:
    answer: Any = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=1, extra_body={"prompt_logprobs": 2}
    )
    first, *others = answer.prompt_logprobs
    assert first is None
    assert len(others) == answer.usage.prompt_tokens - 1
    for entry in others:
        assert 2 <= len(entry) <= 3
        assert {"logprob", "rank", "decoded_token"} == set(next(iter(entry.values())))


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_ends_a_request_with_what_it_has(
    client: openai.OpenAI, server: RunningServer, stream: bool
) -> None:
    reply: Any = client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        temperature=0,
        max_tokens=200,
        stream=stream,
        extra_body={"timeout": 0.03, "ignore_eos": True},
    )
    if stream:
        assert [c.choices[0].finish_reason for c in reply][-1] == "timeout"
    else:
        assert reply.choices[0].finish_reason == "timeout"
        assert reply.usage.completion_tokens < 200
    server.wait_idle()


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("temperature", 3.0, "temperature"),
        ("temperature", "1", "valid number"),
        ("top_p", 0.0, "top_p"),
        ("n", 100000, "16384"),
        ("max_tokens", 0, "max_tokens"),
        ("logit_bias", {"x": 1.0}, "logit_bias"),
        ("logit_bias", {"5": 101.0}, "logit_bias"),
        ("logit_bias", {"999999": 1.0}, "vocabulary"),
        ("stop", ["a"] * 17, "16"),
        ("stop", ["a" * 1025], "1024"),
        ("unknown_thing", 1, "unknown field"),
        ("chat_template", "{{ 1 }}", "not supported"),
        ("modalities", ["text", "audio"], "not supported"),
        ("tools", [{"type": "function", "function": {"name": "f"}}], "not supported"),
        ("store", True, "not supported"),
        ("best_of", 0, "greater than or equal to 1"),
        ("length_penalty", 2.0, "use_beam_search"),
        ("priority", 1, "scheduling_policy"),
        ("top_logprobs", 2, "logprobs"),
        ("stream_options", {"include_usage": True}, "stream"),
        ("timeout", -1.0, "greater than 0"),
        ("chat_template_kwargs", {"messages": []}, "messages"),
        ("messages", [], "at least 1"),
        ("messages", [{"role": "robot", "content": "x"}], "role"),
        ("messages", [{"role": "user"}], "content"),
        ("messages", [{"role": "user", "content": [{"type": "image_url"}]}], "text"),
        ("messages", [{"role": "user", "content": "a" * 5000}], "max_model_len"),
    ],
)
def test_what_is_not_supported_is_refused_and_named(
    client: openai.OpenAI, field: str, value: Any, says: str
) -> None:
    body = {"messages": MESSAGES, field: value}
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="tiny", messages=[], extra_body=body)
    error: Any = refused.value.body
    assert says in error["message"]
    assert error["type"] == "invalid_request_error"
    assert error["param"].startswith(field)
    assert error["code"] == ("context_length_exceeded" if says == "max_model_len" else None)


def test_another_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        client.chat.completions.create(model="gpt-5", messages=MESSAGES)
    assert refused.value.code == "model_not_found"


def test_many_streams_at_once_are_each_the_answer_alone(
    server: RunningServer, expected: RequestOutput
) -> None:
    async def one(client: openai.AsyncOpenAI) -> str:
        reply: Any = await client.chat.completions.create(
            model="tiny", messages=MESSAGES, stream=True, **GREEDY
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in reply])

    async def many() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.base_url}/v1", api_key="none") as client:
            return await asyncio.gather(*[one(client) for _ in range(24)])

    assert asyncio.run(many()) == [expected.outputs[0].text] * 24
    server.wait_idle()
