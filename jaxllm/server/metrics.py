"""Metrics for Prometheus, under the names that vLLM's dashboards ask for.

Requests are counted as they end, by the routes. What the engine counts itself is taken over as it
stands, so that nothing is lost or counted twice between two scrapes. Labels have fixed sets of
values: nothing that a client sends becomes one.
"""

from __future__ import annotations

import re
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from statistics import median
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from jaxllm.outputs import RequestMetrics

if TYPE_CHECKING:
    from jaxllm.engine.engine import EngineStats
    from jaxllm.engine.histogram import HistogramStats
    from jaxllm.engine.speculation import SpeculationStats

LATENCY = (
    0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.5, 0.75,
    1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0,
)  # fmt: skip
TOKENS = tuple(float(m * 10**e) for e in range(6) for m in (1, 2, 5))
ANSWERS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
FINISH_REASONS = ("stop", "length", "abort", "error", "timeout")
METHODS = ("GET", "POST", "OPTIONS", "HEAD", "PUT", "DELETE", "PATCH")
OTHER = "other"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
NUM_TTFT_KEPT = 100
PREFIX = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")

# name, help, for each; the values are in _gauges and _counters below
GAUGES = {
    "num_requests_running": "Sequences that are computed.",
    "num_requests_waiting": "Sequences that wait to be computed.",
    "kv_cache_usage_perc": "Share of the KV pool's blocks in use, 1 means all.",
    "padding_ratio": "Share of the computed tokens that was padding, since the start.",
    "programs": "Programs that the engine may need.",
    "programs_ready": "Of these, how many are compiled or loaded.",
}
COUNTERS = {
    "prefix_cache_queries": "Prompt tokens looked up in the prefix cache.",
    "prefix_cache_hits": "Prompt tokens found in the prefix cache.",
    "num_preemptions": "Sequences whose blocks were taken and that were computed again.",
    "prompt_tokens": "Prompt tokens of the requests that have their first token.",
    "generation_tokens": "Generated tokens.",
    "computed_tokens": "Tokens that the steps were asked for, recomputed ones included.",
    "padded_tokens": "Tokens that the compiled programs computed, padding included.",
    "failed_steps": "Steps that raised.",
    "compiles": "Programs compiled.",
    "program_cache_loads": "Programs loaded from the program cache.",
    "compile_seconds": "Seconds of compilation, summed over its threads.",
    "compile_wait_seconds": "Seconds that steps waited for a compilation.",
}
# With speculation only.
SPECULATION_COUNTERS = {
    "spec_decode_num_drafts": "How often a step verified guesses for a sequence.",
    "spec_decode_num_draft_tokens": "Guessed tokens that steps verified.",
    "spec_decode_num_accepted_tokens": "Of these, tokens that the model generated too.",
}
# name: help, buckets; each is a figure of one finished request
REQUEST_HISTOGRAMS = {
    "time_to_first_token_seconds": ("From arrival to the first token.", LATENCY),
    "request_time_per_output_token_seconds": ("Per token after the first, a request.", LATENCY),
    "e2e_request_latency_seconds": ("From arrival to the end.", LATENCY),
    "request_queue_time_seconds": ("From arrival to the first step.", LATENCY),
    "request_inference_time_seconds": ("From the first step to the end.", LATENCY),
    "request_prefill_time_seconds": ("From the first step to the first token.", LATENCY),
    "request_decode_time_seconds": ("From the first token to the end.", LATENCY),
    "request_prompt_tokens": ("Prompt tokens of a request.", TOKENS),
    "request_generation_tokens": ("Generated tokens of a request.", TOKENS),
    "request_params_n": ("Answers asked for.", ANSWERS),
    "request_params_max_tokens": ("max_tokens asked for.", TOKENS),
}


@dataclass(frozen=True)
class FinishedRequest:
    """What is known of a request at its end. metrics: of its last output; None if it had none, and
    its tokens are not known. max_tokens: None where the request set no limit. finish_reason: of its
    first answer."""

    metrics: RequestMetrics | None
    num_prompt_tokens: int
    num_generation_tokens: int
    finish_reason: str
    num_cached_tokens: int = 0
    max_tokens: int | None = None
    n: int = 1


def request_figures(request: FinishedRequest) -> Iterator[tuple[str, float]]:
    """The histograms a finished request adds to, and its values. What did not happen (a first
    token, with a request that was aborted in the queue) adds nothing."""
    yield "request_params_n", request.n
    if request.max_tokens is not None:
        yield "request_params_max_tokens", request.max_tokens
    times = request.metrics
    if times is None:
        return
    yield "request_prompt_tokens", request.num_prompt_tokens
    yield "request_generation_tokens", request.num_generation_tokens
    arrival, scheduled = times.arrival_time, times.first_scheduled_time
    first, end = times.first_token_time, times.finished_time
    if scheduled is not None:
        yield "request_queue_time_seconds", scheduled - arrival
    if first is not None:
        yield "time_to_first_token_seconds", first - arrival
        if scheduled is not None:
            yield "request_prefill_time_seconds", first - scheduled
    if end is not None:
        yield "e2e_request_latency_seconds", end - arrival
        if scheduled is not None:
            yield "request_inference_time_seconds", end - scheduled
        if first is not None:
            yield "request_decode_time_seconds", end - first
            num_later = request.num_generation_tokens / request.n - 1  # of an answer
            if num_later > 0:
                yield "request_time_per_output_token_seconds", (end - first) / num_later


class Metrics:
    """All metrics of one server, in a registry of their own. Safe to call from any thread.

    prefix: "jaxllm" or, for vLLM's dashboards, "vllm". model_name: the label on what concerns the
    model; the operator's name for it.
    """

    def __init__(self, prefix: str = "jaxllm", model_name: str = "") -> None:
        if not PREFIX.fullmatch(prefix):
            raise ValueError(
                f"metrics_prefix must be letters, digits and _, and begin with no digit, "
                f"got {prefix!r}"
            )
        self.prefix = prefix
        self.model_name = model_name
        self.registry = CollectorRegistry()
        self._routes: frozenset[str] = frozenset()
        self._recent_ttft: deque[float] = deque(maxlen=NUM_TTFT_KEPT)
        self._engine = _EngineCollector(prefix, model_name)
        self.registry.register(self._engine)
        ProcessCollector(registry=self.registry)
        self._make_request_metrics()
        self._make_http_metrics()

    def _make_request_metrics(self) -> None:
        self._figures = {
            name: self._histogram(name, help_text, buckets)
            for name, (help_text, buckets) in REQUEST_HISTOGRAMS.items()
        }
        inter_token = "inter_token_latency_seconds"
        self._inter_token = self._histogram(
            inter_token, "Between two outputs of a stream.", LATENCY
        )
        self._received = self._counter(
            "requests_received", "Requests handed to the engine.", ()
        ).labels(self.model_name)
        success = self._counter("request_success", "Requests that ended.", ("finished_reason",))
        self._success = {
            reason: success.labels(self.model_name, reason) for reason in (*FINISH_REASONS, OTHER)
        }

    def _make_http_metrics(self) -> None:
        self._http = Counter(
            f"{self.prefix}:http_requests", "HTTP responses.", ("route", "method", "status"),
            registry=self.registry,
        )  # fmt: skip
        self._http_seconds = Histogram(
            f"{self.prefix}:http_request_duration_seconds", "To the end of the response.",
            ("route",), buckets=LATENCY, registry=self.registry,
        )  # fmt: skip

    def _counter(self, name: str, help_text: str, labels: tuple[str, ...]) -> Counter:
        names = ("model_name", *labels)
        return Counter(f"{self.prefix}:{name}", help_text, names, registry=self.registry)

    def _histogram(self, name: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
        family = Histogram(
            f"{self.prefix}:{name}", help_text, ("model_name",), buckets=buckets,
            registry=self.registry,
        )  # fmt: skip
        return family.labels(self.model_name)

    def set_routes(self, routes: Iterable[str]) -> None:
        """The routes that may become labels; any other counts as "other"."""
        self._routes = frozenset(routes)

    def request_received(self) -> None:
        """A request goes to the engine."""
        self._received.inc()

    def inter_token(self, seconds: float) -> None:
        """Two outputs of a stream, with new tokens, came so far apart."""
        self._inter_token.observe(max(0.0, seconds))

    def request_finished(self, request: FinishedRequest) -> None:
        """A request that went to the engine has ended, however it did."""
        self._success.get(request.finish_reason, self._success[OTHER]).inc()
        for name, value in request_figures(request):
            self._figures[name].observe(max(0.0, value))
            if name == "time_to_first_token_seconds":
                self._recent_ttft.append(value)

    def recent_ttft_seconds(self) -> float | None:
        """The median of the last requests' times to the first token."""
        recent = list(self._recent_ttft)
        return median(recent) if recent else None

    def http_response(self, route: str, method: str, status: int, seconds: float) -> None:
        """A response has ended. route: the pattern of the route."""
        known = route if route in self._routes else OTHER
        method = method if method in METHODS else OTHER
        self._http.labels(known, method, str(status)).inc()
        self._http_seconds.labels(known).observe(max(0.0, seconds))

    def update_engine(self, stats: EngineStats) -> None:
        """The engine's latest counters. Earlier ones that come late are passed over."""
        self._engine.update(stats)

    def render(self) -> bytes:
        """The exposition, of CONTENT_TYPE. Only the classic format: as OpenMetrics the library
        would write the colons of the names as underscores."""
        return generate_latest(self.registry)


class _EngineCollector(Collector):
    """Shows the engine's own counters as they were when last asked for."""

    def __init__(self, prefix: str, model_name: str) -> None:
        self._prefix = prefix
        self._labels = (model_name,)
        self._stats: EngineStats | None = None
        self._lock = threading.Lock()

    def update(self, stats: EngineStats) -> None:
        with self._lock:
            if self._stats is None or stats.num_steps >= self._stats.num_steps:
                self._stats = stats

    def collect(self) -> Iterator[Metric]:
        """Called by the registry, from any thread. Nothing until the engine has answered once."""
        stats = self._stats
        if stats is None:
            return
        for name, value in _gauges(stats).items():
            gauge = GaugeMetricFamily(self._name(name), GAUGES[name], labels=("model_name",))
            gauge.add_metric(self._labels, value)
            yield gauge
        for name, value in _counters(stats).items():
            counter = CounterMetricFamily(self._name(name), COUNTERS[name], labels=("model_name",))
            counter.add_metric(self._labels, value)
            yield counter
        if stats.speculation is not None:
            yield from self._speculation(stats.speculation)
        yield self._histogram("iteration_tokens_total", "Tokens of a step.", stats.step_tokens)
        yield self._histogram("step_seconds", "Time of a step.", stats.step_seconds)

    def _speculation(self, stats: SpeculationStats) -> Iterator[Metric]:
        for name, help_text in SPECULATION_COUNTERS.items():
            counter = CounterMetricFamily(self._name(name), help_text, labels=("model_name",))
            counter.add_metric(self._labels, getattr(stats, name.removeprefix("spec_decode_")))
            yield counter
        by_position = CounterMetricFamily(
            self._name("spec_decode_num_accepted_tokens_per_pos"),
            "How often the guess at a position, from 0 on, was right.",
            labels=("model_name", "position"),
        )
        for position, value in enumerate(stats.num_accepted_by_position):
            by_position.add_metric((*self._labels, str(position)), value)
        yield by_position

    def _name(self, name: str) -> str:
        return f"{self._prefix}:{name}"

    def _histogram(self, name: str, help_text: str, stats: HistogramStats) -> Metric:
        family = HistogramMetricFamily(self._name(name), help_text, labels=("model_name",))
        bounds = [*(str(bound) for bound in stats.bounds), "+Inf"]
        buckets = list(zip(bounds, accumulate(stats.counts), strict=True))
        family.add_metric(self._labels, buckets, sum_value=stats.total)
        return family


def _gauges(stats: EngineStats) -> dict[str, float]:
    runner = stats.runner
    padded = runner.num_padded_tokens
    return {
        "num_requests_running": stats.num_running,
        "num_requests_waiting": stats.num_waiting,
        "kv_cache_usage_perc": stats.kv_usage,
        "padding_ratio": 1 - runner.num_tokens / padded if padded else 0.0,
        "programs": runner.num_programs,
        "programs_ready": runner.num_ready_programs,
    }


def _counters(stats: EngineStats) -> dict[str, float]:
    runner = stats.runner
    return {
        "prefix_cache_queries": stats.prefix_queries,
        "prefix_cache_hits": stats.prefix_hits,
        "num_preemptions": stats.num_preemptions,
        "prompt_tokens": stats.num_prompt_tokens,
        "generation_tokens": stats.num_generation_tokens,
        "computed_tokens": runner.num_tokens,
        "padded_tokens": runner.num_padded_tokens,
        "failed_steps": stats.num_failed_steps,
        "compiles": runner.num_compiled,
        "program_cache_loads": runner.num_loaded,
        "compile_seconds": runner.compile_seconds,
        "compile_wait_seconds": runner.compile_wait_seconds,
    }
