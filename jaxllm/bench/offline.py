"""bench latency and bench throughput: the engine in this process, without a server."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxllm.bench.metrics import idle_share
from jaxllm.bench.progress import progress, shows_progress
from jaxllm.bench.vocabulary import of_tokenizer
from jaxllm.bench.workloads import WorkloadOptions, check_least, make_workload
from jaxllm.engine.engine import EngineStats
from jaxllm.llm import LLM
from jaxllm.sampling_params import SamplingParams

PERCENTILES = (10, 25, 50, 75, 90, 99)
# What a benchmark wants unless the user says otherwise: nothing compiled while it runs, and no
# prompt found in the cache because an earlier iteration had it.
DEFAULTS = {"compilation": "ahead", "enable_prefix_caching": False}


@dataclass(frozen=True, kw_only=True)
class LatencyOptions:
    """The flags of the same names. Raises ValueError."""

    input_len: int = 32
    output_len: int = 128
    batch_size: int = 8
    num_iters_warmup: int = 10
    num_iters: int = 30
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            may_be_zero = name in ("num_iters_warmup", "seed", "temperature")
            check_least(name, value, 0 if may_be_zero else 1)


class Meter:
    """Padding and idling of an engine over a span of time."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._before: EngineStats = llm.engine.stats()
        self._started = time.perf_counter()

    def shares(self) -> dict[str, float | None]:
        """Since it was made. idle_share: of the wall time, that in which no step was under way."""
        seconds = time.perf_counter() - self._started
        before, now = self._before, self._llm.engine.stats()
        padded = now.runner.num_padded_tokens - before.runner.num_padded_tokens
        asked = now.runner.num_tokens - before.runner.num_tokens
        busy = now.step_seconds.total - before.step_seconds.total
        return {
            "padding_share": 1 - asked / padded if padded else None,
            "idle_share": idle_share(busy, seconds),
        }


def bench_latency(model: str, options: LatencyOptions, engine: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds that one batch takes, under the keys of `vllm bench latency`. engine: EngineOptions
    that were given."""
    params = SamplingParams(
        temperature=options.temperature, ignore_eos=True, max_tokens=options.output_len
    )
    rng = np.random.default_rng(options.seed)
    num_iters = options.num_iters_warmup + options.num_iters
    with LLM(model, **{**DEFAULTS, **engine}) as llm:
        vocabulary = of_tokenizer(llm.get_tokenizer())
        prompts = [vocabulary.draw(options.input_len, rng) for _ in range(options.batch_size)]
        latencies: list[float] = []
        meter = Meter(llm)
        with progress(num_iters, "iterations") as advance:
            for number in range(num_iters):
                if number == options.num_iters_warmup:
                    meter = Meter(llm)
                started = time.perf_counter()
                llm.generate(prompts, params, use_tqdm=False)
                latencies.append(time.perf_counter() - started)
                advance()
        shares = meter.shares()
    return {**latency_figures(latencies[options.num_iters_warmup :]), **shares}


def latency_figures(latencies: Sequence[float]) -> dict[str, Any]:
    """Seconds, by the names of `vllm bench latency`."""
    return {
        "avg_latency": float(np.mean(latencies)),
        "std_latency": float(np.std(latencies)),
        "latencies": list(latencies),
        "percentiles": {str(p): float(np.percentile(latencies, p)) for p in PERCENTILES},
    }


def bench_throughput(
    model: str, workload: WorkloadOptions, temperature: float, engine: Mapping[str, Any]
) -> dict[str, Any]:
    """All requests at once, under the keys of `vllm bench throughput` and output_tokens_per_second.
    Every answer has the length that the workload says."""
    if workload.dataset_name in ("multi-turn", "trace"):
        raise ValueError(
            f"--dataset-name {workload.dataset_name} is for servers; use jaxllm bench serve"
        )
    with LLM(model, **{**DEFAULTS, **engine}) as llm:
        work = make_workload(workload, of_tokenizer(llm.get_tokenizer()))
        turns = [conversation.turns[0] for conversation in work]
        params = [
            SamplingParams(temperature=temperature, ignore_eos=True, max_tokens=turn.output_len)
            for turn in turns
        ]
        prompts = [
            turn.prompt if isinstance(turn.prompt, str) else {"prompt_token_ids": turn.prompt}
            for turn in turns
        ]
        llm.generate(prompts[0], params[0], use_tqdm=False)  # not measured
        meter = Meter(llm)
        started = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=shows_progress())
        elapsed = time.perf_counter() - started
        shares = meter.shares()
    num_output = sum(len(output.outputs[0].token_ids) for output in outputs)
    num_total = num_output + sum(len(output.prompt_token_ids) for output in outputs)
    return {
        "elapsed_time": elapsed,
        "num_requests": len(outputs),
        "total_num_tokens": num_total,
        "total_output_tokens": num_output,
        "requests_per_second": len(outputs) / elapsed,
        "tokens_per_second": num_total / elapsed,
        "output_tokens_per_second": num_output / elapsed,
        **shares,
    }
