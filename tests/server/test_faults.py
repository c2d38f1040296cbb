"""Faults of the engine under a server: the right status, nothing left behind, and the next request
succeeds."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import requests
from safetensors.numpy import load_file, save_file
from server_on_a_thread import RunningServer, running_server

from jaxllm import AsyncEngine
from jaxllm.engine.sequence import Batch, StepHandle, StepResult
from jaxllm.engine_options import EngineOptions
from jaxllm.server import generation
from jaxllm.startup import start_engine

POISON = 300  # a token whose embedding is NaN
HANG_SECONDS = 0.3
GREEDY: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 8, "ignore_eos": True}
GREEDY |= {"banned_token_ids": [POISON]}


class FaultyHandle:
    def __init__(self, handle: StepHandle, after: Callable[[], None]) -> None:
        self._handle, self._after = handle, after

    def result(self) -> StepResult:
        self._after()
        return self._handle.result()


class FaultyRunner:
    """A real runner with faults. before is called with each batch when it is to be run, after when
    its result is waited for; what they raise or do happens to the step."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self.repair()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def repair(self) -> None:
        self.before: Callable[[Batch], None] = lambda batch: None
        self.after: Callable[[], None] = lambda: None

    def execute(self, batch: Batch) -> FaultyHandle:
        self.before(batch)
        return FaultyHandle(self._runner.execute(batch), self.after)


@pytest.fixture(scope="module")
def poisoned_folder(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a token that makes everything after it NaN, on the device itself."""
    folder = tmp_path_factory.mktemp("poisoned")
    shutil.copytree(tiny_llama_folder, folder, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][POISON] = np.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def shared(poisoned_folder: Path, tiny_llm: dict[str, Any]) -> Iterator[RunningServer]:
    def start() -> AsyncEngine:
        running = start_engine(str(poisoned_folder), EngineOptions(**tiny_llm))
        runner: Any = FaultyRunner(running.runner)
        running.engine.runner = runner
        return AsyncEngine.from_running(replace(running, runner=runner))

    with running_server(start, served_model_name=("tiny",), hang_seconds=HANG_SECONDS) as server:
        server.wait_started()
        yield server


@pytest.fixture
def faulty(shared: RunningServer, client: openai.OpenAI) -> Iterator[RunningServer]:
    """After each test the server answers, and holds nothing."""
    yield shared
    runner_of(shared).repair()
    assert complete(client, [5, 6]).usage.completion_tokens == 8
    assert requests.get(f"{shared.base_url}/health", timeout=10).status_code == 200
    shared.wait_idle()


@pytest.fixture
def client(shared: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{shared.base_url}/v1", api_key="none", max_retries=0)


def runner_of(server: RunningServer) -> FaultyRunner:
    runner: Any = server.engine.running.runner
    return runner


def complete(client: openai.OpenAI, prompt: Any, **fields: Any) -> Any:
    return client.completions.create(model="tiny", prompt=prompt, extra_body={**GREEDY, **fields})


def text_or_error(client: openai.OpenAI, prompt: list[int], max_tokens: int) -> str:
    try:
        reply = complete(client, prompt, max_tokens=max_tokens)
    except openai.APIStatusError as error:
        return f"status {error.status_code}"
    text: str = reply.choices[0].text
    return text


def explode(*_: Any) -> None:
    raise RuntimeError("secret of the device")


def health(server: RunningServer) -> tuple[int, dict[str, Any]]:
    reply = requests.get(f"{server.base_url}/health", timeout=10)
    return reply.status_code, reply.json()


def events_of(server: RunningServer, **fields: Any) -> tuple[list[Any], bool]:
    """The chunks of a streamed completion, and whether it ended with [DONE]."""
    body = {**GREEDY, "stream": True, **fields}
    with requests.post(
        f"{server.base_url}/v1/completions", json=body, stream=True, timeout=30
    ) as reply:
        assert reply.status_code == 200
        lines = [line[6:] for line in reply.text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"], lines[-1] == "[DONE]"


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_step_that_raises_is_a_500_without_details(
    faulty: RunningServer, client: openai.OpenAI, moment: str
) -> None:
    setattr(runner_of(faulty), moment, explode)
    calls: list[Callable[[], Any]] = [
        lambda: complete(client, "The dog"),
        lambda: client.embeddings.create(model="tiny", input="The dog"),
        lambda: client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "Hi"}], max_tokens=3
        ),
    ]
    for call in calls:
        with pytest.raises(openai.InternalServerError) as caught:
            call()
        assert caught.value.status_code == 500
        assert "secret" not in caught.value.response.text
        assert caught.value.response.json()["error"]["type"] == "server_error"
    assert health(faulty)[0] == 200  # a failed step is no reason to be taken down


def test_a_stream_that_fails_half_way_ends_with_an_error(faulty: RunningServer) -> None:
    steps: list[Batch] = []

    def explode_later(batch: Batch) -> None:
        steps.append(batch)
        if len(steps) == 4:
            explode()

    runner_of(faulty).before = explode_later
    chunks, is_done = events_of(faulty, prompt=[5, 6, 7])
    assert [list(chunk) == ["error"] for chunk in chunks[-2:]] == [False, True]
    assert "secret" not in json.dumps(chunks[-1])
    assert chunks[-1]["error"]["type"] == "server_error"
    assert is_done


def test_waiting_requests_survive_a_step_that_raises(
    faulty: RunningServer, client: openai.OpenAI
) -> None:
    """Only the sequences of the failed step end; those that had no slot are computed after it."""
    failed: list[int] = []

    def explode_when_full(batch: Batch) -> None:
        if faulty.engine.running.engine.scheduler.num_waiting >= 4 and not failed:
            failed.append(len(batch.sequences))
            explode()

    def ask(prompt: list[int]) -> str:
        return text_or_error(client, prompt, max_tokens=60)

    prompts = [[5, 6, 7 + n] for n in range(16)]  # the engine runs 8 at once
    expected = [ask(prompt) for prompt in prompts]
    runner_of(faulty).before = explode_when_full
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(ask, prompts))
    assert len(failed) == 1
    assert 0 < answers.count("status 500") <= failed[0]
    for answer, wanted in zip(answers, expected, strict=True):
        assert answer in ("status 500", wanted)


def test_a_step_that_hangs_is_told_by_health_and_ends_with_the_deadline(
    faulty: RunningServer, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "GRACE_SECONDS", 0.2)
    go_on = threading.Event()

    def wait(batch: Batch) -> None:
        go_on.wait(30)

    runner_of(faulty).before = wait
    try:
        started = time.monotonic()
        choices: list[dict[str, Any]] = [{}, {"n": 2, "temperature": 1.0}]
        for fields in choices:
            with pytest.raises(openai.InternalServerError) as caught:
                complete(client, "The dog", timeout=0.3, **fields)
            assert (caught.value.status_code, caught.value.code) == (503, "timeout")
            assert "Retry-After" in caught.value.response.headers
        assert time.monotonic() - started < 10
        status, body = health(faulty)
        assert status == 503
        assert "a step has been under way for" in body["reason"]
        assert not faulty.context.live  # the clients' requests are over, whatever the engine does
        assert requests.get(f"{faulty.base_url}/v1/models", timeout=10).status_code == 200
        assert requests.get(f"{faulty.base_url}/metrics", timeout=10).status_code == 200
    finally:
        go_on.set()
    runner_of(faulty).repair()
    deadline = time.monotonic() + 10
    while health(faulty)[0] != 200:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_nan_ends_its_own_sequence_and_no_other(
    faulty: RunningServer, client: openai.OpenAI
) -> None:
    def ask(prompt: list[int]) -> str:
        return text_or_error(client, prompt, max_tokens=40)

    start = [*range(5, 25)]  # shared by all: a block of 16 and more
    prompts = [[*start, POISON if n % 3 == 0 else 30 + n, 40 + n] for n in range(12)]
    prompts += [[POISON, *start], [*start, POISON, *start], start]
    expected = ["status 500" if POISON in prompt else ask(prompt) for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        for _ in range(3):
            assert list(pool.map(ask, prompts)) == expected


def test_nan_ends_streams_and_embeddings_too(faulty: RunningServer, client: openai.OpenAI) -> None:
    good: Any = client.embeddings.create(model="tiny", input=[[5, 6, 7]]).data[0].embedding
    for pooling in ("mean", "last"):
        with pytest.raises(openai.InternalServerError) as caught:
            client.embeddings.create(
                model="tiny", input=[[5, 6, 7], [5, POISON, 7]], extra_body={"pooling": pooling}
            )
        assert caught.value.status_code == 500
    again: Any = client.embeddings.create(model="tiny", input=[[5, 6, 7]]).data[0].embedding
    assert again == good
    reply = requests.post(
        f"{faulty.base_url}/v1/completions",
        json={**GREEDY, "stream": True, "prompt": [5, POISON]},
        timeout=30,
    )
    assert reply.status_code == 500 or '"error"' in reply.text
    assert "choices" not in reply.text


def test_a_tokenizer_that_raises_harms_its_request(
    faulty: RunningServer, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = faulty.engine.get_tokenizer()
    encode = tokenizer.encode

    def encode_or_raise(text: str, *args: Any, **options: Any) -> list[int]:
        if "bad" in text:
            explode()
        return encode(text, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(type(tokenizer), "encode", lambda self, *a, **k: encode_or_raise(*a, **k))
        for call in (
            lambda: complete(client, "bad text"),
            lambda: complete(client, ["good", "bad"]),
            lambda: client.embeddings.create(model="tiny", input=["good", "bad"]),
        ):
            with pytest.raises(openai.InternalServerError) as caught:
                call()
            assert caught.value.response.json()["error"]["message"] == "internal error"
        assert complete(client, "good text").choices[0].text


def test_a_detokenizer_that_raises_ends_its_answer(
    faulty: RunningServer, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jaxllm.text.detokenizer import IncrementalDetokenizer

    with monkeypatch.context() as patch:
        patch.setattr(IncrementalDetokenizer, "push", explode)
        with pytest.raises(openai.InternalServerError) as caught:
            complete(client, "The dog", stop=["@@"])
        assert caught.value.status_code == 500
        assert "secret" not in caught.value.response.text
