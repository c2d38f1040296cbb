"""bench startup: how long fresh processes take, with an empty and a filled cache of programs."""

from __future__ import annotations

import json
import statistics
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxllm.bench import processes
from jaxllm.bench.metrics import idle_share
from jaxllm.bench.progress import progress
from jaxllm.bench.timeline import read_metrics
from jaxllm.bench.workloads import check_least

CACHES = ("empty_cache", "filled_cache")
FIRST_TOKEN, FIRST_ANSWER = "generate_first_token_seconds", "serve_first_answer_seconds"
FLAGS_OF = {"seed": "--engine-seed"}
Times = dict[str, list[float]]


def bench_startup(model: str, runs: int, engine: Mapping[str, Any]) -> dict[str, Any]:
    """Medians over `runs`, and all values under "runs". engine: EngineOptions that were given.
    Raises ModelError for a model that is not there, ProcessError for a process that fails."""
    from jaxllm.loading.hub import find_model

    check_least("runs", runs, 1)
    options = dict(engine)
    cache_dir = options.pop("cache_dir", None)
    cache_dir = None if cache_dir is None else Path(cache_dir)
    find_model(model, revision=options.get("revision"), cache_dir=cache_dir)  # fetched, not timed
    flags = engine_flags(options)
    times: Times = {"import_seconds": []}
    shares: dict[str, float | None] = {}
    with progress(runs, "runs") as advance:
        for _ in range(runs):
            times["import_seconds"].append(processes.import_seconds())
            first_tokens(model, flags, cache_dir, times)
            shares = first_answers(model, flags, cache_dir, times)
            advance()
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    return {**medians, **shares, "runs": times}


def first_tokens(model: str, flags: Sequence[str], cache_dir: Path | None, times: Times) -> None:
    """Adds the seconds to the first token of `jaxllm generate`."""
    with processes.cache_with_models(cache_dir) as folder:
        all_flags = [*flags, "--cache-dir", folder]
        _add(times, FIRST_TOKEN, 0, processes.seconds_to_first_token(model, all_flags))
        # what the first run was not yet done with
        processes.seconds_to_first_token(model, all_flags)
        _add(times, FIRST_TOKEN, 1, processes.seconds_to_first_token(model, all_flags))


def first_answers(
    model: str, flags: Sequence[str], cache_dir: Path | None, times: Times
) -> dict[str, float | None]:
    """Adds the seconds to the first answer of `jaxllm serve`. Padding of that answer's steps, and
    the part of its time in which none was under way, with the filled cache."""
    shares: dict[str, float | None] = {}
    with processes.cache_with_models(cache_dir) as folder:
        all_flags = [*flags, "--cache-dir", folder]
        for filled in (0, 1):
            if filled:  # all programs, which the first server was not yet done with
                with processes.server(model, *all_flags, "--compilation", "ahead"):
                    pass
            started = time.perf_counter()
            with processes.server(model, *all_flags) as url:
                ready = time.perf_counter()
                _ask(url)
                answered = time.perf_counter()
                shares = _shares(url, answered - ready)
            _add(times, "serve_ready_seconds", filled, ready - started)
            _add(times, FIRST_ANSWER, filled, answered - started)
    return shares


def _add(times: Times, name: str, filled: int, seconds: float) -> None:
    times.setdefault(f"{name}_{CACHES[filled]}", []).append(seconds)


def _ask(url: str) -> None:
    with urllib.request.urlopen(f"{url}/v1/models") as reply:
        model = json.load(reply)["data"][0]["id"]
    body = {"model": model, "prompt": "The capital of France is", "max_tokens": 1}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as reply:
        assert json.load(reply)["choices"]


def _shares(url: str, seconds: float) -> dict[str, float | None]:
    with urllib.request.urlopen(f"{url}/metrics") as reply:
        values = read_metrics(reply.read().decode())
    busy = values.get("step_seconds_sum")
    return {
        "padding_share": values.get("padding_ratio"),
        "idle_share": idle_share(busy, seconds),
    }


def engine_flags(options: Mapping[str, Any]) -> list[str]:
    """Options as the command line takes them."""
    flags = []
    for name, value in options.items():
        flag = FLAGS_OF.get(name, "--" + name.replace("_", "-"))
        if isinstance(value, bool):
            flags.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            flags += [flag, "none" if value is None else str(value)]
    return flags
