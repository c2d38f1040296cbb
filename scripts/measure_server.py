"""The figures of the server on this machine: its overhead, first token, and start.

    python scripts/measure_server.py overhead ttft start --json figures.json

Server and engine are measured on the same work in the same run, each in a process of its own,
turn by turn so that a busy machine harms both. The ratio of each pair counts; the median is shown.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

from measuring import Figures, machine, report

from jaxllm.bench import processes
from jaxllm.bench.startup import engine_flags

MODEL = "smollm2-135m-instruct"
ENGINE = {"max_model_len": 512, "max_num_seqs": 32}
NUM_STREAMS, PROMPT_LEN, ANSWER_LEN = 32, 32, 128  # tokens
NUM_FIRST_TOKENS = 15


def prompts(seed: int, count: int) -> list[list[int]]:
    """Random tokens, so that no prompt begins as another."""
    import random

    source = random.Random(seed)
    return [source.choices(range(100, 40000), k=PROMPT_LEN) for _ in range(count)]


# ---- the engine, in a process of its own


def engine_child(model: str) -> None:
    """Loads the engine, says when it is ready, and does what each line of stdin asks for."""
    from jaxllm import LLM, SamplingParams

    with LLM(model, compilation="ahead", **ENGINE) as llm:  # type: ignore[arg-type]
        print(json.dumps({"ready": True}), flush=True)
        for line in sys.stdin:
            asked = json.loads(line)
            params = SamplingParams(temperature=0, max_tokens=asked["max_tokens"], ignore_eos=True)
            work = prompts(asked["seed"], asked["count"])
            started = time.perf_counter()
            outputs = llm.generate(work, params, use_tqdm=False)
            seconds = time.perf_counter() - started
            num_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
            print(json.dumps({"seconds": seconds, "tokens": num_tokens}), flush=True)


class EngineProcess:
    """The child above."""

    def __init__(self, model: str) -> None:
        command = [sys.executable, __file__, "--child", "--model", model]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        self._read()

    def _read(self) -> Figures:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("the engine's process has ended")
        figures: Figures = json.loads(line)
        return figures

    def generate(self, seed: int, count: int, max_tokens: int) -> Figures:
        """Seconds and tokens of LLM.generate."""
        assert self.process.stdin is not None
        asked = {"seed": seed, "count": count, "max_tokens": max_tokens}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


# ---- the server, in a process of its own


def server(model: str, *options: str) -> contextlib.AbstractContextManager[str]:
    """Starts `jaxllm serve`, waits until it is ready, and gives its address."""
    return processes.server(model, *engine_flags(ENGINE), *options)


async def stream_all(url: str, work: list[list[int]], max_tokens: int) -> Figures:
    """Streams an answer to every prompt at once. The client does as little as it can, since it
    computes on the cores that it measures."""
    import aiohttp

    async def stream(session: aiohttp.ClientSession, prompt: list[int]) -> tuple[float, int]:
        body = {
            "model": model_name, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0,
            "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        first, tail = 0.0, b""
        async with session.post(f"{url}/v1/completions", json=body) as response:
            response.raise_for_status()
            async for piece in response.content.iter_any():
                first = first or time.perf_counter() - started
                tail = (tail + piece)[-2000:]
        usage = re.findall(rb'"completion_tokens":\s*(\d+)', tail)
        return first, int(usage[-1])

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        async with session.get(f"{url}/v1/models") as response:
            model_name = (await response.json())["data"][0]["id"]
        started = time.perf_counter()
        results = await asyncio.gather(*(stream(session, prompt) for prompt in work))
        seconds = time.perf_counter() - started
    first = statistics.median(first for first, _ in results)
    return {"seconds": seconds, "tokens": sum(n for _, n in results), "first": first}


# ---- figures


def overhead(model: str, runs: int) -> Figures:
    """Output tokens/s of 32 concurrent streams against LLM.generate."""
    ratios, of_server, of_engine = [], [], []
    engine = EngineProcess(model)
    with server(model, "--compilation", "ahead") as url:
        asyncio.run(stream_all(url, prompts(1000, NUM_STREAMS), 8))
        engine.generate(1000, NUM_STREAMS, 8)
        for seed in range(runs):
            alone = engine.generate(seed, NUM_STREAMS, ANSWER_LEN)
            served = asyncio.run(stream_all(url, prompts(seed, NUM_STREAMS), ANSWER_LEN))
            of_engine.append(alone["tokens"] / alone["seconds"])
            of_server.append(served["tokens"] / served["seconds"])
            ratios.append(of_server[-1] / of_engine[-1])
    engine.close()
    return {
        "server_tokens_per_second": statistics.median(of_server),
        "engine_tokens_per_second": statistics.median(of_engine),
        "ratio": statistics.median(ratios),
        "all_ratios": [round(ratio, 3) for ratio in ratios],
        "wanted": "ratio at least 0.95",
    }


def ttft(model: str, runs: int) -> Figures:
    """First token of an idle server for a prompt of 32 tokens against the engine's prefill."""
    of_server, of_engine = [], []
    engine = EngineProcess(model)
    with server(model, "--compilation", "ahead") as url:
        for seed in range(2000, 2000 + NUM_FIRST_TOKENS * runs):
            of_engine.append(1e3 * engine.generate(seed, 1, 1)["seconds"])
            served = asyncio.run(stream_all(url, prompts(seed, 1), 2))
            of_server.append(1e3 * served["first"])
    engine.close()
    prefill, first = statistics.median(of_engine), statistics.median(of_server)
    return {
        "server_ttft_ms": first,
        "engine_prefill_ms": prefill,
        "limit_ms": 1.3 * prefill + 10,
        "wanted": "server_ttft_ms at most limit_ms = 1.3 x engine_prefill_ms + 10",
    }


def start(model: str, runs: int) -> Figures:
    """Seconds until /health says ready against those until an engine is ready, both from the start
    of the process, with a filled cache of compiled programs."""
    code = "import sys, json; from jaxllm import LLM; LLM(sys.argv[1], **json.loads(sys.argv[2]))"
    command = [sys.executable, "-c", f"{code}; print(1, flush=True)", model, json.dumps(ENGINE)]
    of_server, of_engine = [], []
    for _ in range(runs + 1):  # the first fills the cache
        started = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            of_engine.append(time.perf_counter() - started)
        started = time.perf_counter()
        with server(model):
            of_server.append(time.perf_counter() - started)
    differences = [a - b for a, b in zip(of_server[1:], of_engine[1:], strict=True)]
    return {
        "server_s": statistics.median(of_server[1:]),
        "engine_s": statistics.median(of_engine[1:]),
        "difference_s": statistics.median(differences),
        "wanted": "difference_s at most 0.5",
    }


FIGURES = {"overhead": overhead, "ttft": ttft, "start": start}


def main() -> None:
    """Measures what was asked for, prints it, and keeps it where --json says."""
    parser = argparse.ArgumentParser(description="figures of the server on this machine")
    parser.add_argument("figures", nargs="*", help=f"{', '.join(FIGURES)}; default: all")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        engine_child(args.model)
        return
    if unknown := set(args.figures) - set(FIGURES):
        parser.error(f"unknown figures {', '.join(sorted(unknown))}")
    results = {"machine": machine()}
    for name in args.figures or FIGURES:
        results[name] = FIGURES[name](args.model, args.runs)
    report(results, args.json)


if __name__ == "__main__":
    main()
