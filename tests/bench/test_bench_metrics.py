"""Figures worked out by hand from the definitions, and knees of curves that are drawn by hand."""

from __future__ import annotations

from typing import Any

import pytest

from jaxllm.bench.metrics import Record, active_seconds, num_good, peaks, summarize
from jaxllm.bench.sweep import knee
from jaxllm.bench.timeline import Timeline, read_metrics

# sent at 0: tokens at 0.2, 0.3, 0.5; sent at 1: tokens at 1.4, 1.5, 1.6, 1.7, 1.8
FIRST = Record(0.0, 0.2, [0.1, 0.2], 0.5, prompt_len=10, output_len=3)
SECOND = Record(1.0, 0.4, [0.1, 0.1, 0.1, 0.1], 0.8, prompt_len=20, output_len=5)
FAILED = Record(1.5, 0.1, [], 9.0, prompt_len=30, error="lost")
ONE_TOKEN = Record(1.9, 0.3, [], 0.3, prompt_len=5, output_len=1)


def summary(*records: Record, **options: Any) -> dict[str, Any]:
    options = {
        "percentile_metrics": ("ttft", "tpot", "itl", "e2el"),
        "percentiles": (50, 99.9),
        "goodput": {},
        **options,
    }
    return summarize(records, 2.0, **options)


def test_sums_and_rates_are_of_the_requests_that_succeeded() -> None:
    result = summary(FIRST, SECOND, FAILED)
    expected = {
        "duration": 2.0, "completed": 2, "failed": 1,
        "total_input_tokens": 30, "total_output_tokens": 8,
        "request_throughput": 1.0, "request_goodput": None,
        "output_throughput": 4.0, "total_token_throughput": 19.0,
        "input_lens": [10, 20, 30], "output_lens": [3, 5, 0],
        "ttfts": [0.2, 0.4, 0.1], "errors": ["", "", "lost"],
    }  # fmt: skip
    assert {key: result[key] for key in expected} == expected


def test_statistics_of_each_metric() -> None:
    result = summary(FIRST, SECOND, FAILED)
    expected = {
        "mean_ttft_ms": 300, "median_ttft_ms": 300, "std_ttft_ms": 100, "p50_ttft_ms": 300,
        "p99.9_ttft_ms": 200 + 0.999 * 200,
        # (0.5 - 0.2) / 2 = 0.15 and (0.8 - 0.4) / 4 = 0.1
        "mean_tpot_ms": 125, "std_tpot_ms": 25,
        # 0.1, 0.2, 0.1, 0.1, 0.1, 0.1
        "mean_itl_ms": 700 / 6, "median_itl_ms": 100, "p50_itl_ms": 100,
        "mean_e2el_ms": 650, "median_e2el_ms": 650,
    }  # fmt: skip
    assert {key: result[key] for key in expected} == pytest.approx(expected)


def test_an_answer_of_one_token_has_no_tpot() -> None:
    assert summary(FIRST, ONE_TOKEN)["mean_tpot_ms"] == pytest.approx(150)
    assert ONE_TOKEN.tpot == 0


def test_without_a_success_all_is_zero() -> None:
    result = summary(FAILED)
    assert (result["completed"], result["failed"], result["mean_ttft_ms"]) == (0, 1, 0)
    assert result["max_concurrent_requests"] == 0


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"ttft": 300}, 1),
        ({"ttft": 400.001}, 2),
        ({"tpot": 120}, 1),
        ({"ttft": 300, "tpot": 120}, 0),
        ({"e2el": 799}, 1),
        ({"e2el": 1e9}, 2),
    ],
)
def test_goodput_is_of_requests_that_meet_every_limit(
    limits: dict[str, float], expected: int
) -> None:
    assert num_good([FIRST, SECOND, FAILED], limits) == expected
    assert summary(FIRST, SECOND, FAILED, goodput=limits)["request_goodput"] == expected / 2


def test_peaks_are_of_whole_seconds() -> None:
    assert peaks([FIRST, SECOND, FAILED, ONE_TOKEN]) == {
        "max_output_tokens_per_s": 5.0,  # of second 1
        "max_concurrent_requests": 2,  # SECOND and ONE_TOKEN in second 1
    }


def test_active_seconds_is_the_union() -> None:
    # [0, 0.5], [1, 1.8], [1.9, 2.2]
    assert active_seconds([FIRST, SECOND, ONE_TOKEN]) == pytest.approx(1.6)
    assert active_seconds([Record(0, latency=3), Record(1, latency=1)]) == 3
    assert active_seconds([]) == 0


def test_the_knee_is_the_point_farthest_below_the_chord() -> None:
    # scaled: (0, 0), (.5, .05), (.9, .2), (.98, .5), (1, 1); below the chord y = x by x - y:
    # 0, .45, .7, .48, 0
    throughputs, latencies = [0.0, 50, 90, 98, 100], [10.0, 15, 30, 60, 110]
    assert knee(throughputs, latencies) == 2
    order = [3, 0, 4, 2, 1]  # whatever order they were measured in
    assert knee([throughputs[i] for i in order], [latencies[i] for i in order]) == 3


@pytest.mark.parametrize(
    ("throughputs", "latencies"),
    [
        ([1.0, 2], [1.0, 5]),  # too few
        ([1.0, 2, 3], [1.0, 2, 3]),  # straight
        ([1.0, 2, 3], [1.0, 2.9, 3]),  # bends the other way
        ([1.0, 1, 1], [2.0, 2, 2]),
    ],
)
def test_a_curve_without_a_knee_has_none(throughputs: list[float], latencies: list[float]) -> None:
    assert knee(throughputs, latencies) is None


# ---- the server's own figures


def exposition(running: int, computed: int, padded: int, busy: float) -> str:
    return f"""\
# TYPE jaxllm:num_requests_running gauge
jaxllm:num_requests_running{{model_name="a"}} {running}
jaxllm:num_requests_running{{model_name="b"}} 1
# TYPE jaxllm:kv_cache_usage_perc gauge
jaxllm:kv_cache_usage_perc{{model_name="a"}} 0.5
jaxllm:kv_cache_usage_perc{{model_name="b"}} 0.1
# TYPE jaxllm:computed_tokens counter
jaxllm:computed_tokens_total {computed}
# TYPE jaxllm:padded_tokens counter
jaxllm:padded_tokens_total {padded}
# TYPE jaxllm:step_seconds histogram
jaxllm:step_seconds_bucket{{le="+Inf"}} 9
jaxllm:step_seconds_count 9
jaxllm:step_seconds_sum {busy}
# TYPE process_cpu_seconds counter
process_cpu_seconds_total 5
"""


def test_metrics_are_read_without_prefix_and_over_all_engines() -> None:
    assert read_metrics(exposition(2, 10, 20, 0.5)) == {
        "num_requests_running": 3,
        "kv_cache_usage_perc": pytest.approx(0.3),
        "computed_tokens_total": 10,
        "padded_tokens_total": 20,
        "step_seconds_count": 9,
        "step_seconds_sum": 0.5,
    }


def test_shares_are_of_what_was_added_during_the_run() -> None:
    timeline = Timeline(
        first=read_metrics(exposition(0, 1000, 5000, 100.0)),
        last=read_metrics(exposition(0, 1300, 5400, 103.0)),
    )
    assert timeline.padding_share() == pytest.approx(0.25)  # 300 of 400 were asked for
    assert timeline.idle_share(4.0) == pytest.approx(0.25)  # 3 s of 4 s had a step
    assert timeline.idle_share(2.0) == 0
    assert timeline.idle_share(0.0) is None
    assert Timeline(first={}, last={}).padding_share() is None
    assert Timeline().idle_share(1.0) is None
