"""jaxllm bench: latency, throughput, startup, serve, sweep."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllm.cli.bench_flags import (
    WORKLOAD,
    add_dataset_flags,
    add_output_flags,
    add_server_flags,
    numbers,
)
from jaxllm.cli.settings import UsageError, read_settings

if TYPE_CHECKING:
    from jaxllm.bench.client import Target
    from jaxllm.bench.serve import ServeOptions
    from jaxllm.bench.workloads import WorkloadOptions

Plot = Callable[[Path], list[Path]]


# ---- the engine in this process


def add_latency_flags(parser: argparse.ArgumentParser) -> None:
    """What only latency has."""
    group = parser.add_argument_group("latency options")
    for flag, default, what in (
        ("--input-len", 32, "tokens of each prompt"),
        ("--output-len", 128, "tokens of each answer"),
        ("--batch-size", 8, "prompts of a batch"),
        ("--num-iters-warmup", 10, "batches before those that count"),
        ("--num-iters", 30, "batches that count"),
        ("--seed", 0, "of the prompts"),
    ):
        group.add_argument(flag, type=int, default=default, metavar="N", help=what)
    group.add_argument("--temperature", type=float, default=1.0, metavar="X")
    add_output_flags(parser)


def run_latency(arguments: argparse.Namespace) -> int:
    """Prints and keeps the figures."""
    settings = read_settings(arguments)
    output = _Output(arguments)
    from jaxllm.bench.offline import LatencyOptions, bench_latency
    from jaxllm.bench.table import plain_table

    names = LatencyOptions.__dataclass_fields__
    options = LatencyOptions(**{name: getattr(arguments, name) for name in names})
    assert settings.model is not None
    result = bench_latency(settings.model, options, settings.engine)

    def plot(folder: Path) -> list[Path]:
        from jaxllm.bench.plots import plot_distributions

        return plot_distributions({"latency": result["latencies"]}, folder)

    output.show(result, plain_table(result), plot)
    return 0


def add_throughput_flags(parser: argparse.ArgumentParser) -> None:
    """What only throughput has."""
    add_dataset_flags(parser, ("random", "sharegpt", "prefix-repetition"))
    parser.add_argument("--temperature", type=float, default=1.0, metavar="X")
    add_output_flags(parser, plots=False)


def run_throughput(arguments: argparse.Namespace) -> int:
    """Prints and keeps the figures."""
    settings = read_settings(arguments)
    output = _Output(arguments)
    from jaxllm.bench.offline import bench_throughput
    from jaxllm.bench.table import plain_table

    workload = _workload(arguments)
    assert settings.model is not None
    result = bench_throughput(settings.model, workload, arguments.temperature, settings.engine)
    output.show(result, plain_table(result))
    return 0


def add_startup_flags(parser: argparse.ArgumentParser) -> None:
    """What only startup has."""
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="the median counts")
    add_output_flags(parser, plots=False)


def run_startup(arguments: argparse.Namespace) -> int:
    """Prints and keeps the figures."""
    settings = read_settings(arguments)
    output = _Output(arguments)
    from jaxllm.bench.startup import bench_startup
    from jaxllm.bench.table import plain_table

    assert settings.model is not None
    result = bench_startup(settings.model, arguments.runs, settings.engine)
    output.show(result, plain_table(result))
    return 0


# ---- a server


def add_serve_flags(parser: argparse.ArgumentParser) -> None:
    """What only serve has."""
    add_server_flags(parser)
    group = parser.add_argument_group("load options")
    group.add_argument(
        "--request-rate", type=float, default=float("inf"), metavar="X",
        help="requests a second; inf: all at once",
    )  # fmt: skip
    group.add_argument("--max-concurrency", type=int, metavar="N", help="most requests at once")
    group.add_argument(
        "--percentile-metrics", default="ttft,tpot,itl,e2el", metavar="NAME,...",
        help="metrics that statistics are made of",
    )  # fmt: skip
    add_output_flags(parser)


def run_serve(arguments: argparse.Namespace) -> int:
    """Prints and keeps the figures; 1 if no request succeeded."""
    output = _Output(arguments)
    workload, options = (
        _workload(arguments),
        _serve_options(
            arguments,
            request_rate=arguments.request_rate,
            max_concurrency=arguments.max_concurrency,
            percentile_metrics=arguments.percentile_metrics.split(","),
        ),
    )
    from jaxllm.bench.plots import plot_serve
    from jaxllm.bench.serve import bench_serve
    from jaxllm.bench.table import serve_table

    result = bench_serve(_target(arguments), workload, options)
    output.show(result, serve_table(result), lambda folder: plot_serve(result, folder))
    return 0 if result["completed"] else 1


def add_sweep_flags(parser: argparse.ArgumentParser) -> None:
    """What only sweep has."""
    add_server_flags(parser)
    group = parser.add_argument_group("load options")
    either = group.add_mutually_exclusive_group(required=True)
    either.add_argument("--request-rates", metavar="X,...", help="requests a second: 1,2,4,inf")
    either.add_argument("--max-concurrencies", metavar="N,...", help="most at once: 1,2,4,8")
    add_output_flags(parser)


def run_sweep(arguments: argparse.Namespace) -> int:
    """Prints and keeps the runs; 1 if no request of one of them succeeded."""
    output = _Output(arguments)
    rates = numbers("--request-rates", arguments.request_rates, float)
    concurrencies = numbers("--max-concurrencies", arguments.max_concurrencies, int)
    workload, options = _workload(arguments), _serve_options(arguments)
    from jaxllm.bench.plots import plot_sweep
    from jaxllm.bench.sweep import bench_sweep
    from jaxllm.bench.table import sweep_table

    results = bench_sweep(
        _target(arguments), workload, options, rates=rates, concurrencies=concurrencies
    )
    output.show(results, sweep_table(results), lambda folder: plot_sweep(results, folder))
    return 0 if all(result["completed"] for result in results) else 1


def _workload(arguments: argparse.Namespace) -> WorkloadOptions:
    from jaxllm.bench.workloads import WorkloadOptions

    given = vars(arguments)
    return WorkloadOptions(**{name: given[name] for name in WORKLOAD if name in given})


def _target(arguments: argparse.Namespace) -> Target:
    from jaxllm.bench.client import Target, split_headers

    body: dict[str, Any] = {}
    if arguments.temperature is not None:
        body["temperature"] = arguments.temperature
    if arguments.ignore_eos:
        body["ignore_eos"] = True
    headers = split_headers(arguments.header or [])
    base_url = arguments.base_url
    if not base_url.startswith(("http://", "https://")):
        raise UsageError(f"--base-url must begin with http:// or https://, got {base_url!r}")
    return Target(base_url, arguments.model or "", arguments.endpoint, headers, body)


def _serve_options(arguments: argparse.Namespace, **options: Any) -> ServeOptions:
    from jaxllm.bench.serve import ServeOptions, parse_goodput

    return ServeOptions(
        burstiness=arguments.burstiness,
        seed=arguments.seed,
        label=arguments.label,
        tokenizer=arguments.tokenizer,
        vocab_size=arguments.vocab_size,
        goodput=parse_goodput(arguments.goodput or []),
        percentiles=numbers("--metric-percentiles", arguments.metric_percentiles, float),
        **options,
    )


# ---- what becomes of a result


class _Output:
    """Where results go. Everything that can be is checked before anything is measured."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        from jaxllm.bench.compare import read_results

        self._others = read_results(arguments.compare or [])
        self._file = _writable(arguments.save_result)
        self._folder = None
        if getattr(arguments, "plot", None) is not None:
            from jaxllm.bench.plots import check_folder

            self._folder = check_folder(arguments.plot)

    def show(self, result: Any, table: str, plot: Plot | None = None) -> None:
        """Prints the tables, writes JSON and pictures."""
        from jaxllm.bench.compare import compare

        print(table)
        if self._file is not None:
            self._file.write_text(json.dumps(result) + "\n", encoding="utf-8")
        if self._folder is not None and plot is not None:
            for file in plot(self._folder):
                print(f"written: {file}")
        if self._others:
            print(f"\n{compare(result, self._others)}")


def _writable(path: str | None) -> Path | None:
    if path is None:
        return None
    file = Path(path).expanduser()
    is_new = not file.exists()
    try:
        with open(file, "a"):
            pass
        if is_new:
            file.unlink()  # should the run fail, nothing is left behind
    except OSError as error:
        raise UsageError(f"--save-result {path}: cannot be written: {error.strerror}") from error
    return file
