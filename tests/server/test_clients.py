"""What users type and what their clients do by themselves: curl from the README, and retries."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import openai
import pytest
from server_on_a_thread import RunningServer, running_server

from jaxllm import AsyncEngine
from jaxllm.server.context import ServerContext
from jaxllm.server.errors import RETRY_AFTER, ApiError

MESSAGES: Any = [{"role": "user", "content": "Hello"}]


def curl(*arguments: str) -> str:
    command = ["curl", "--silent", "--show-error", "--max-time", "30", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl on this machine")
def test_curl(server: RunningServer) -> None:
    url = f"{server.base_url}/v1/chat/completions"
    body: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 4}
    header = ["-H", "Content-Type: application/json"]
    whole = json.loads(curl(url, *header, "-d", json.dumps(body)))
    assert whole["choices"][0]["message"]["role"] == "assistant"
    stream = curl("-N", url, *header, "-d", json.dumps({**body, "stream": True}))
    assert stream.startswith('data: {"id":"chatcmpl-')
    assert stream.endswith("data: [DONE]\n\n")
    refused = curl("-o", "/dev/null", "-w", "%{http_code}", url, *header, "-d", "{")
    assert refused == "400"


def test_the_client_tries_again_when_the_queue_is_full(
    make_engine: Callable[[], AsyncEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals = iter([ApiError(429, "full", headers=RETRY_AFTER), ApiError(503, "busy")])
    check_room = ServerContext.check_room

    def full_at_first(context: ServerContext, num_answers: int) -> None:
        for refusal in refusals:
            raise refusal
        check_room(context, num_answers)

    monkeypatch.setattr(ServerContext, "check_room", full_at_first)
    with running_server(make_engine, served_model_name=("tiny",)) as one:
        one.wait_started()
        client = openai.OpenAI(base_url=f"{one.base_url}/v1", api_key="none", max_retries=2)
        reply = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=2)
        assert reply.choices[0].finish_reason in ("length", "stop")
        assert next(refusals, None) is None
