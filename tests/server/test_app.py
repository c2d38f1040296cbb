"""What every request passes: keys, ids, errors, limits, the queue; and how requests end."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
from server_on_a_thread import RunningServer, running_server

from jaxllm import AsyncEngine
from jaxllm.server.app import short_name
from jaxllm.server.body import MAX_CONTAINERS, nesting
from jaxllm.server.errors import ApiError, to_api_error
from jaxllm.server.options import ServerOptions

CHAT: Any = {"messages": [{"role": "user", "content": "Hello"}], "temperature": 0}
LONG: Any = {**CHAT, "max_tokens": 230, "ignore_eos": True}
URL = "/v1/chat/completions"


@pytest.fixture(scope="module")
def http(server: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.base_url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def guarded(
    make_engine: Callable[[], AsyncEngine], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """With keys, an origin, a small queue and little patience."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("# of others\nthird-key\n")
    with running_server(
        make_engine,
        api_key=("first-key", "second-key"),
        api_key_file=keys,
        cors_origin=("https://page.example",),
        max_queued_requests=0,
        keep_alive_seconds=0.05,
    ) as server:
        server.wait_started()
        yield server
        server.wait_idle()


def authorized(server: RunningServer, key: str = "first-key") -> httpx.Client:
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.Client(base_url=server.base_url, headers=headers, timeout=60)


def check_error(reply: httpx.Response, status: int) -> dict[str, Any]:
    assert reply.status_code == status, reply.text
    assert set(reply.json()) == {"error"}
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize("key", ["first-key", "second-key", "third-key"])
def test_each_key_opens(guarded: RunningServer, key: str) -> None:
    with authorized(guarded, key) as client:
        assert client.get("/v1/models").status_code == 200
        assert client.get("/v1/models", headers={"Authorization": ""}).status_code == 401
        by_name = {"Authorization": "", "X-Api-Key": key}
        assert client.get("/v1/models", headers=by_name).status_code == 200


@pytest.mark.parametrize("key", ["", "Bearer", "Bearer wrong", "Basic first-key", "first-key"])
@pytest.mark.parametrize("route", ["/v1/models", URL, "/nowhere", "/tokenize", "/v1//models"])
def test_without_a_key_every_route_is_closed(guarded: RunningServer, key: str, route: str) -> None:
    reply = httpx.get(guarded.base_url + route, headers={"Authorization": key})
    assert check_error(reply, 401)["type"] == "authentication_error"
    assert reply.headers["WWW-Authenticate"] == "Bearer"
    client = openai.OpenAI(base_url=f"{guarded.base_url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_only_listed_origins_may_call(guarded: RunningServer) -> None:
    def preflight(origin: str) -> httpx.Response:
        headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        return httpx.options(guarded.base_url + URL, headers=headers)

    allowed = preflight("https://page.example")
    assert allowed.status_code == 204
    assert allowed.headers["Access-Control-Allow-Origin"] == "https://page.example"
    refused = preflight("https://evil.example")
    assert refused.status_code == 401
    assert "Access-Control-Allow-Origin" not in refused.headers


def test_errors_of_the_http_library_have_the_same_shape(http: httpx.Client) -> None:
    assert check_error(http.get("/nowhere"), 404)["code"] == "not_found"
    assert check_error(http.get(URL), 405)["code"] == "method_not_allowed"
    assert http.get(URL).headers["Allow"] == "POST"
    check_error(http.post(URL, content=b"{}", headers={"Content-Type": "text/plain"}), 415)
    packed = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    check_error(http.post(URL, content=b"{}", headers=packed), 415)
    for body in (b"", b"{", b"[]", b'{"a": NaN}', b'{"a": 1e999}', b"\xff", b"1" * 5000):
        reply = http.post(URL, content=body, headers={"Content-Type": "application/json"})
        check_error(reply, 400)


def test_a_long_body_is_read_as_a_short_one(http: httpx.Client) -> None:
    """It is parsed on a thread."""
    body = {"prompt": "a", "metadata": {"x": "y" * 100_000}, "max_tokens": 1, "unknown": 1}
    assert check_error(http.post("/v1/completions", json=body), 400)["param"] == "unknown"
    del body["unknown"]
    assert http.post("/v1/completions", json=body).status_code == 200


def test_a_request_id_of_the_client_is_checked_and_echoed(http: httpx.Client) -> None:
    own = http.get("/v1/models").headers["X-Request-Id"]
    assert len(own) == 32
    assert http.get("/v1/models").headers["X-Request-Id"] != own
    echoed = http.get("/v1/models", headers={"X-Request-Id": "my-id.7"})
    assert echoed.headers["X-Request-Id"] == "my-id.7"
    for bad in ("a" * 129, "a b", "<script>", "a,b"):
        reply = http.get("/v1/models", headers={"X-Request-Id": bad})
        check_error(reply, 400)
        assert bad not in reply.text
        assert reply.headers["X-Request-Id"] != bad


def test_nothing_of_an_unexpected_error_is_told(caplog: pytest.LogCaptureFixture) -> None:
    error = to_api_error(RuntimeError("/secret/path at 10.0.0.1"))
    assert (error.status, error.message) == (500, "internal error")
    assert "/secret/path" in caplog.text


def start_stream(server: RunningServer, key: str = "x") -> socket.socket:
    """A streamed request whose first tokens have come."""
    body = json.dumps({**LONG, "stream": True}).encode()
    sock = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    sock.sendall(
        f"POST {URL} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        + body
    )
    received = b""
    while received.count(b"data:") < 2:
        received += sock.recv(4096)
    return sock


def test_a_streaming_client_that_leaves_frees_its_blocks(server: RunningServer) -> None:
    sock = start_stream(server)
    assert server.context.num_live() == 1
    sock.close()
    server.wait_idle()
    computed = server.call(server.engine.stats()).num_computed_tokens
    time.sleep(0.1)
    assert server.call(server.engine.stats()).num_computed_tokens == computed


def test_a_waiting_client_that_leaves_frees_its_blocks(server: RunningServer) -> None:
    before = server.call(server.engine.stats()).num_generation_tokens
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(server.base_url + URL, json=LONG, timeout=0.05)
    server.wait_idle()
    assert server.call(server.engine.stats()).num_generation_tokens - before < 230


def test_a_full_queue_is_refused_before_anything_else(guarded: RunningServer) -> None:
    """The engine computes 8 at once and none may wait."""
    streams = [start_stream(guarded, "first-key") for _ in range(8)]
    with authorized(guarded) as client:
        guarded.context.live["held"] = 8  # however quick the machine is
        try:
            reply = client.post(URL, json=CHAT)
        finally:
            del guarded.context.live["held"]
    assert check_error(reply, 429)["type"] == "rate_limit_error"
    assert int(reply.headers["Retry-After"]) >= 1
    for sock in streams:
        sock.close()
    guarded.wait_idle()
    with authorized(guarded) as client:
        assert client.post(URL, json={**CHAT, "max_tokens": 1}).status_code == 200


class Hanging:
    """A runner whose steps wait until they are released, or fail."""

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        self.go = threading.Event()
        self.error: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.runner, name)

    def execute(self, batch: Any) -> Any:
        self.go.wait(20)
        if self.error is not None:
            raise self.error
        return self.runner.execute(batch)


@pytest.fixture
def hanging(guarded: RunningServer) -> Iterator[Hanging]:
    engine = guarded.engine.running.engine
    hanging = Hanging(engine.runner)
    engine.runner = hanging  # type: ignore[assignment]
    yield hanging
    hanging.go.set()
    guarded.wait_idle()
    engine.runner = hanging.runner


def test_a_silent_stream_gets_comments(guarded: RunningServer, hanging: Hanging) -> None:
    body = {**CHAT, "stream": True, "max_tokens": 2}
    with authorized(guarded) as client, client.stream("POST", URL, json=body) as reply:
        assert reply.headers["Content-Type"].startswith("text/event-stream")
        lines = []
        for line in reply.iter_lines():
            lines.append(line)
            if lines.count(": keep-alive") == 2:
                hanging.go.set()
    assert lines.count(": keep-alive") >= 2
    assert lines[-2] == "data: [DONE]"


def test_a_failed_step_is_a_500_or_an_error_chunk_and_the_next_request_is_served(
    guarded: RunningServer, hanging: Hanging
) -> None:
    hanging.error = RuntimeError("/secret/path")
    with authorized(guarded) as client:
        hanging.go.set()
        reply = client.post(URL, json=CHAT)
        assert "secret" not in check_error(reply, 500)["message"]
        hanging.go.clear()
        text = ""
        with client.stream("POST", URL, json={**CHAT, "stream": True}) as stream:
            for line in stream.iter_lines():
                text += line + "\n"
                if "keep-alive" in line:  # the headers have gone out
                    hanging.go.set()
        assert stream.status_code == 200
        assert '"error":{"message"' in text
        assert text.rstrip().endswith("data: [DONE]")
        assert "secret" not in text
        hanging.error = None
        assert client.post(URL, json={**CHAT, "max_tokens": 2}).status_code == 200


def test_requests_are_refused_until_the_model_is_there(
    make_engine: Callable[[], AsyncEngine],
) -> None:
    go = threading.Event()

    def start() -> AsyncEngine:
        assert go.wait(20)
        return make_engine()

    with running_server(start) as server:
        url = server.base_url
        assert httpx.get(f"{url}/v1/models").status_code == 200
        reply = httpx.post(url + URL, json=CHAT)
        assert check_error(reply, 503)["code"] == "starting"
        assert "Retry-After" in reply.headers
        go.set()
        server.wait_started()
        assert httpx.post(url + URL, json={**CHAT, "max_tokens": 1}).status_code == 200
        server.context.status = "draining"
        assert check_error(httpx.post(url + URL, json=CHAT), 503)["code"] == "draining"


def test_a_model_that_cannot_be_loaded_is_told_without_its_path() -> None:
    def start() -> AsyncEngine:
        raise ValueError("/secret/model is broken")

    with running_server(start) as server:
        server.call(server.context.started.wait())
        reply = httpx.post(server.base_url + URL, json=CHAT)
        assert check_error(reply, 503)["code"] == "failed"
        assert "secret" not in reply.text
        assert str(server.context.failure) == "/secret/model is broken"


def test_a_slow_reader_does_not_hold_others_up(server: RunningServer) -> None:
    slow = [start_stream(server) for _ in range(3)]
    started = time.monotonic()
    reply = httpx.post(server.base_url + URL, json={**CHAT, "max_tokens": 3}, timeout=30)
    assert reply.status_code == 200
    assert time.monotonic() - started < 10
    for sock in slow:
        sock.close()
    server.wait_idle()


@pytest.mark.parametrize(
    ("raw", "depth"),
    [
        (b"", 0),
        (b"[]", 1),
        (b'{"a": [1, {"b": 2}], "c": []}', 3),
        (b'"[[[["', 0),
        (rb'{"a": "\"[[[", "b": [0]}', 2),
        (rb'["\\", [1]]', 2),
        (b'["unended [[[', 1),
        (b"[" * 1000, 1000),
    ],
)
def test_nesting_is_counted_outside_of_strings(raw: bytes, depth: int) -> None:
    assert nesting(raw, limit=1000) == depth


def test_nesting_stops_where_it_is_too_deep_or_too_much() -> None:
    assert nesting(b"[" * 10**6, limit=64) == 65
    with pytest.raises(ApiError, match=f"{MAX_CONTAINERS}"):
        nesting(b"[" + b"[]," * 200_000, limit=64)


def test_names_of_models_tell_nothing_of_the_machine(tmp_path: Path) -> None:
    (tmp_path / "llama").mkdir()
    assert short_name(str(tmp_path / "llama")) == "llama"
    assert short_name(str(tmp_path / "some.gguf")) == "some"
    assert short_name("org/model") == "org/model"


@pytest.mark.parametrize(
    "options",
    [
        {"port": 70000},
        {"tls_cert": Path("cert.pem")},
        {"log_format": "xml"},
        {"max_body_bytes": 0},
        {"request_timeout": 0.0},
        {"max_queued_requests": -1},
        {"api_key": ("",)},
        {"api_key": ("schlüssel",)},
    ],
)
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        ServerOptions(**options)


def test_an_idle_loop_is_not_needed_to_shut_down(make_engine: Callable[[], AsyncEngine]) -> None:
    """A server that is closed with a stream open ends it."""
    with running_server(make_engine) as server:
        server.wait_started()
        sock = start_stream(server)
        server.call(server.context.abort_all())
        received = b""
        while b"[DONE]" not in received:
            piece = sock.recv(65536)
            assert piece
            received += piece
        assert b'"finish_reason":"abort"' in received
        assert asyncio.run_coroutine_threadsafe(asyncio.sleep(0), server.loop).result(5) is None
        sock.close()
