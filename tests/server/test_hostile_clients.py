"""Clients that mean harm: refused at once, and without costing memory."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator

import psutil
import pytest
from loop_lag import lag_of
from server_on_a_thread import RunningServer, running_server

from jaxllm.async_engine import AsyncEngine

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


def post(body: bytes, *headers: str) -> bytes:
    lines = [f"POST {CHAT} HTTP/1.1", "Host: x", "Content-Type: application/json", *headers]
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


@pytest.mark.parametrize("content", [b"[],", b"{},"])
def test_large_body_does_not_hold_others_up(victim: RunningServer, content: bytes) -> None:
    """What is slow to check comes within the limit of size."""
    body = b'{"messages":[' + content * ((8 * MIB - 20) // len(content)) + b"1]}"
    with lag_of(victim.loop) as lags:
        check_refusal(exchange(victim.port, post(body, f"Content-Length: {len(body)}")), 400)
    assert max(lags) < 0.3


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
