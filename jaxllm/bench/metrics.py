"""What is measured of a request, and the figures of a run, defined as in `vllm bench serve`.

TTFT: from sending to the first chunk with a token. ITL: between two chunks. E2EL: from sending to
the last chunk. TPOT: (E2EL - TTFT) / (output tokens - 1), of requests with at least two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

METRICS = ("ttft", "tpot", "itl", "e2el")


@dataclass
class Record:
    """One request. Times in seconds; start_time on the clock of time.perf_counter. error: why it
    failed, "" if it did not."""

    start_time: float = 0.0
    ttft: float = 0.0
    itls: list[float] = field(default_factory=list)
    latency: float = 0.0
    prompt_len: int = 0
    output_len: int = 0
    text: str = ""
    error: str = ""

    @property
    def tpot(self) -> float:
        """Seconds per output token after the first; 0 if there is none."""
        return (self.latency - self.ttft) / (self.output_len - 1) if self.output_len > 1 else 0.0

    @property
    def end_time(self) -> float:
        return self.start_time + self.latency

    def token_times(self) -> list[float]:
        """When each chunk came, on the clock of start_time."""
        return (self.start_time + self.ttft + np.cumsum([0.0, *self.itls])).tolist()


def values_of(records: Sequence[Record]) -> dict[str, list[float]]:
    """Of the requests that succeeded: the values that each metric is a statistic of, in seconds."""
    good = [record for record in records if not record.error]
    return {
        "ttft": [record.ttft for record in good],
        "tpot": [record.tpot for record in good if record.output_len > 1],
        "itl": [itl for record in good for itl in record.itls],
        "e2el": [record.latency for record in good],
    }


def statistics_ms(
    values: Mapping[str, Sequence[float]], names: Sequence[str], percentiles: Sequence[float]
) -> dict[str, float]:
    """mean_ttft_ms, median_ttft_ms, std_ttft_ms, p99_ttft_ms and so on; 0 of nothing, as there."""
    figures = {}
    for name in names:
        of_metric = 1e3 * np.asarray(values[name] or [0.0])
        figures[f"mean_{name}_ms"] = float(np.mean(of_metric))
        figures[f"median_{name}_ms"] = float(np.median(of_metric))
        figures[f"std_{name}_ms"] = float(np.std(of_metric))
        for p in percentiles:
            figures[f"p{p:g}_{name}_ms"] = float(np.percentile(of_metric, p))
    return figures


def num_good(records: Sequence[Record], limits_ms: Mapping[str, float]) -> int:
    """Requests that succeeded and meet every limit."""

    def meets(record: Record) -> bool:
        seconds = {"ttft": record.ttft, "tpot": record.tpot, "e2el": record.latency}
        return all(1e3 * seconds[name] <= limit for name, limit in limits_ms.items())

    return sum(not record.error and meets(record) for record in records)


def peaks(records: Sequence[Record]) -> dict[str, float]:
    """The most output chunks, and the most requests under way, in one second of the run; the
    seconds are counted from the first request that succeeded."""
    good = [record for record in records if not record.error]
    if not good:
        return {"max_output_tokens_per_s": 0.0, "max_concurrent_requests": 0}
    origin = min(record.start_time for record in good)
    num_seconds = math.ceil(max(record.end_time for record in good) - origin) + 1
    tokens, requests = np.zeros(num_seconds), np.zeros(num_seconds, int)
    for record in good:
        for time in record.token_times():
            tokens[int(time - origin)] += 1
        requests[int(record.start_time - origin) : int(record.end_time - origin) + 1] += 1
    return {
        "max_output_tokens_per_s": float(tokens.max()),
        "max_concurrent_requests": int(requests.max()),
    }


def summarize(
    records: Sequence[Record],
    duration: float,
    *,
    percentile_metrics: Sequence[str],
    percentiles: Sequence[float],
    goodput: Mapping[str, float],
) -> dict[str, Any]:
    """The figures of a run of `duration` seconds, under the keys of `vllm bench serve`. goodput:
    limits in milliseconds by metric; without any, request_goodput is None."""
    good = [record for record in records if not record.error]
    num_input = sum(record.prompt_len for record in good)
    num_output = sum(record.output_len for record in good)
    return {
        "duration": duration,
        "completed": len(good),
        "failed": len(records) - len(good),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(good) / duration,
        "request_goodput": num_good(records, goodput) / duration if goodput else None,
        "output_throughput": num_output / duration,
        "total_token_throughput": (num_input + num_output) / duration,
        **peaks(records),
        **statistics_ms(values_of(records), percentile_metrics, percentiles),
        "input_lens": [record.prompt_len for record in records],
        "output_lens": [record.output_len for record in records],
        "ttfts": [record.ttft for record in records],
        "itls": [record.itls for record in records],
        "start_times": [record.start_time for record in records],
        "latencies": [record.latency for record in records],
        "generated_texts": [record.text for record in records],
        "errors": [record.error for record in records],
    }


def idle_share(busy_seconds: float | None, seconds: float) -> float | None:
    """The part of a time in which no step was under way; None where nothing is known of it."""
    if busy_seconds is None or seconds <= 0:
        return None
    return max(0.0, 1 - busy_seconds / seconds)


def active_seconds(records: Sequence[Record]) -> float:
    """Wall time in which at least one request was under way."""
    total, end = 0.0, -math.inf
    for start, stop in sorted((record.start_time, record.end_time) for record in records):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total
