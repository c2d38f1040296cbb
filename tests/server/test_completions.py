"""Completions and tokens with the official client: what it gets is what the engine answers."""

from __future__ import annotations

import json
from typing import Any

import httpx2 as httpx
import openai
import pytest
from server_on_a_thread import RunningServer

from jaxllm import BeamSearchParams, RequestOutput, SamplingParams, StructuredOutputsParams

PROMPTS = ["The quick brown", "Once upon a time"]
GREEDY: Any = {"temperature": 0, "max_tokens": 10, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def client(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def expected(server: RunningServer) -> list[RequestOutput]:
    async def answer(prompt: str) -> RequestOutput:
        params = SamplingParams(
            temperature=0, max_tokens=10, ignore_eos=True, logprobs=2, prompt_logprobs=2
        )
        outputs = server.engine.generate(prompt, params)
        return [output async for output in outputs][-1]

    return [server.call(answer(prompt)) for prompt in PROMPTS]


def test_several_prompts_are_answered_in_their_order(
    client: openai.OpenAI, expected: list[RequestOutput]
) -> None:
    answer = client.completions.create(model="tiny", prompt=PROMPTS, **GREEDY)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert [choice.text for choice in answer.choices] == [o.outputs[0].text for o in expected]
    assert answer.object == "text_completion"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(len(o.prompt_token_ids) for o in expected)
    assert answer.usage.completion_tokens == 20


def test_a_stream_of_several_prompts_has_the_same_texts(
    client: openai.OpenAI, expected: list[RequestOutput]
) -> None:
    texts, reasons, usage = ["", ""], ["", ""], None
    stream = client.completions.create(
        model="tiny", prompt=PROMPTS, stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    for chunk in stream:
        usage = chunk.usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] += choice.finish_reason or ""
    assert texts == [output.outputs[0].text for output in expected]
    assert reasons == ["length", "length"]
    assert usage is not None
    assert usage.completion_tokens == 20


@pytest.mark.parametrize("several", [False, True])
def test_token_ids_are_prompts(
    client: openai.OpenAI, expected: list[RequestOutput], several: bool
) -> None:
    ids = [output.prompt_token_ids for output in expected]
    prompt: Any = ids if several else ids[0]
    answer = client.completions.create(model="tiny", prompt=prompt, **GREEDY)
    texts = [output.outputs[0].text for output in expected]
    assert [choice.text for choice in answer.choices] == texts[: len(answer.choices)]
    assert len(answer.choices) == (2 if several else 1)


def test_echo_with_logprobs_scores_the_prompt(
    client: openai.OpenAI, expected: list[RequestOutput], server: RunningServer
) -> None:
    output = expected[0]
    scored = client.completions.create(
        model="tiny", prompt=PROMPTS[0], echo=True, logprobs=2, temperature=0, max_tokens=0
    )
    both = client.completions.create(
        model="tiny", prompt=PROMPTS[0], echo=True, logprobs=2, **GREEDY
    )
    assert scored.choices[0].text == PROMPTS[0]
    assert scored.usage is not None
    assert scored.usage.completion_tokens == 0
    assert both.choices[0].text == PROMPTS[0] + output.outputs[0].text
    logprobs = both.choices[0].logprobs
    assert logprobs is not None
    ids = [*output.prompt_token_ids, *output.outputs[0].token_ids]
    strings = [server.engine.get_tokenizer().token_string(i) for i in ids]
    assert logprobs.tokens == strings
    decode = server.engine.get_tokenizer().decode
    wholes = [decode(ids[:i]) for i in range(len(ids))]
    # The end of a text may be half of a character, which counts with the rest of it.
    for offset, text in zip(logprobs.text_offset or [], wholes, strict=True):
        assert len(text.rstrip("\ufffd")) <= offset <= len(text)
    found: list[Any] = [*(output.prompt_logprobs or []), *(output.outputs[0].logprobs or [])]
    expected_values = [None, *(one[i].logprob for i, one in zip(ids[1:], found[1:], strict=True))]
    assert logprobs.token_logprobs == pytest.approx(expected_values, abs=1e-3)
    assert logprobs.top_logprobs is not None
    assert logprobs.top_logprobs[0] is None
    assert all(2 <= len(top) <= 3 for top in logprobs.top_logprobs[1:])


def test_offsets_count_characters_and_not_bytes(client: openai.OpenAI) -> None:
    reply = client.completions.create(
        model="tiny", prompt="éa", echo=True, logprobs=1, max_tokens=0
    )
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.text_offset == [0, 0, 1]


@pytest.mark.parametrize("stream", [False, True])
def test_echo_repeats_the_prompt(
    client: openai.OpenAI, expected: list[RequestOutput], stream: bool
) -> None:
    reply: Any = client.completions.create(
        model="tiny", prompt=PROMPTS[0], echo=True, stream=stream, **GREEDY
    )
    chunks = reply if stream else [reply]
    text = "".join(choice.text for chunk in chunks for choice in chunk.choices)
    assert text == PROMPTS[0] + expected[0].outputs[0].text


def test_sixteen_tokens_are_the_default(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="tiny", prompt="The", extra_body={"ignore_eos": True, "allowed_token_ids": [70]}
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [[1], ["a"]]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({}, "prompt"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "best_of": 2}, "best_of"),  # of the same greedy answer
        ({"prompt": "a", "best_of": 1, "n": 2, "temperature": 1.0}, "best_of"),
        ({"prompt": "a", "best_of": 2, "temperature": 1.0, "stream": True}, "best_of"),
        ({"prompt": "a", "length_penalty": 1.0}, "length_penalty"),
        ({"prompt": "a", "early_stopping": True}, "early_stopping"),
        *(
            ({"prompt": "a", "use_beam_search": True, "n": 2, **fields}, param)
            for fields, param in (
                ({"stream": True}, "use_beam_search"),
                ({"n": 65}, "n"),
                ({"best_of": 65}, "best_of"),
                ({"best_of": 1}, "n"),
                ({"top_p": 0.9}, "top_p"),
                ({"seed": 1}, "seed"),
                ({"stop": ["a"]}, "stop"),
                ({"logprobs": 1, "echo": True}, "logprobs"),
                ({"prompt_logprobs": 1}, "prompt_logprobs"),
                ({"presence_penalty": 0.5}, "presence_penalty"),
                ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
                ({"early_stopping": "later"}, "early_stopping"),
                ({"max_tokens": 0, "echo": True}, "max_tokens"),
            )
        ),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": ["a"] * 100, "n": 3, "temperature": 1.0}, "n"),
        ({"prompt": ["a"] * 200, "n": 1, "max_tokens": 10**6}, None),
        ({"prompt": [999999]}, None),
        ({"prompt": [-1]}, None),
        ({"prompt": ""}, None),
        ({"prompt": "\ud800"}, None),
    ],
)
def test_what_is_wrong_is_named(server: RunningServer, body: Any, param: str | None) -> None:
    if param is None and body.get("max_tokens"):
        body = {**body, "prompt": ["a" * 10_000] * 2}  # longer than the context
    reply = httpx.post(
        f"{server.base_url}/v1/completions",
        content=json.dumps({"temperature": 0, **body}),
        headers={"Content-Type": "application/json"},
    )
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    if param is not None:
        assert error["param"].split(".")[0] == param
    server.wait_idle()


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 4, "length_penalty": 0.5, "early_stopping": "never"},
        {"n": 2, "best_of": 5, "top_p": 1.0, "presence_penalty": 0, "ignore_eos": True},
        {"n": 3, "logprobs": 2, "structured_outputs": {"regex": "[a-f]{2}-[0-9]+"}},
    ],
    ids=str,
)
def test_beam_search(server: RunningServer, fields: dict[str, Any]) -> None:
    form = fields.get("structured_outputs")
    search = BeamSearchParams(
        beam_width=fields.get("best_of", fields["n"]),
        n=fields["n"],
        max_tokens=10,
        length_penalty=fields.get("length_penalty", 1.0),
        early_stopping=fields.get("early_stopping", False),
        ignore_eos=fields.get("ignore_eos", False),
        logprobs=fields.get("logprobs"),
        structured_outputs=form and StructuredOutputsParams(**form),
    )
    expected = [server.call(server.engine.beam_search(prompt, search)) for prompt in PROMPTS]
    body = {"prompt": PROMPTS, "use_beam_search": True, "max_tokens": 10, **fields}
    reply = httpx.post(f"{server.base_url}/v1/completions", json=body)
    assert reply.status_code == 200, reply.text
    answers = [answer for output in expected for answer in output.outputs]
    choices = reply.json()["choices"]
    assert [choice["index"] for choice in choices] == list(range(2 * fields["n"]))
    assert [choice["text"] for choice in choices] == [answer.text for answer in answers]
    assert [c["finish_reason"] for c in choices] == [a.finish_reason for a in answers]
    for choice, answer in zip(choices, answers, strict=True):
        found = choice["logprobs"] and sum(choice["logprobs"]["token_logprobs"])
        wanted = answer.cumulative_logprob if "logprobs" in fields else None
        assert found == pytest.approx(wanted, abs=1e-4)
    server.wait_idle()


def test_the_likeliest_of_several_answers(server: RunningServer) -> None:
    body = {"prompt": PROMPTS[0], "seed": 3, "max_tokens": 9, "temperature": 1.0, "logprobs": 0}
    url = f"{server.base_url}/v1/completions"
    every = httpx.post(url, json={**body, "n": 5}).json()["choices"]
    best = httpx.post(url, json={**body, "n": 2, "best_of": 5}).json()["choices"]
    every.sort(key=lambda choice: -sum(choice["logprobs"]["token_logprobs"]))
    assert [choice["text"] for choice in best] == [choice["text"] for choice in every[:2]]
    assert [choice["index"] for choice in best] == [0, 1]


def test_tokens_of_a_text_and_back(server: RunningServer, expected: list[RequestOutput]) -> None:
    url = server.base_url
    reply = httpx.post(
        f"{url}/tokenize", json={"prompt": PROMPTS[0], "return_token_strs": True}
    ).json()
    assert reply["tokens"] == expected[0].prompt_token_ids
    assert reply["count"] == len(reply["tokens"])
    assert "".join(reply["token_strs"]) == PROMPTS[0]
    assert reply["max_model_len"] == 256
    back = httpx.post(f"{url}/detokenize", json={"tokens": reply["tokens"]}).json()
    assert back == {"prompt": PROMPTS[0]}


def test_tokens_of_a_chat_are_those_of_its_template(server: RunningServer) -> None:
    chat = {"messages": [{"role": "user", "content": "Hi"}]}
    reply = httpx.post(f"{server.base_url}/tokenize", json=chat).json()
    back = httpx.post(f"{server.base_url}/detokenize", json={"tokens": reply["tokens"]}).json()
    assert back["prompt"] == "<|user|>Hi<|end|><|assistant|>"


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("tokenize", {}),
        ("tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "x"}]}),
        ("tokenize", {"prompt": 5}),
        ("detokenize", {"tokens": [320]}),
        ("detokenize", {"tokens": [-1]}),
        ("detokenize", {"tokens": "abc"}),
    ],
)
def test_bad_token_requests_are_refused(server: RunningServer, route: str, body: Any) -> None:
    assert httpx.post(f"{server.base_url}/{route}", json=body).status_code == 400


def test_models_are_listed_under_all_names(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "alias"]
    assert client.models.retrieve("alias").max_model_len == 256  # type: ignore[attr-defined]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("org/other")
