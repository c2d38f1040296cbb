"""A server of the tiny model on a loopback port, shared by the tests of a session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from scripted_chat import ScriptedChat
from server_on_a_thread import RunningServer, running_server

from jaxllm import AsyncEngine


@pytest.fixture(scope="session")
def make_engine(tiny_llama_folder: Path, tiny_llm: dict[str, Any]) -> Callable[[], AsyncEngine]:
    """Makes an engine of the tiny model; its programs are compiled once a session."""
    return lambda: AsyncEngine(str(tiny_llama_folder), **tiny_llm)


@pytest.fixture(scope="session")
def server(make_engine: Callable[[], AsyncEngine]) -> Iterator[RunningServer]:
    """The server that tests share; one that leaves something behind harms others."""
    with running_server(make_engine, served_model_name=("tiny", "alias")) as running:
        running.wait_started()
        yield running
        running.wait_idle()


@pytest.fixture
def script(tool_server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> ScriptedChat:
    """In place of the model of the test file's own `tool_server`."""
    script = ScriptedChat()
    monkeypatch.setattr(tool_server.engine, "chat", script.chat)
    return script


@pytest.fixture(scope="session")
def base_url(server: RunningServer) -> str:
    return server.base_url
