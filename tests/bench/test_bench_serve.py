"""bench serve and sweep against a server whose delays are known."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_server import METRICS, FakeServer, running

Cli = Callable[..., tuple[int, str, str]]
KEYS = {
    "date", "backend", "label", "model_id", "tokenizer_id", "num_prompts", "request_rate",
    "burstiness", "max_concurrency", "duration", "completed", "failed", "total_input_tokens",
    "total_output_tokens", "request_throughput", "request_goodput", "output_throughput",
    "total_token_throughput", "input_lens", "output_lens", "ttfts", "itls", "generated_texts",
    "errors", "max_output_tokens_per_s", "max_concurrent_requests",
    *(f"{kind}_{metric}_ms" for kind in ("mean", "median", "std", "p99")
      for metric in ("ttft", "tpot", "itl", "e2el")),
}  # fmt: skip
SHORT = ("--num-prompts", 4, "--random-input-len", 8, "--random-output-len", 5, "--vocab-size", 99)
LATE = 0.25  # what a busy machine may add to a median delay, in seconds


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with running(FakeServer()) as server:
        yield server


@pytest.fixture
def serve(cli: Cli, fake: FakeServer, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """The saved result of a run that succeeds."""

    def run(*flags: object, code: int = 0, command: str = "serve") -> Any:
        file = tmp_path / "result.json"
        found, out, err = cli(
            "bench", command, "--base-url", fake.base_url, "--save-result", file, *flags
        )
        assert (found, err) == (code, ""), out + err
        result: Any = json.loads(file.read_text())
        (result if isinstance(result, dict) else result[0])["out"] = out
        return result

    return run


@pytest.mark.parametrize("endpoint", ["/v1/completions", "/v1/chat/completions"])
def test_times_are_the_servers_delays(
    serve: Callable[..., dict[str, Any]], fake: FakeServer, endpoint: str
) -> None:
    """TTFT 0.2, four gaps of 0.1: neither a chat's first chunk nor its last is a token."""
    fake.first, fake.gap = 0.2, 0.1
    result = serve("--endpoint", endpoint, *SHORT)
    assert result.keys() >= KEYS
    assert 200 <= result["median_ttft_ms"] < 200 + 1e3 * LATE
    assert 95 <= result["median_itl_ms"] < 100 + 1e3 * LATE
    assert 95 <= result["median_tpot_ms"] < 100 + 1e3 * LATE
    assert 600 <= result["median_e2el_ms"] < 600 + 2e3 * LATE
    assert [len(itls) for itls in result["itls"]] == [4] * 4
    assert result["generated_texts"] == [" 0 1 2 3 4"] * 4
    assert (result["input_lens"], result["output_lens"]) == ([7] * 4, [5] * 4)  # by its usage
    assert (result["completed"], result["failed"], result["errors"]) == (4, 0, [""] * 4)
    assert result["total_output_tokens"] == 20
    assert result["output_throughput"] == pytest.approx(20 / result["duration"])
    assert result["backend"] == ("openai-chat" if "chat" in endpoint else "openai")
    assert result["request_rate"] == "inf"
    assert result["model_id"] == "fake"  # what /v1/models says first
    assert (result["max_concurrent_requests"], fake.most_live) == (4, 4)


def test_a_request_says_what_the_flags_say(
    serve: Callable[..., dict[str, Any]], fake: FakeServer
) -> None:
    fake.first = fake.gap = 0.0
    serve(
        *SHORT, "--model", "other", "--ignore-eos", "--temperature", 0, "--header", "X-Key=a=b",
        "--label", "night",
    )  # fmt: skip
    body = fake.bodies[-1]
    prompt = body.pop("prompt")
    assert len(prompt) == 8
    assert all(type(token) is int and 0 <= token < 99 for token in prompt)
    assert body == {
        "model": "other", "max_tokens": 5, "stream": True, "temperature": 0,
        "stream_options": {"include_usage": True}, "ignore_eos": True,
    }  # fmt: skip
    assert fake.headers[-1]["X-Key"] == "a=b"
    assert len(fake.bodies) == 5  # the first is a test that does not count


def test_a_server_without_tokenize_gets_words(
    serve: Callable[..., dict[str, Any]], fake: FakeServer
) -> None:
    fake.first = fake.gap = 0.0
    fake.has_usage = False
    result = serve(*SHORT[:-2])
    assert len(fake.bodies[-1]["prompt"].split()) == 8
    assert (result["input_lens"], result["output_lens"]) == ([8] * 4, [5] * 4)  # counted here


def test_concurrency_is_bounded(serve: Callable[..., dict[str, Any]], fake: FakeServer) -> None:
    fake.first, fake.gap = 0.3, 0.0
    result = serve(*SHORT, "--num-prompts", 10, "--max-concurrency", 2)
    assert fake.most_live == 2
    assert result["max_concurrency"] == 2
    assert result["median_ttft_ms"] < 300 + 1e3 * LATE  # not 900: waiting is no part of it


def test_a_rate_spreads_the_requests(
    serve: Callable[..., dict[str, Any]], fake: FakeServer
) -> None:
    fake.first = fake.gap = 0.0
    result = serve(*SHORT, "--num-prompts", 20, "--request-rate", 20, "--burstiness", 100)
    starts = result["start_times"]
    assert starts == sorted(starts)
    assert (starts[-1] - starts[0]) / 19 == pytest.approx(0.05, rel=0.3)
    assert 1.0 <= result["duration"] < 3


def test_a_trace_sends_when_it_says(
    serve: Callable[..., dict[str, Any]], fake: FakeServer, tmp_path: Path
) -> None:
    fake.first = fake.gap = 0.0
    file = tmp_path / "trace.jsonl"
    lines = [{"timestamp": 10 + t, "input_length": 3, "output_length": 2} for t in (0, 0.2, 0.6)]
    file.write_text("\n".join(map(json.dumps, lines)))
    result = serve("--dataset-name", "trace", "--dataset-path", file, "--vocab-size", 9)
    assert result["start_times"] == pytest.approx([0, 0.2, 0.6], abs=LATE)


@pytest.mark.parametrize("endpoint", ["/v1/completions", "/v1/chat/completions"])
def test_a_conversation_grows(
    serve: Callable[..., dict[str, Any]], fake: FakeServer, endpoint: str
) -> None:
    fake.first = fake.gap = 0.0
    result = serve(
        "--dataset-name", "multi-turn", "--num-prompts", 1, "--multi-turn-num-turns", 3,
        "--multi-turn-input-len", 4, "--multi-turn-output-len", 2, "--endpoint", endpoint,
    )  # fmt: skip
    assert (result["num_prompts"], result["completed"]) == (3, 3)
    last = fake.bodies[-1]
    if "chat" in endpoint:
        roles = [message["role"] for message in last["messages"]]
        assert roles == ["user", "assistant", "user", "assistant", "user"]
        assert last["messages"][1]["content"] == " 0 1"
        assert last["messages"][:3] == fake.bodies[-2]["messages"]
    else:
        assert last["prompt"].startswith(fake.bodies[-2]["prompt"] + " 0 1\n")


# ---- what goes wrong


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("status", "HTTP 500: out of memory"),
        ("ends", "the stream ended midway: no finish_reason and no [DONE]"),
        ("cut", "the stream ended midway: "),
        ("error", 'the stream failed: {"message": "no more"}'),
        ("garbage", "the stream has a chunk that is not JSON: b'{not json'"),
    ],
)
def test_failures_are_counted_with_their_reason(
    serve: Callable[..., dict[str, Any]], fake: FakeServer, fault: str, reason: str
) -> None:
    fake.first = fake.gap = 0.01
    fake.fault, fake.faulty_from = fault, 3  # the test request and two others succeed
    result = serve(*SHORT, "--max-concurrency", 1, "--goodput", "e2el:10000")
    assert (result["completed"], result["failed"]) == (2, 2)
    assert result["errors"][:2] == ["", ""]
    assert all(error.startswith(reason) for error in result["errors"][2:])
    assert f"failed: {reason}" in result["out"]
    assert result["total_output_tokens"] == 10
    assert result["request_goodput"] == pytest.approx(2 / result["duration"])


def test_what_follows_a_failed_turn_is_not_sent(
    serve: Callable[..., dict[str, Any]], fake: FakeServer
) -> None:
    fake.first = fake.gap = 0.0
    fake.fault, fake.faulty_from = "status", 2
    result = serve("--dataset-name", "multi-turn", "--num-prompts", 1)
    assert result["errors"] == [
        "", "HTTP 500: out of memory", "an earlier turn failed", "an earlier turn failed"
    ]  # fmt: skip
    assert len(fake.bodies) == 3


def test_when_all_requests_fail_the_exit_code_is_1(
    serve: Callable[..., dict[str, Any]], fake: FakeServer
) -> None:
    fake.first = fake.gap = 0.0
    fake.fault, fake.faulty_from = "status", 1
    result = serve(*SHORT, code=1)
    assert (result["completed"], result["failed"], result["mean_ttft_ms"]) == (0, 4, 0)


def test_a_server_that_is_down_is_one_line(cli: Cli) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    for flags in ((), ("--model", "m", "--vocab-size", 9)):
        code, out, err = cli("bench", "serve", "--base-url", url, *flags)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith(f"jaxllm: error: {url}/v1/")
        assert "Cannot connect" in err


def test_a_server_whose_first_answer_fails_is_one_line(cli: Cli, fake: FakeServer) -> None:
    fake.fault = "status"
    code, out, err = cli("bench", "serve", "--base-url", fake.base_url, *SHORT)
    assert (code, out) == (2, "")
    assert err == f"jaxllm: error: {fake.base_url}/v1/completions: HTTP 500: out of memory\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--request-rate 0", "--request-rate must be above 0, got 0.0"),
        ("--request-rate nan", "--request-rate must be above 0, got nan"),
        ("--burstiness -1", "--burstiness must be above 0, got -1.0"),
        ("--max-concurrency 0", "--max-concurrency must be at least 1, got 0"),
        ("--goodput ttft", "--goodput must be ttft:MS, tpot:MS or e2el:MS"),
        ("--goodput itl:3", "--goodput must be ttft:MS"),
        ("--metric-percentiles 99,x", "--metric-percentiles must be numbers separated by commas"),
        ("--metric-percentiles 101", "--metric-percentiles must be between 0 and 100, got 101"),
        ("--percentile-metrics ttft,x", "--percentile-metrics must be of ttft, tpot, itl, e2el"),
        ("--header novalue", "--header must be NAME=VALUE, got 'novalue'"),
        ("--base-url localhost:1", "--base-url must begin with http:// or https://"),
        ("--tokenizer t --vocab-size 3", "give either --tokenizer or --vocab-size"),
        ("--vocab-size 0", "--vocab-size must be at least 1, got 0"),
        ("--dataset-name dance", "invalid choice: 'dance'"),
        ("--dataset-name trace", "--dataset-name trace needs --dataset-path FILE"),
        ("--dataset-name sharegpt --dataset-path /no/such", "/no/such: cannot be read"),
        ("--save-result /no/such/file", "--save-result /no/such/file: cannot be written"),
        ("--compare /no/such", "/no/such: cannot be read: No such file"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(
    cli: Cli, fake: FakeServer, flags: str, message: str
) -> None:
    code, out, err = cli("bench", "serve", "--base-url", fake.base_url, *flags.split())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert fake.bodies == []


# ---- the server's own figures


@pytest.mark.parametrize("prefix", ["vllm", "jaxllm"])
def test_the_timeline_is_of_the_servers_metrics(
    serve: Callable[..., dict[str, Any]], fake: FakeServer, prefix: str
) -> None:
    fake.metrics = METRICS.format(p=prefix)
    result = serve(*SHORT)
    timeline = result["timeline"]
    assert len(timeline["times"]) >= 2
    assert set(timeline["num_requests_running"]) == {3}
    assert set(timeline["num_requests_waiting"]) == {2}
    assert set(timeline["kv_cache_usage_perc"]) == {0.25}
    assert (result["padding_share"], result["idle_share"]) == (None, None)
    assert result["out"].count("not available") == 2


def test_without_metrics_nothing_is_made_up(serve: Callable[..., dict[str, Any]]) -> None:
    result = serve(*SHORT)
    assert (result["padding_share"], result["idle_share"], result["timeline"]) == (None,) * 3
    assert result["out"].count("not available") == 2


# ---- sweep, comparison, pictures


def is_picture(file: Path) -> bool:
    start = file.read_bytes()
    return start.startswith(b"\x89PNG\r\n\x1a\n") or (b"<svg" in start and b"</svg>" in start)


def test_sweep_has_a_run_for_each_point_and_pictures(
    serve: Callable[..., Any], fake: FakeServer, tmp_path: Path
) -> None:
    fake.first, fake.gap = 0.02, 0.0
    folder = tmp_path / "plots"
    results = serve(*SHORT, "--max-concurrencies", "1,2,4", "--plot", folder, command="sweep")
    assert [result["max_concurrency"] for result in results] == [1, 2, 4]
    assert results[0]["duration"] > results[1]["duration"] > results[2]["duration"]
    prompts = [tuple(body["prompt"]) for body in fake.bodies[1:]]
    assert len(set(prompts)) == 12  # those of one run are not those of another
    assert tuple(fake.bodies[0]["prompt"]) not in prompts  # nor is the test request's
    names = {"curve.png", "curve.svg"}
    assert {file.name for file in folder.iterdir()} == names
    assert all(is_picture(folder / name) for name in names)
    assert "4 at once" in results[0]["out"]


def test_the_knee_of_a_sweep_is_marked(monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    from jaxllm.bench import sweep

    curve = [(10.0, 100.0), (19.0, 110.0), (20.0, 400.0)]

    def bench_points(target: Any, workload: Any, points: Any) -> list[dict[str, Any]]:
        return [
            {
                "output_throughput": x, "median_e2el_ms": y, "max_concurrency": None,
                "request_rate": point.request_rate, "completed": 1, "failed": 0,
            }
            for (x, y), point in zip(curve, points, strict=True)
        ]  # fmt: skip

    monkeypatch.setattr(sweep, "bench_points", bench_points)
    code, out, _ = cli("bench", "sweep", "--request-rates", "1,2,inf")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines() if "knee" in line] == ["2.0"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "one of the arguments --request-rates --max-concurrencies is required"),
        ("--request-rates 1,x", "--request-rates must be numbers separated by commas"),
        ("--max-concurrencies 1,2.5", "--max-concurrencies must be integers"),
        ("--max-concurrencies 0", "--max-concurrency must be at least 1, got 0"),
    ],
)
def test_a_wrong_sweep_is_one_line(cli: Cli, flags: str, message: str) -> None:
    code, out, err = cli("bench", "sweep", *flags.split())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_pictures_of_a_run(serve: Callable[..., Any], fake: FakeServer, tmp_path: Path) -> None:
    fake.metrics = METRICS.format(p="vllm")
    result = serve(*SHORT, "--plot", tmp_path / "new" / "plots")
    files = list((tmp_path / "new" / "plots").iterdir())
    assert {file.name for file in files} == {
        "latency.png", "latency.svg", "timeline.png", "timeline.svg"
    }  # fmt: skip
    assert all(is_picture(file) for file in files)
    assert result["out"].count("written: ") == 4


def test_without_matplotlib_it_is_said_how_to_get_it(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, fake: FakeServer, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    fake.first = fake.gap = 0.0
    command = ("bench", "serve", "--base-url", fake.base_url, *SHORT)
    code, out, err = cli(*command, "--plot", tmp_path)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "pip install 'jaxllm[bench]'" in err
    assert fake.bodies == []
    assert cli(*command)[0] == 0  # only pictures need it


def test_runs_are_laid_side_by_side(
    serve: Callable[..., Any], fake: FakeServer, tmp_path: Path
) -> None:
    fake.first = fake.gap = 0.0
    earlier = tmp_path / "earlier.json"
    earlier.write_text(json.dumps({"completed": 8, "output_throughput": 0, "of_another": 5}))
    out = serve(*SHORT, "--compare", earlier)["out"]
    table = [line.split() for line in out.split("\n\n")[1].splitlines()]
    assert table[0] == ["this", "run", "earlier", "ratio"]
    assert ["completed", "4", "8", "0.500"] in table
    assert [row[2:] for row in table if row[0] == "output_throughput"] == [["0", "-"]]
    assert not any("of_another" in row for row in table)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "is not valid JSON"), ("3", "is no result of jaxllm bench"), ("[]", "is no result")],
)
def test_a_wrong_file_to_compare_with(cli: Cli, tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "other.json"
    file.write_text(content)
    code, out, err = cli("bench", "serve", "--compare", file)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"{file}: {message}" in err
