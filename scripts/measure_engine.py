"""The figures of the engine on this machine: start-up, host, padding, memory, context, grammar.

    python scripts/measure_engine.py startup host padding memory context grammar
    python scripts/measure_engine.py startup --runs 5 --json figures.json

Each figure is measured in processes of its own. The model's file is fetched before anything is
timed; only compiled programs are cold or warm.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measuring import Figures, machine, report

from jaxllm.bench.processes import cache_with_models
from jaxllm.bench.startup import CACHES, FIRST_TOKEN, first_tokens

MODEL = "smollm2-135m-instruct"
SOME_BITS = 0x3E00  # of a bfloat16, 1/8
NUM_STEPS = 15  # that the medians of steps with some context are taken over
NUM_DECODES = 90  # steps that the medians of host time are taken over


# ---- in the process that is measured


def host(model: str, cache_dir: str) -> Figures:
    """Host time between two decode steps of 64 sequences: from one's tokens on the host until the
    next one's program is dispatched. While a step runs, its weights displace everything else from
    the processor's caches, so that this is several times what the same code takes in a loop."""
    from jaxllm import LLM, SamplingParams

    limits = {"max_num_seqs": 64, "max_num_batched_tokens": 64, "max_model_len": 256}
    # "ahead": so that nothing is compiled meanwhile; with overlap the device would work meanwhile
    options = {**limits, "compilation": "ahead", "overlap": False}
    with LLM(model, cache_dir=cache_dir, **options) as llm:
        params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
        prompts = [[100 + i, 200, 300] for i in range(64)]
        llm.generate(prompts, params, use_tqdm=False)
        runner: Any = llm._running.runner
        program = runner._program
        packing: list[float] = []
        calls: list[float] = []
        runner._packer.pack = timed(runner._packer.pack, packing)
        runner._program = lambda name: timed(program(name), calls)
        started = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        step_seconds = (time.perf_counter() - started) / len(packing)
        # the last steps only decode; all four lists end with the same one
        engine: Any = llm.engine
        before = list(engine.meter.host_seconds)[-NUM_DECODES:]
        execute = list(engine.meter.dispatch_seconds)[-NUM_DECODES:]
    between = [sum(pair) for pair in zip(before, execute, strict=True)]
    figures = {
        "between_two_steps_ms": between,
        "of_that_schedule_and_postprocess_ms": before,
        "of_that_packing_ms": packing[-NUM_DECODES:],
        "of_that_call_of_program_ms": calls[-NUM_DECODES:],
    }
    medians = {name: 1e3 * statistics.median(seconds) for name, seconds in figures.items()}
    return {**medians, "whole_step_ms": 1e3 * step_seconds}


def timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """The function, which also writes down how long each call took."""

    def call(*args: Any) -> Any:
        started = time.perf_counter()
        result = function(*args)
        seconds.append(time.perf_counter() - started)
        return result

    return call


def padding(model: str, cache_dir: str) -> Figures:
    """Padding and compilations of 500 random requests after warm-up."""
    import jax
    import numpy as np

    from jaxllm import LLM, SamplingParams
    from jaxllm.runtime.compilation import COMPILE_EVENT

    compiled = []

    def listener(event: str, duration_secs: float, **_: str | int) -> None:
        if event == COMPILE_EVENT:
            compiled.append(duration_secs)

    random = np.random.default_rng(0)
    lens = random.integers(1, [200, 64], (500, 2)).tolist()  # of prompt and answer
    params = [
        SamplingParams(temperature=i % 2, seed=i, max_tokens=answer_len, ignore_eos=True)
        for i, (_, answer_len) in enumerate(lens)
    ]
    options = {"max_model_len": 512, "forbid_compile": True}
    with LLM(model, cache_dir=cache_dir, **options) as llm:
        jax.monitoring.register_event_duration_secs_listener(listener)
        vocab_size = llm.engine.vocab_size
        prompts = [random.integers(100, vocab_size, length).tolist() for length, _ in lens]
        started = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        stats, steps = llm._running.runner.stats, llm.engine.stats()
    by_bucket = stats.steps_by_bucket.most_common(6)
    return {
        "padding_share": stats.padding_share,
        "compilations": len(compiled),
        "steps": stats.num_steps,
        "output_tokens_per_second": steps.num_generation_tokens / seconds,
        "busiest_buckets": ", ".join(f"{bucket}: {count}" for bucket, count in by_bucket),
    }


def memory(model: str, cache_dir: str) -> Figures:
    """Peak resident memory after a load that fills the pool, against the plan of the start."""
    from jaxllm import LLM, SamplingParams

    with LLM(model, cache_dir=cache_dir, max_model_len=512) as llm:
        plan, config = llm._running.memory_plan, llm.engine.config
        length = config.max_model_len - 8
        params = SamplingParams(temperature=1, max_tokens=8, ignore_eos=True, top_p=0.9)
        prompts = [[100 + i, *range(1000, 1000 + length - 1)] for i in range(config.max_num_seqs)]
        llm.generate(prompts, params, use_tqdm=False)
        peak = int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) << 10
    return {
        "peak_mib": peak / 2**20,
        "planned_mib": plan.total / 2**20,
        "peak_over_plan": peak / plan.total,
        "plan": str(plan),
    }


def context(model: str, cache_dir: str) -> Figures:
    """How a decode step of 64 sequences grows from 256 to 2,048 tokens of context each, against
    the bytes that it has to read: the weights and the keys and values. The blocks of a sequence lie
    scattered and all hold something; what they hold does not matter."""
    import jax.numpy as jnp
    import numpy as np

    from jaxllm import LLM, SamplingParams
    from jaxllm.engine.sequence import Batch, ScheduledSequence, Sequence

    num_seqs, context_lens = 64, (256, 2048)
    longest = max(context_lens)
    with LLM(
        model, cache_dir=cache_dir, max_num_seqs=num_seqs, max_num_batched_tokens=num_seqs,
        max_model_len=longest, compilation="ahead", enable_prefix_caching=False,
    ) as llm:  # fmt: skip
        plan, config, runner = llm._running.memory_plan, llm.engine.config, llm._running.runner
        runner._state = runner._state._replace(
            kv_pool=jnp.full_like(runner._state.kv_pool, SOME_BITS)
        )
        blocks = np.random.default_rng(0).permutation(config.num_blocks)
        tables = blocks[: num_seqs * longest // config.block_size].reshape(num_seqs, -1).tolist()
        params = SamplingParams(temperature=0)

        def step_seconds(length: int) -> float:
            sequences = [
                Sequence(i, str(i), 0, params, 0, [100] * length, length, slot=i, block_table=table)
                for i, table in enumerate(tables)
            ]
            rows = [ScheduledSequence(sequence, length - 1, 1, 1) for sequence in sequences]
            started = time.perf_counter()
            runner.execute(Batch(rows, num_seqs, num_seqs)).result()
            return time.perf_counter() - started

        times = [[step_seconds(length) for length in context_lens] for _ in range(NUM_STEPS)]
    seconds = [statistics.median(column) for column in zip(*times, strict=True)]
    bytes_of_token = plan.pool / (config.num_blocks * config.block_size)
    read_bytes = [plan.parameters + num_seqs * n * bytes_of_token for n in context_lens]
    growth, growth_of_bytes = seconds[1] / seconds[0], read_bytes[1] / read_bytes[0]
    return {
        **{f"step_ms_{n}": 1e3 * s for n, s in zip(context_lens, seconds, strict=True)},
        "growth_of_time": growth,
        "growth_of_bytes_read": growth_of_bytes,
        "time_over_bytes": growth / growth_of_bytes,
    }


def grammar(model: str, cache_dir: str) -> Figures:
    """What a JSON schema costs 16 sequences, runs with it and without it in turn. Every integer
    may go on, so the schema forces few tokens."""
    from jaxllm import LLM, SamplingParams
    from jaxllm.structured_outputs import StructuredOutputsParams

    num_tokens = 96
    schema = {"type": "array", "items": {"type": "integer"}, "minItems": num_tokens}
    with LLM(
        model, cache_dir=cache_dir, max_num_seqs=16, max_model_len=256, compilation="ahead",
        enable_prefix_caching=False,
    ) as llm:  # fmt: skip
        prompts = [[100 + i, *range(1000, 1020)] for i in range(16)]

        def tokens_per_second(form: StructuredOutputsParams | None) -> float:
            params = SamplingParams(
                temperature=1, seed=1, max_tokens=num_tokens, ignore_eos=True,
                structured_outputs=form,
            )  # fmt: skip
            started = time.perf_counter()
            outputs = llm.generate(prompts, params, use_tqdm=False)
            count = sum(len(output.outputs[0].token_ids) for output in outputs)
            return count / (time.perf_counter() - started)

        form = StructuredOutputsParams(json=schema)
        tokens_per_second(form)  # compiles the grammar
        pairs = [(tokens_per_second(None), tokens_per_second(form)) for _ in range(7)]
    return {
        "free_tokens_per_second": statistics.median(free for free, _ in pairs),
        "schema_tokens_per_second": statistics.median(bound for _, bound in pairs),
        "schema_over_free": statistics.median(bound / free for free, bound in pairs),
    }


# ---- in the process that measures


def startup(model: str, runs: int) -> Figures:
    """Seconds from the start of a process to the end of its first token, with an empty and with a
    filled cache of compiled programs. `jaxllm bench startup` measures the server as well."""
    times: dict[str, list[float]] = {}
    for _ in range(runs):
        first_tokens(model, [], None, times)
    cold, warm = (times[f"{FIRST_TOKEN}_{cache}"] for cache in CACHES)
    return {
        "empty_cache_s": statistics.median(cold),
        "filled_cache_s": statistics.median(warm),
        "all_empty": " ".join(f"{seconds:.1f}" for seconds in cold),
        "all_filled": " ".join(f"{seconds:.1f}" for seconds in warm),
    }


def in_own_process(name: str, model: str) -> Figures:
    with cache_with_models() as cache_dir:
        command = [sys.executable, __file__, "--child", name, "--model", model]
        result = subprocess.run(
            [*command, "--cache-dir", cache_dir], stdout=subprocess.PIPE, check=True
        )
    figures: Figures = json.loads(result.stdout.splitlines()[-1])
    return figures


CHILDREN: dict[str, Callable[[str, str], Figures]] = {
    "host": host,
    "padding": padding,
    "memory": memory,
    "context": context,
    "grammar": grammar,
}


def main() -> None:
    """Measures what was asked for, prints it, and keeps it where --json says."""
    parser = argparse.ArgumentParser(description="figures of the engine on this machine")
    parser.add_argument("figures", nargs="*", help=f"startup, {', '.join(CHILDREN)}; default: all")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--runs", type=int, default=3, help="of each start; the median counts")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--child", choices=CHILDREN, help=argparse.SUPPRESS)
    parser.add_argument("--cache-dir", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(CHILDREN[args.child](args.model, args.cache_dir)))
        return
    if unknown := set(args.figures) - {"startup", *CHILDREN}:
        parser.error(f"unknown figures {', '.join(sorted(unknown))}")
    results: dict[str, Figures] = {"machine": machine()}
    for name in args.figures or ["startup", *CHILDREN]:
        is_startup = name == "startup"
        results[name] = (
            startup(args.model, args.runs) if is_startup else in_own_process(name, args.model)
        )
    report(results, args.json)


if __name__ == "__main__":
    main()
