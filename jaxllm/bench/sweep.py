"""bench sweep: the same workload at several rates or concurrencies, and the knee of the curve."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from jaxllm.bench.client import Target
from jaxllm.bench.serve import ServeOptions, bench_points
from jaxllm.bench.workloads import WorkloadOptions

X, Y = "output_throughput", "median_e2el_ms"  # the curve that has the knee


def bench_sweep(
    target: Target,
    workload: WorkloadOptions,
    options: ServeOptions,
    *,
    rates: Sequence[float] = (),
    concurrencies: Sequence[int] = (),
) -> list[dict[str, Any]]:
    """A result of bench serve for each point, in the order given; is_knee says which one is. Raises
    ValueError."""
    if bool(rates) == bool(concurrencies):
        raise ValueError("give either --request-rates or --max-concurrencies")
    if workload.dataset_name == "trace":
        raise ValueError("a trace has its own timestamps; use jaxllm bench serve")
    points = [replace(options, request_rate=rate) for rate in rates]
    points += [replace(options, max_concurrency=count) for count in concurrencies]
    results = bench_points(target, workload, points)
    index = knee([result[X] for result in results], [result[Y] for result in results])
    return [{**result, "is_knee": i == index} for i, result in enumerate(results)]


def knee(throughputs: Sequence[float], latencies: Sequence[float]) -> int | None:
    """The point after which latency rises more than throughput: both are scaled to [0, 1], and of
    the points below the chord from the first to the last (by throughput) it is the farthest from
    it. None where there is none: fewer than three points, or a curve that does not bend."""
    if len(throughputs) < 3:
        return None
    x, y = _scaled(throughputs), _scaled(latencies)
    order = np.lexsort((y, x))
    first, last = order[0], order[-1]
    run, rise = x[last] - x[first], y[last] - y[first]
    length = math.hypot(run, rise)
    if not length:
        return None
    # positive where a point is below the chord
    distances = (rise * (x - x[first]) - run * (y - y[first])) / length
    best = int(np.argmax(distances))
    return best if distances[best] > 1e-9 else None


def _scaled(values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, float)
    span = np.ptp(array)
    return (array - array.min()) / span if span else np.zeros_like(array)


def point_name(result: dict[str, Any]) -> str:
    """What tells a run of a sweep from the others."""
    concurrency = result["max_concurrency"]
    rate = f"{result['request_rate']} req/s"
    if concurrency is None:
        return rate
    return f"{concurrency} at once" if result["request_rate"] == "inf" else f"{rate}, {concurrency}"
