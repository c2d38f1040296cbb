"""POST /v1/embeddings with the openai client, against transformers' last hidden state."""

from __future__ import annotations

import base64
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import requests
import torch
from server_on_a_thread import RunningServer
from torch_reference import TorchModel

TEXTS = ["The quick brown fox", "Once upon a time", "The dog sleeps; the fox doesn't."]


@pytest.fixture(scope="module")
def reference(tiny_llama_folder: Path) -> TorchModel:
    return TorchModel.from_folder(tiny_llama_folder)


@pytest.fixture
def client(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0)


def expected(reference: TorchModel, tokens: list[int], pooling: str = "mean") -> np.ndarray:
    """[E], not normalized."""
    with torch.no_grad():
        hidden = reference.module.model(torch.tensor([tokens])).last_hidden_state[0].numpy()
    result: np.ndarray = hidden.mean(axis=0) if pooling == "mean" else hidden[-1]
    return result


def normalized(vector: np.ndarray) -> np.ndarray:
    result: np.ndarray = vector / np.linalg.norm(vector)
    return result


def check(actual: Any, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(np.array(actual), wanted, atol=1e-4, rtol=1e-4)


def tokens_of(server: RunningServer, text: str) -> list[int]:
    return server.engine.get_tokenizer().encode(text)


def test_one_text(server: RunningServer, client: openai.OpenAI, reference: TorchModel) -> None:
    reply = client.embeddings.create(model="tiny", input=TEXTS[0])  # asks for base64
    tokens = tokens_of(server, TEXTS[0])
    assert reply.object == "list"
    assert reply.model == "tiny"
    assert (reply.usage.prompt_tokens, reply.usage.total_tokens) == (len(tokens), len(tokens))
    (item,) = reply.data
    assert (item.object, item.index) == ("embedding", 0)
    check(item.embedding, normalized(expected(reference, tokens)))


@pytest.mark.parametrize("as_tokens", [False, True])
@pytest.mark.parametrize("encoding_format", ["float", "base64"])
def test_several_inputs_in_their_order(
    server: RunningServer,
    client: openai.OpenAI,
    reference: TorchModel,
    as_tokens: bool,
    encoding_format: Any,
) -> None:
    tokens = [tokens_of(server, text) for text in TEXTS]
    given: Any = tokens if as_tokens else TEXTS
    reply = client.embeddings.create(model="alias", input=given, encoding_format=encoding_format)
    assert reply.model == "alias"
    assert [item.index for item in reply.data] == [0, 1, 2]
    assert reply.usage.prompt_tokens == sum(len(each) for each in tokens)
    for item, each in zip(reply.data, tokens, strict=True):
        vector = item.embedding
        if encoding_format == "base64":  # asked for by name, the client leaves it as it is
            vector = np.frombuffer(base64.b64decode(str(vector)), "<f4").tolist()
        check(vector, normalized(expected(reference, each)))


def test_one_list_of_token_ids_is_one_input(client: openai.OpenAI, reference: TorchModel) -> None:
    (item,) = client.embeddings.create(model="tiny", input=[5, 6, 7, 300]).data
    check(item.embedding, normalized(expected(reference, [5, 6, 7, 300])))


def test_dimensions_pooling_and_normalize(client: openai.OpenAI, reference: TorchModel) -> None:
    tokens = [9, 8, 7, 100, 200]
    whole = expected(reference, tokens, "last")
    for normalize in (True, False):
        wanted = normalized(whole[:7]) if normalize else whole[:7]
        body = {"pooling": "last", "normalize": normalize}
        (item,) = client.embeddings.create(
            model="tiny", input=tokens, dimensions=7, extra_body=body
        ).data
        check(item.embedding, wanted)


def test_concurrent_clients_get_their_own(client: openai.OpenAI, reference: TorchModel) -> None:
    random = np.random.default_rng(0)
    prompts = [random.integers(2, 320, length).tolist() for length in range(1, 100, 5)]
    with ThreadPoolExecutor(8) as pool:
        replies = pool.map(lambda p: client.embeddings.create(model="tiny", input=p), prompts)
        for prompt, reply in zip(prompts, replies, strict=True):
            check(reply.data[0].embedding, normalized(expected(reference, prompt)))


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"input": ""}, "input", "input 0 is empty"),
        ({"input": []}, "input", "input must not be empty"),
        ({"input": ["a", ""]}, "input", "input 1 is empty"),
        ({"input": [[1], []]}, "input", "input 1 is empty"),
        ({"input": [999]}, "input", "outside the vocabulary of 320"),
        ({"input": [5] * 257}, "input", "max_model_len is 256"),
        ({"input": [[5]] * 257}, "input", "257 inputs; the limit is 256"),
        ({"input": "a", "dimensions": 65}, "dimensions", "between 1 and 64"),
        ({"input": "a", "dimensions": 0}, "dimensions", "greater than or equal to 1"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format", "'float' or 'base64'"),
        ({"input": "a", "pooling": "cls"}, "pooling", "'mean' or 'last'"),
        ({"input": "a", "normalize": 1}, "normalize", "boolean"),
        ({"input": "a", "max_tokens": 5}, "max_tokens", "unknown field 'max_tokens'"),
        ({"input": "a", "priority": 5}, "priority", "priority 5 has no effect"),
        ({}, "input", "input is missing"),
    ],
)
def test_bad_requests_name_the_field(
    server: RunningServer, fields: dict[str, Any], param: str, message: str
) -> None:
    reply = requests.post(f"{server.base_url}/v1/embeddings", json=fields, timeout=30)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (400, param)
    assert message in error["message"]


def test_an_unknown_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.embeddings.create(model="other", input="a")


def test_a_request_whose_time_is_over_has_no_result(
    server: RunningServer, client: openai.OpenAI
) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        client.embeddings.create(
            model="tiny", input=[[5] * 256] * 100, extra_body={"timeout": 1e-6}
        )
    assert (caught.value.status_code, caught.value.code) == (503, "timeout")
    server.wait_idle()
