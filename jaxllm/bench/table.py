"""Results as tables of text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxllm.bench.sweep import point_name

NOT_AVAILABLE = "not available"
SHARES = {"padding_share": "Padding share of computed tokens", "idle_share": "Idle share of time"}
SERVE = {
    "completed": "Successful requests",
    "failed": "Failed requests",
    "max_concurrency": "Maximum request concurrency",
    "request_rate": "Request rate (req/s)",
    "duration": "Benchmark duration (s)",
    "total_input_tokens": "Total input tokens",
    "total_output_tokens": "Total output tokens",
    "request_throughput": "Request throughput (req/s)",
    "request_goodput": "Request goodput (req/s)",
    "output_throughput": "Output token throughput (tok/s)",
    "max_output_tokens_per_s": "Peak output token throughput (tok/s)",
    "max_concurrent_requests": "Peak concurrent requests",
    "total_token_throughput": "Total token throughput (tok/s)",
}
SWEEP = ("completed", "failed", "output_throughput", "median_ttft_ms", "median_tpot_ms",
         "median_e2el_ms", "p99_e2el_ms", "padding_share", "idle_share")  # fmt: skip
HIDDEN = ("is_knee",)


def show(value: Any) -> str:
    """A cell."""
    if value is None:
        return NOT_AVAILABLE
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}"
    return str(value)


def lines(rows: Iterable[Sequence[str]]) -> str:
    """Rows with aligned columns: the first to the left, the others to the right."""
    rows = [list(row) for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def share(value: float | None) -> str:
    """In percent."""
    return NOT_AVAILABLE if value is None else f"{100 * value:.1f} %"


def figures(result: Mapping[str, Any]) -> dict[str, Any]:
    """A result's single numbers by their keys."""
    found = dict(result)
    found.update({f"p{p}_latency": v for p, v in result.get("percentiles", {}).items()})
    numbers = (int, float)
    return {
        key: value
        for key, value in found.items()
        if (isinstance(value, numbers) and not isinstance(value, bool)) and key not in HIDDEN
    }


def plain_table(result: Mapping[str, Any]) -> str:
    """All single numbers of a result under their keys, and the shares."""
    rows = [(key, show(value)) for key, value in figures(result).items() if key not in SHARES]
    return lines([*rows, *_shares(result)])


def serve_table(result: Mapping[str, Any]) -> str:
    """As people know it from vLLM, and why requests failed."""
    optional = ("request_goodput", "max_concurrency")
    rows = [
        (title, show(result[key]))
        for key, title in SERVE.items()
        if result[key] is not None or key not in optional
    ]
    rows += [
        (f"{kind.capitalize()} {metric.upper()} (ms)", show(value))
        for key, value in result.items()
        if key.endswith("_ms")
        for kind, metric, _ in [key.split("_")]
    ]
    text = lines([*rows, *_shares(result)])
    reasons = list(dict.fromkeys(error for error in result["errors"] if error))
    return "\n".join([text, *(f"failed: {reason}" for reason in reasons[:5])])


def _shares(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(title, share(result.get(key))) for key, title in SHARES.items()]


def sweep_table(results: Sequence[Mapping[str, Any]]) -> str:
    """A line for each run; the knee is marked."""
    keys = [key for key in SWEEP if any(key in result for result in results)]
    head = ["", *(key.removesuffix("_ms") + " (ms)" * key.endswith("_ms") for key in keys), ""]
    rows = [
        [
            point_name(dict(result)),
            *(share(result[k]) if k in SHARES else show(result.get(k)) for k in keys),
            "<- knee" if result.get("is_knee") else "",
        ]
        for result in results
    ]
    return lines([head, *rows])
