"""/health, /ready, /version, /load, /metrics and /debug/engine, of a server that is idle, busy,
hung, starting, draining and dead."""

from __future__ import annotations

import asyncio
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from server_on_a_thread import RunningServer, running_server

import jaxllm
from jaxllm import AsyncEngine
from jaxllm.engine.sequence import Batch
from jaxllm.server.operations import RateMeter


def fetch(url: str, body: Any = None) -> tuple[int, Any]:
    """Status and JSON (else text) of a response."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            status, text = response.status, response.read().decode()
            is_json = response.headers.get_content_type() == "application/json"
    except urllib.error.HTTPError as error:
        status, text, is_json = error.code, error.read().decode(), True
    return status, json.loads(text) if is_json else text


def scrape(base_url: str) -> dict[str, float]:
    """All samples by name, labels left out; of several series the sum."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(fetch(base_url + "/metrics")[1]):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0) + sample.value
    return found


def complete(base_url: str, **fields: Any) -> dict[str, Any]:
    body = {"prompt": "The quick brown", "temperature": 0, "ignore_eos": True, **fields}
    status, answer = fetch(base_url + "/v1/completions", body)
    assert status == 200, answer
    return answer


class Gate:
    """Holds up the engine's next steps until it is opened."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._runner: Any = engine.running.engine.runner
        self._execute = self._runner.execute
        self._open = threading.Event()
        self.entered = threading.Event()
        self._runner.execute = self._wait

    def _wait(self, batch: Batch) -> Any:
        self.entered.set()
        assert self._open.wait(60)
        return self._execute(batch)

    def open(self) -> None:
        self._open.set()
        self._runner.execute = self._execute


@pytest.fixture(scope="module")
def own(make_engine: Callable[[], AsyncEngine]) -> Iterator[RunningServer]:
    """A server whose engine may be held up."""
    with running_server(make_engine, served_model_name=("tiny",), hang_seconds=0.3) as running:
        running.wait_started()
        yield running
        running.wait_idle()


@pytest.fixture
def gate(own: RunningServer) -> Iterator[Gate]:
    """A step under way that does not end before the test does."""
    gate = Gate(own.engine)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(complete, own.base_url, max_tokens=2)
        assert gate.entered.wait(30)
        yield gate
        gate.open()
        assert answer.result(60)["usage"]["completion_tokens"] == 2
    own.wait_idle()


@pytest.mark.parametrize("route", ["/health", "/ready"])
def test_an_idle_server_is_ready(base_url: str, route: str) -> None:
    assert fetch(base_url + route) == (200, {"status": "ready"})


def test_metrics_keep_their_names_whatever_prometheus_accepts(base_url: str) -> None:
    accept = "application/openmetrics-text;version=1.0.0;escaping=underscores"
    request = urllib.request.Request(base_url + "/metrics", headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=60) as response:
        assert response.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert b"\njaxllm:num_requests_running{" in response.read()


def test_version_is_the_packages(base_url: str) -> None:
    assert fetch(base_url + "/version") == (200, {"version": jaxllm.__version__})


def test_a_step_that_takes_too_long_is_a_hang_until_it_ends(own: RunningServer, gate: Gate) -> None:
    time.sleep(0.35)
    status, body = fetch(own.base_url + "/health")
    assert (status, body["status"]) == (503, "hung")
    gate.open()
    own.wait_idle()
    assert fetch(own.base_url + "/health") == (200, {"status": "ready"})


def test_a_wait_for_a_compilation_is_no_hang(own: RunningServer, gate: Gate) -> None:
    runner = own.engine.running.runner
    runner.compile_wait_since = time.monotonic()
    try:
        time.sleep(0.35)
        assert fetch(own.base_url + "/health")[0] == 200
        heartbeat = own.engine.heartbeat()
        assert heartbeat.busy_seconds is None
        assert heartbeat.compile_wait_seconds == pytest.approx(0.35, abs=0.3)
    finally:
        runner.compile_wait_end = time.monotonic()
        runner.compile_wait_since = None
    assert own.engine.heartbeat().busy_seconds < 0.3  # counted from the wait's end
    runner.compile_wait_end = 0.0


def test_an_idle_engine_has_no_heartbeat_to_worry_about(own: RunningServer) -> None:
    own.wait_idle()
    deadline = time.monotonic() + 5
    while own.engine.heartbeat().busy_seconds is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.35)
    assert own.engine.heartbeat().busy_seconds is None
    assert fetch(own.base_url + "/health")[0] == 200


def test_busy_figures_are_the_last_known_and_come_at_once(own: RunningServer) -> None:
    before = scrape(own.base_url)
    fetch(own.base_url + "/load")
    gate = Gate(own.engine)
    with ThreadPoolExecutor(17) as pool:
        answer = pool.submit(complete, own.base_url, max_tokens=2)
        assert gate.entered.wait(30)
        started = time.monotonic()
        scrapes = list(pool.map(scrape, [own.base_url] * 12))
        loads = list(pool.map(fetch, [own.base_url + "/load"] * 4))
        assert time.monotonic() - started < 10
        gate.open()
        answer.result(60)
    name = "jaxllm:generation_tokens_total"
    assert [found[name] for found in scrapes] == [before[name]] * 12
    assert [status for status, _ in loads] == [200] * 4
    own.wait_idle()
    assert scrape(own.base_url)[name] == before[name] + 2


def test_the_engine_is_asked_once_however_many_scrape(own: RunningServer) -> None:
    asked = []
    send = own.engine._thread.send
    gate = Gate(own.engine)
    with ThreadPoolExecutor(9) as pool:
        answer = pool.submit(complete, own.base_url, max_tokens=2)
        assert gate.entered.wait(30)
        own.engine._thread.send = lambda message: (asked.append(message), send(message))
        list(pool.map(scrape, [own.base_url] * 8))
        gate.open()
        answer.result(60)
        del own.engine._thread.send
    own.wait_idle()
    assert len(asked) == 1


def test_a_request_shows_up_in_the_metrics(own: RunningServer) -> None:
    before = scrape(own.base_url)
    answer = complete(own.base_url, max_tokens=7, n=2, temperature=1)
    after = scrape(own.base_url)

    def grown(name: str) -> float:
        return after[f"jaxllm:{name}"] - before.get(f"jaxllm:{name}", 0)

    usage = answer["usage"]
    assert grown("request_success_total") == 1
    assert grown("generation_tokens_total") == usage["completion_tokens"] == 14
    assert grown("prompt_tokens_total") == usage["prompt_tokens"]
    assert grown("request_generation_tokens_sum") == 14
    assert grown("request_params_n_sum") == 2
    assert grown("request_params_max_tokens_sum") == 7
    assert 0 < grown("time_to_first_token_seconds_sum") < grown("e2e_request_latency_seconds_sum")
    assert grown("http_requests_total") >= 1
    assert grown("step_seconds_count") == grown("iteration_tokens_total_count") >= 7
    assert after["jaxllm:programs_ready"] == after["jaxllm:programs"]


def test_counters_never_fall(own: RunningServer) -> None:
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            complete(own.base_url, max_tokens=5)

    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(work) for _ in range(2)]
        seen = [scrape(own.base_url) for _ in range(10)]
        stop.set()
        for future in futures:
            future.result(60)
    names = [n for n in seen[-1] if n.endswith(("_total", "_count", "_bucket"))]
    for name in names:
        values = [found.get(name, 0) for found in seen]
        assert values == sorted(values), name


def test_load_says_how_busy_the_engine_is(own: RunningServer) -> None:
    status, idle = fetch(own.base_url + "/load")
    assert status == 200
    assert (idle["running"], idle["waiting"], idle["kv_cache_usage"]) == (0, 0, 0)
    assert idle["live_requests"] == 0
    assert 0 <= idle["age_seconds"] < 5


def test_the_view_shows_who_holds_which_blocks(own: RunningServer) -> None:
    url = own.base_url + "/debug/engine"
    busy: list[dict[str, Any]] = []
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(complete, own.base_url, max_tokens=200)
        while not answer.done():
            status, view = fetch(url)
            assert status == 200
            busy += [view] if view["running"] else []
    assert busy
    for view in busy:
        assert sum(count for _, count, _ in view["blocks"]) == view["num_blocks"]
        [running] = view["running"]
        assert set(running) == {"id", "index", "num_prompt_tokens", "num_output_tokens", "slot"}
        assert "#" not in running["id"]
        num_tokens = running["num_prompt_tokens"] + running["num_output_tokens"]
        used = sum(n for state, n, who in view["blocks"] if (state, who) == ("used", 0))
        # a sampled token gets its block when it is computed, a step later
        assert -(-(num_tokens - 1) // view["block_size"]) <= used
        assert view["kv_usage"] == pytest.approx(used / view["num_blocks"])
    own.wait_idle()
    _, idle = fetch(url)
    assert (idle["running"], idle["waiting"], idle["kv_usage"]) == ([], 0, 0)
    assert {state for state, _, _ in idle["blocks"]} <= {"free", "cached"}
    assert idle["ttft_ms"] > 0


def test_before_the_engine_is_there(make_engine: Callable[[], AsyncEngine]) -> None:
    may_start = threading.Event()

    def start() -> AsyncEngine:
        assert may_start.wait(60)
        return make_engine()

    with running_server(start) as running:
        status, body = fetch(running.base_url + "/health")
        assert (status, body["status"]) == (503, "starting")
        assert fetch(running.base_url + "/load")[0] == 503
        assert fetch(running.base_url + "/debug/engine")[0] == 503
        assert fetch(running.base_url + "/metrics")[0] == 200
        assert fetch(running.base_url + "/version")[0] == 200
        may_start.set()
        running.wait_started()
        assert fetch(running.base_url + "/health")[0] == 200
        running.context.status = "draining"
        status, body = fetch(running.base_url + "/ready")
        assert (status, body["status"]) == (503, "draining")
        assert fetch(running.base_url + "/load")[0] == 200
        running.context.status = "ready"
        running.call(asyncio.to_thread(running.engine.close))
        status, body = fetch(running.base_url + "/health")
        assert (status, body["status"]) == (503, "failed")
        assert fetch(running.base_url + "/load")[0] == 503
        assert fetch(running.base_url + "/metrics")[0] == 200


def test_a_model_that_cannot_be_loaded_is_told_without_details() -> None:
    def start() -> AsyncEngine:
        raise RuntimeError("secret detail")

    with running_server(start) as running:
        running.call(running.context.started.wait())
        status, body = fetch(running.base_url + "/health")
    assert (status, body["status"]) == (503, "failed")
    assert "secret" not in body["reason"]


@pytest.mark.alone
def test_asking_costs_the_engine_less_than_a_millisecond(own: RunningServer) -> None:
    for _ in range(3):
        complete(own.base_url, max_tokens=200)  # so that the medians have something to sort
    engine = own.engine.running.engine
    own.wait_idle()
    times = []
    for _ in range(50):
        started = time.perf_counter()
        engine.stats()
        times.append(time.perf_counter() - started)
    assert sorted(times)[25] < 1e-3


def test_a_rate_is_that_of_its_window() -> None:
    meter = RateMeter()
    assert meter.rate(100.0, 0) is None
    assert meter.rate(101.0, 50) == 50
    assert meter.rate(104.0, 200) == 50
    assert meter.rate(107.0, 200) == 0  # the samples of 100 and 101 are too old
    assert meter.rate(200.0, 900) is None
