"""Clients that mean harm: refused at once, and without costing memory."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator

import psutil
import pydantic
import pytest
from loop_lag import lag_of
from server_on_a_thread import RunningServer, running_server

from jaxllm.async_engine import AsyncEngine
from jaxllm.server import replies
from jaxllm.server.openapi import OPERATIONS

pytestmark = pytest.mark.alone  # it bounds times and memory
MIB = 2**20
CHAT = "/v1/chat/completions"


@pytest.fixture
def victim(server: RunningServer) -> Iterator[RunningServer]:
    """The shared server, which afterwards serves on and holds no more memory than before."""
    process = psutil.Process()
    before = process.memory_info().rss
    yield server
    grown = (process.memory_info().rss - before) / MIB
    assert grown < 50, f"{grown:.0f} MiB more"
    assert exchange(server.port, b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")[0] == 200
    server.wait_idle()


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=10)


def read_answer(sock: socket.socket) -> tuple[int, bytes]:
    """The status and the bytes of an answer; status 0 if the server hung up without one."""
    data = b""
    sock.settimeout(3)
    try:
        while b"\r\n\r\n" not in data or not _is_whole(data):
            piece = sock.recv(65536)
            if not piece:
                break
            data += piece
    except ConnectionResetError:
        pass
    return (int(data.split(b" ", 2)[1]) if data.startswith(b"HTTP/1.") else 0), data


def _is_whole(data: bytes) -> bool:
    head, _, body = data.partition(b"\r\n\r\n")
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return len(body) >= int(value)
    return False


def exchange(port: int, request: bytes) -> tuple[int, bytes]:
    with connect(port) as sock:
        with contextlib.suppress(ConnectionError):  # refused before it was read to its end
            sock.sendall(request)
        return read_answer(sock)


def post(body: bytes, *headers: str, path: str = CHAT) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def check_refusal(answer: tuple[int, bytes], *statuses: int) -> None:
    status, data = answer
    assert status in statuses, data[:300]
    error = json.loads(data.partition(b"\r\n\r\n")[2])["error"]
    assert error["message"]
    assert "Traceback" not in data.decode()


def send_until_refused(sock: socket.socket, piece: bytes, total: int) -> None:
    """The same piece again and again, as long as the server takes it."""
    with contextlib.suppress(ConnectionError, TimeoutError):
        for _ in range(0, total, len(piece)):
            sock.sendall(piece)


def within_a_second(work: Callable[[], None]) -> None:
    started = time.monotonic()
    work()
    assert time.monotonic() - started < 1


def test_announced_body_of_100_mb(victim: RunningServer) -> None:
    def attack() -> None:
        with connect(victim.port) as sock:
            sock.sendall(post(b"", f"Content-Length: {100 * MIB}"))
            check_refusal(read_answer(sock), 413)

    within_a_second(attack)


def test_announced_body_of_100_mb_that_is_sent(victim: RunningServer) -> None:
    def attack() -> None:
        with connect(victim.port) as sock:
            sock.sendall(post(b"", f"Content-Length: {100 * MIB}"))
            send_until_refused(sock, b" " * 65536, 100 * MIB)
            assert read_answer(sock)[0] in (0, 413)  # a reset may overtake the answer

    within_a_second(attack)


def test_chunked_body_without_end(victim: RunningServer) -> None:
    chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"

    def attack() -> None:
        with connect(victim.port) as sock:
            sock.settimeout(1)
            sock.sendall(post(b"", "Transfer-Encoding: chunked"))
            send_until_refused(sock, chunk, 100 * MIB)
            assert read_answer(sock)[0] in (0, 413)

    within_a_second(attack)


def test_ten_thousand_headers(victim: RunningServer) -> None:
    headers = [f"X-Header-{i}: value" for i in range(10_000)]
    request = post(b"", *headers)
    within_a_second(lambda: check_refusal(exchange(victim.port, request), 400, 431))


def test_header_without_end(victim: RunningServer) -> None:
    request = post(b"", "X-Long: " + "a" * MIB)
    within_a_second(lambda: check_refusal(exchange(victim.port, request), 400, 431))


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'{"messages":['])
def test_json_a_thousand_deep(victim: RunningServer, opening: bytes) -> None:
    body = opening * 1000
    request = post(body, f"Content-Length: {len(body)}")
    within_a_second(lambda: check_refusal(exchange(victim.port, request), 400))


def test_deep_json_in_a_field_that_may_hold_any(victim: RunningServer) -> None:
    deep = '{"a":' * 1000 + "1" + "}" * 1000
    body = ('{"model":"tiny","messages":[{"role":"user","content":"a"}],'
            f'"chat_template_kwargs":{deep}}}').encode()  # fmt: skip
    request = post(body, f"Content-Length: {len(body)}")
    within_a_second(lambda: check_refusal(exchange(victim.port, request), 400))


LARGE: list[tuple[str, bytes, bytes]] = [
    ("chat/completions", b'{"messages":[', content) for content in (b"[],", b"{},", b"1,")
] + [
    ("completions", b'{"prompt":[', b"1,"),  # nothing is wrong with it but its length
    ("completions", b'{"prompt":[', b"true,"),
    ("completions", b'{"prompt":["a"],"stop":[', b"1,"),
    ("embeddings", b'{"input":[', b"1,"),
]  # fmt: skip


@pytest.mark.parametrize(("route", "start", "content"), LARGE)
def test_large_body_does_not_hold_others_up(
    victim: RunningServer, route: str, start: bytes, content: bytes
) -> None:
    """What is slow to check comes within the limit of size."""
    body = start + content * ((4 * MIB - 40) // len(content)) + b"1]}"
    request = post(body, f"Content-Length: {len(body)}", path=f"/v1/{route}")
    with lag_of(victim.loop) as lags:
        check_refusal(exchange(victim.port, request), 400)
    assert max(lags) < 0.3


@pytest.mark.parametrize(("route", "start", "content"), LARGE)
def test_of_many_errors_few_are_kept(route: str, start: bytes, content: bytes) -> None:
    """Each would take half a kilobyte."""
    model = {operation.path: operation.body for operation in OPERATIONS}[f"/v1/{route}"]
    assert model is not None
    body = json.loads(start + content * 1000 + b"null]}")
    with pytest.raises(pydantic.ValidationError) as refused:
        model.model_validate(body)
    assert refused.value.error_count() < 10


@pytest.mark.parametrize("rubbish", [b"\x16\x03\x01\x02\x00\x01", b"GET\r\n\r\n", b"\0" * 5000])
def test_what_is_no_http(victim: RunningServer, rubbish: bytes) -> None:
    def attack() -> None:
        with connect(victim.port) as sock:
            sock.sendall(rubbish + b"\r\n\r\n")
            assert read_answer(sock)[0] == 400

    within_a_second(attack)


def check_page(port: int) -> None:
    assert exchange(port, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")[0] == 200


# ---- slow ones


@pytest.fixture(scope="module")
def impatient(make_engine: Callable[[], AsyncEngine]) -> Iterator[RunningServer]:
    """A server that waits half a second for headers, and for a body."""
    with running_server(make_engine, header_timeout=0.5, body_timeout=0.5) as server:
        server.wait_started()
        yield server


def seconds_until_closed(sock: socket.socket, drip: bytes) -> float:
    """Sends a byte now and then until the server hangs up."""
    started = time.monotonic()
    sock.settimeout(0.05)
    while time.monotonic() - started < 5:
        try:
            sock.sendall(drip)
            if not sock.recv(4096):
                break
        except TimeoutError:
            continue
        except ConnectionError:
            break
    return time.monotonic() - started


@pytest.mark.parametrize("start", [b"POST ", b"POST / HTTP/1.1\r\nHost: x\r\nX-A: "])
def test_slow_loris_is_cut_off(impatient: RunningServer, start: bytes) -> None:
    with connect(impatient.port) as sock:
        sock.sendall(start)
        assert 0.4 < seconds_until_closed(sock, b"a") < 1.5


def test_silent_client_is_cut_off(impatient: RunningServer) -> None:
    with connect(impatient.port) as sock:
        assert 0.4 < seconds_until_closed(sock, b"") < 1.5


def test_slow_second_request_is_cut_off(impatient: RunningServer) -> None:
    """Also on a connection whose first request was a good one."""
    with connect(impatient.port) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert read_answer(sock)[0] == 200
        sock.sendall(b"GET / HTTP/1.1\r\n")
        assert 0.4 < seconds_until_closed(sock, b"a") < 1.5


def test_slow_body_is_cut_off(impatient: RunningServer) -> None:
    with connect(impatient.port) as sock:
        sock.sendall(post(b"{", "Content-Length: 1000"))
        assert 0.4 < seconds_until_closed(sock, b" ") < 3


def test_two_hundred_loris_do_not_keep_others_out(impatient: RunningServer) -> None:
    socks = [connect(impatient.port) for _ in range(200)]
    try:
        for sock in socks:
            sock.sendall(b"GET / HTTP/1.1\r\n")
        within_a_second(lambda: check_page(impatient.port))
    finally:
        for sock in socks:
            sock.close()


# ---- expectations, and clients that do not read


def test_a_body_is_invited_only_after_its_headers_are_checked(victim: RunningServer) -> None:
    body = b'{"model":"tiny","messages":[{"role":"user","content":"a"}],"max_tokens":1}'
    head = post(b"", f"Content-Length: {len(body)}", "Expect: 100-Continue")
    with connect(victim.port) as sock:
        sock.sendall(head)
        assert sock.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(body)
        assert read_answer(sock)[0] == 200
    too_large = post(b"", f"Content-Length: {100 * MIB}", "Expect: 100-continue")
    check_refusal(exchange(victim.port, too_large), 413)


@pytest.mark.parametrize("method", ["GET /v1/models", "POST /v1/completions", "GET /nowhere"])
def test_another_expectation_is_refused(victim: RunningServer, method: str) -> None:
    request = f"{method} HTTP/1.1\r\nHost: x\r\nExpect: a miracle\r\n\r\n".encode()
    status, data = exchange(victim.port, request)
    assert status == 417
    if method != "GET /nowhere":  # which aiohttp itself answers
        check_refusal((status, data), 417)


def test_a_stream_that_nobody_reads_is_cut_off(
    make_engine: Callable[[], AsyncEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It frees its place for others. Each chunk is made larger than what the kernel buffers."""
    monkeypatch.setattr(replies, "event", lambda data: f"data: {'x' * 10**6}\n\n")
    options = {"write_timeout": 0.5, "max_queued_requests": 0}
    with running_server(make_engine, **options) as server, connect(server.port) as sock:
        server.wait_started()
        body = json.dumps(
            {"messages": [{"role": "user", "content": "a"}], "n": 8, "temperature": 1.0,
             "max_tokens": 50, "ignore_eos": True, "stream": True}
        ).encode()  # fmt: skip
        sock.sendall(post(body, f"Content-Length: {len(body)}"))
        deadline = time.monotonic() + 10
        while not server.context.live:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        server.wait_idle()
