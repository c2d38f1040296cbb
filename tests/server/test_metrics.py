"""Metrics: values worked out by hand, names that vLLM's dashboards know, labels of fixed sets; and
the lines of the log, which no client can forge."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from jaxllm.engine.engine import EngineStats
from jaxllm.engine.histogram import HistogramStats
from jaxllm.engine.sequence import RunnerFigures
from jaxllm.engine.speculation import SpeculationStats
from jaxllm.outputs import RequestMetrics
from jaxllm.server.logs import RequestRecord, configure_logging, escape, log_request
from jaxllm.server.metrics import FinishedRequest, Metrics

STATS = EngineStats(
    num_running=3,
    num_waiting=2,
    kv_usage=0.25,
    prefix_queries=100,
    prefix_hits=40,
    num_preemptions=1,
    num_prompt_tokens=90,
    num_generation_tokens=70,
    num_computed_tokens=160,
    num_steps=10,
    num_failed_steps=1,
    median_host_seconds=None,
    median_dispatch_seconds=None,
    step_seconds=HistogramStats((0.01, 0.1), (4, 5, 1), 1.5),
    step_tokens=HistogramStats((1.0, 16.0), (2, 8, 0), 160.0),
    runner=RunnerFigures(
        num_tokens=160, num_padded_tokens=200, num_programs=9, num_ready_programs=7,
        num_compiled=6, num_loaded=1, compile_seconds=12.5, compile_wait_seconds=0.5,
    ),
)  # fmt: skip
# arrives at 10, runs from 11, first token at 11.5, ends at 13.5 with its 5th token
TIMES = RequestMetrics(10.0, 11.0, 11.5, 13.5)
REQUEST = FinishedRequest(TIMES, 30, 5, "length", num_cached_tokens=16, max_tokens=5)


def samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = metrics.render().decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def of_model(metrics: Metrics, prefix: str = "jaxllm") -> dict[str, float]:
    """Samples whose only label is the model's name."""
    only = (("model_name", "m"),)
    found = samples(metrics).items()
    return {name.removeprefix(f"{prefix}:"): v for (name, labels), v in found if labels == only}


def test_engine_figures_are_shown_as_they_are() -> None:
    metrics = Metrics(model_name="m")
    metrics.update_engine(STATS)
    shown = of_model(metrics)
    expected = {
        "num_requests_running": 3, "num_requests_waiting": 2, "kv_cache_usage_perc": 0.25,
        "prefix_cache_queries_total": 100, "prefix_cache_hits_total": 40,
        "num_preemptions_total": 1, "prompt_tokens_total": 90, "generation_tokens_total": 70,
        "compiles_total": 6, "compile_seconds_total": 12.5, "failed_steps_total": 1,
        "program_cache_loads_total": 1, "programs": 9, "programs_ready": 7,
        "step_seconds_count": 10, "step_seconds_sum": 1.5,
        "iteration_tokens_total_count": 10, "iteration_tokens_total_sum": 160,
    }  # fmt: skip
    assert {name: shown[name] for name in expected} == expected
    assert shown["padding_ratio"] == pytest.approx(0.2)  # 40 of 200
    buckets = {
        dict(labels)["le"]: value
        for (name, labels), value in samples(metrics).items()
        if name == "jaxllm:step_seconds_bucket"
    }
    assert buckets == {"0.01": 4, "0.1": 9, "+Inf": 10}


def test_drafts_are_counted_under_the_names_of_vllm() -> None:
    metrics = Metrics("vllm", model_name="m")
    metrics.update_engine(STATS)
    assert not any("spec_decode" in name for name, _ in samples(metrics))  # it does not speculate
    metrics.update_engine(replace(STATS, speculation=SpeculationStats(9, 20, 12, (7, 5, 0))))
    shown = of_model(metrics, "vllm")
    assert shown["spec_decode_num_drafts_total"] == 9
    assert shown["spec_decode_num_draft_tokens_total"] == 20
    assert shown["spec_decode_num_accepted_tokens_total"] == 12
    by_position = {
        dict(labels)["position"]: value
        for (name, labels), value in samples(metrics).items()
        if name == "vllm:spec_decode_num_accepted_tokens_per_pos_total"
    }
    assert by_position == {"0": 7, "1": 5, "2": 0}


def test_a_late_answer_of_the_engine_does_not_turn_counters_back() -> None:
    metrics = Metrics(model_name="m")
    metrics.update_engine(STATS)
    metrics.update_engine(replace(STATS, num_steps=9, num_generation_tokens=60))
    assert of_model(metrics)["generation_tokens_total"] == 70


def test_a_finished_request_adds_its_times() -> None:
    metrics = Metrics(model_name="m")
    metrics.request_finished(REQUEST)
    shown = of_model(metrics)
    expected = {
        "request_queue_time_seconds": 1.0, "time_to_first_token_seconds": 1.5,
        "request_prefill_time_seconds": 0.5, "request_decode_time_seconds": 2.0,
        "request_inference_time_seconds": 2.5, "e2e_request_latency_seconds": 3.5,
        "request_time_per_output_token_seconds": 0.5,  # 2 s for 4 tokens after the first
        "request_prompt_tokens": 30, "request_generation_tokens": 5,
        "request_params_n": 1, "request_params_max_tokens": 5,
    }  # fmt: skip
    assert {name: shown[f"{name}_sum"] for name in expected} == expected
    assert all(shown[f"{name}_count"] == 1 for name in expected)
    assert metrics.recent_ttft_seconds() == 1.5


def test_time_per_token_is_that_of_one_answer() -> None:
    metrics = Metrics(model_name="m")
    metrics.request_finished(replace(REQUEST, num_generation_tokens=20, n=4))
    assert of_model(metrics)["request_time_per_output_token_seconds_sum"] == 0.5


def test_what_did_not_happen_adds_nothing() -> None:
    metrics = Metrics(model_name="m")
    metrics.request_finished(FinishedRequest(RequestMetrics(10.0), 30, 0, "abort"))
    metrics.request_finished(FinishedRequest(None, 0, 0, "abort"))
    shown = of_model(metrics)
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds"):
        assert shown[f"{name}_count"] == 0
    assert shown["request_prompt_tokens_count"] == 1
    assert metrics.recent_ttft_seconds() is None


def test_reasons_methods_and_routes_are_of_fixed_sets() -> None:
    metrics = Metrics(model_name="m")
    metrics.set_routes(["/v1/models"])
    before = len(samples(metrics))
    metrics.http_response("/v1/models", "GET", 200, 0.01)
    with_route = len(samples(metrics))
    for number in range(50):
        metrics.http_response(f"/made/up/{number}", f"M{number}", 404, 0.01)
        metrics.request_finished(replace(REQUEST, finish_reason=f"reason {number}"))
    grown = len(samples(metrics)) - with_route
    assert grown == with_route - before  # one more series for all of them
    name = "jaxllm:http_requests_total"
    other = (("method", "other"), ("route", "other"), ("status", "404"))
    known = (("method", "GET"), ("route", "/v1/models"), ("status", "200"))
    found = samples(metrics)
    assert (found[name, known], found[name, other]) == (1, 50)
    reasons = (("finished_reason", "other"), ("model_name", "m"))
    assert found["jaxllm:request_success_total", reasons] == 50


def test_the_names_are_vllms_under_its_prefix() -> None:
    metrics = Metrics("vllm", "m")
    metrics.update_engine(STATS)
    names = {name for name, _ in samples(metrics)}
    gauges = {"num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"}
    counters = {"prefix_cache_queries", "prefix_cache_hits", "num_preemptions", "prompt_tokens",
                "generation_tokens", "request_success"}  # fmt: skip
    histograms = {
        "time_to_first_token_seconds", "inter_token_latency_seconds",
        "request_time_per_output_token_seconds", "e2e_request_latency_seconds",
        "request_queue_time_seconds", "request_inference_time_seconds",
        "request_prefill_time_seconds", "request_decode_time_seconds", "request_prompt_tokens",
        "request_generation_tokens", "request_params_n", "request_params_max_tokens",
        "iteration_tokens_total",
    }  # fmt: skip
    wanted = gauges | {f"{c}_total" for c in counters} | {f"{h}_bucket" for h in histograms}
    assert {f"vllm:{name}" for name in wanted} <= names
    assert not any(name.startswith("jaxllm:") for name in names)


def test_latencies_are_told_apart_down_to_a_millisecond() -> None:
    metrics = Metrics(model_name="m")
    metrics.inter_token(0.0009)
    metrics.inter_token(0.0015)
    buckets = {
        float(dict(labels)["le"]): value
        for (name, labels), value in samples(metrics).items()
        if name == "jaxllm:inter_token_latency_seconds_bucket"
    }
    assert (buckets[0.001], buckets[0.002]) == (1, 2)


@pytest.mark.parametrize("prefix", ["", "1a", "a-b", "a:b", "a b"])
def test_a_prefix_that_is_no_name_is_refused(prefix: str) -> None:
    with pytest.raises(ValueError, match="metrics_prefix"):
        Metrics(prefix)


def test_concurrent_updates_are_all_counted() -> None:
    metrics = Metrics(model_name="m")

    def work(_: int) -> None:
        for _ in range(50):
            metrics.request_finished(REQUEST)
            metrics.update_engine(STATS)
        metrics.render()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert of_model(metrics)["e2e_request_latency_seconds_count"] == 200


# ---- logs


@pytest.fixture
def log(request: pytest.FixtureRequest) -> Iterator[io.StringIO]:
    """What is logged, in the format of the test's parameter."""
    logger = logging.getLogger("jaxllm")
    before = logger.level, logger.propagate
    stream = io.StringIO()
    handler = configure_logging(request.param, stream=stream)
    yield stream
    logger.removeHandler(handler)
    logger.level, logger.propagate = before


RECORD = RequestRecord(
    "id1", "POST", "/v1/completions", 200, "tiny", 30, 5, 16, 0.0123456789, 0.5, "length"
)


@pytest.mark.parametrize("log", ["json"], indirect=True)
def test_a_request_is_a_json_line(log: io.StringIO) -> None:
    log_request(RECORD)
    [line] = log.getvalue().splitlines()
    content = json.loads(line)
    assert content.pop("time").endswith("+00:00")
    assert content == {
        "level": "info", "logger": "jaxllm.access", "message": "request", "request_id": "id1",
        "method": "POST", "route": "/v1/completions", "status": 200, "model": "tiny",
        "num_prompt_tokens": 30, "num_output_tokens": 5, "num_cached_tokens": 16,
        "ttft": 0.012346, "duration": 0.5, "finish_reason": "length", "aborted": False,
    }  # fmt: skip


@pytest.mark.parametrize("log", ["text"], indirect=True)
def test_a_request_is_a_line_of_text(log: io.StringIO) -> None:
    log_request(RECORD)
    assert log.getvalue().partition(" ")[2] == (
        "INFO request request_id=id1 method=POST route=/v1/completions status=200 model=tiny "
        "num_prompt_tokens=30 num_output_tokens=5 num_cached_tokens=16 ttft=0.012346 "
        "duration=0.5 finish_reason=length aborted=false\n"
    )


@pytest.mark.parametrize("log", ["text", "json"], indirect=True)
def test_nothing_forges_a_line(log: io.StringIO) -> None:
    evil = 'x\r\n2026 INFO status=200\x1b[2J\u2028\u202e"'
    log_request(replace(RECORD, model=evil, method=evil))
    logging.getLogger("jaxllm.server").warning("odd: %s", evil)
    text = log.getvalue()
    assert text.count("\n") == 2
    assert text.isascii()
    assert text.replace("\n", "").isprintable()


@pytest.mark.parametrize("log", ["text"], indirect=True)
def test_a_traceback_cannot_be_taken_for_records(log: io.StringIO) -> None:
    try:
        raise RuntimeError("first\n2026 INFO forged")
    except RuntimeError:
        logging.getLogger("jaxllm").exception("failed")
    first, *rest = log.getvalue().splitlines()
    assert first.endswith("ERROR failed")
    assert rest
    assert all(line.startswith("  | ") for line in rest)


def test_several_requests_to_the_engine_add_up_in_one_record() -> None:
    record = RequestRecord("id", "POST", "/v1/completions")
    record.add(10, 4, 0, 0.5, "stop")
    record.add(20, 6, 8, 0.2, "length")
    counts = record.num_prompt_tokens, record.num_output_tokens, record.num_cached_tokens
    assert (*counts, record.ttft, record.finish_reason) == (30, 10, 8, 0.2, "stop")


def test_escape_leaves_printable_ascii_alone() -> None:
    assert escape("a b~") == "a b~"
    assert escape("\x00é\n") == "\\x00\\xe9\\n"
