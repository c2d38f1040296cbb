"""Load on an OpenAI-compatible server: many streaming clients, some of which behave badly.

    python scripts/load_test.py --model smollm2-135m-instruct --clients 200 --seconds 20

Of the clients a third disconnects at random moments, some read slowly, and some send what has to
be refused. Every finished answer must equal the answer to the same request alone (greedy). At the
end nothing may be left running. Exits with 1 if any of it did not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

WORDS = ("the", "fox", "dog", "house", "model", "small", "once", "upon", "a", "time", "brown")
NUM_PROMPTS = 16
MOST_TROUBLES = 20
HELD = ("running", "waiting", "kv_cache_usage", "live_requests")  # of an answer of /load
INVALID: list[tuple[Any, int]] = [  # bodies, or changes of a valid one, and the status they deserve
    (b'{"model": ', 400),
    (b"[" * 1000, 400),
    ({"messages": []}, 400),
    ({"messages": "hello"}, 400),
    ({"temperature": "hot"}, 400),
    ({"max_tokens": -1}, 400),
    ({"no_such_field": 1}, 400),
    ({"model": "no-such-model"}, 404),
]


@dataclass
class Report:
    """What happened. troubles: what should not have, the first of them in words."""

    clients: int
    counts: Counter[str] = field(default_factory=Counter)
    troubles: list[str] = field(default_factory=list)
    ttft_seconds: list[float] = field(default_factory=list)
    memory_mib: list[float] = field(default_factory=list)
    num_chunks: int = 0
    seconds: float = 0.0

    def trouble(self, text: str) -> None:
        self.counts["troubled"] += 1
        if len(self.troubles) < MOST_TROUBLES:
            self.troubles.append(text)

    def figures(self) -> dict[str, Any]:
        """For people and for JSON."""
        ttft = sorted(self.ttft_seconds) or [0.0]
        return {
            "clients": self.clients,
            "seconds": round(self.seconds, 1),
            "counts": dict(self.counts),
            "chunks_per_second": round(self.num_chunks / max(self.seconds, 1e-9)),
            "median_ttft_ms": round(1e3 * statistics.median(ttft), 1),
            "p99_ttft_ms": round(1e3 * ttft[int(0.99 * (len(ttft) - 1))], 1),
            "memory_mib": memory_by_third(self.memory_mib),
            "troubles": self.troubles,
        }


def memory_by_third(samples: list[float]) -> list[float]:
    """The median of each third of the run; [] without samples."""
    third = len(samples) // 3
    parts = [samples[i * third : (i + 1) * third] for i in range(3)]
    return [round(statistics.median(part), 1) for part in parts if part]


class LoadTest:
    """Clients of one server. expected: the answer to each prompt alone."""

    def __init__(self, session: aiohttp.ClientSession, args: argparse.Namespace) -> None:
        self.session = session
        self.args = args
        self.report = Report(args.clients)
        self.random = random.Random(args.seed)
        self.prompts = [self._prompt(i) for i in range(NUM_PROMPTS)]
        self.expected: dict[str, str] = {}
        self.end = 0.0

    def _prompt(self, i: int) -> str:
        """Short and long ones, some with a common beginning."""
        words = random.Random(i // 2).choices(WORDS, k=2 + 3 * (i % 6))
        return f"{' '.join(words)} {i}"

    def body(self, prompt: str, stream: bool = True) -> dict[str, Any]:
        messages = [{"role": "user", "content": prompt}]
        return {
            "model": self.args.model, "messages": messages, "stream": stream, "temperature": 0,
            "max_tokens": self.args.max_tokens,
        }  # fmt: skip

    async def run(self) -> Report:
        """The whole test."""
        for prompt in self.prompts:
            async with self.post(self.body(prompt, stream=False)) as response:
                response.raise_for_status()
                answer = await response.json()
            self.expected[prompt] = answer["choices"][0]["message"]["content"]
        started = time.monotonic()
        self.end = started + self.args.seconds
        sampling = asyncio.create_task(self.sample_memory())
        await asyncio.gather(*(self.client(i) for i in range(self.args.clients)))
        sampling.cancel()
        self.report.seconds = time.monotonic() - started
        await self.check_idle()
        return self.report

    def post(self, body: Any) -> Any:
        """A request; its response is a context manager."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        url = f"{self.args.base_url}/v1/chat/completions"
        headers = {"Content-Type": "application/json"}
        if self.args.api_key:
            headers["Authorization"] = f"Bearer {self.args.api_key}"
        return self.session.post(url, data=data, headers=headers)

    async def client(self, index: int) -> None:
        """One request after the other until the time is over, each kind with its own manners."""
        manners = self.finish
        if index % 3 == 0:
            manners = self.disconnect
        elif index % 10 == 1:
            manners = self.read_slowly
        elif index % 10 == 2:
            manners = self.be_refused
        while time.monotonic() < self.end:
            try:
                await manners(self.random.choice(self.prompts))
            except (aiohttp.ClientError, TimeoutError, ValueError) as error:
                self.report.trouble(f"{manners.__name__}: {type(error).__name__} {error}")
                await asyncio.sleep(0.1)

    async def finish(self, prompt: str, pause: float = 0.0) -> None:
        """Reads the whole answer and compares it."""
        started, pieces, reason = time.monotonic(), [], None
        async with self.post(self.body(prompt)) as response:
            if response.status == 429:
                return await self.wait_for_room(response)
            async for choice in self.choices(response):
                content = choice["delta"].get("content")
                if content and not pieces:
                    self.report.ttft_seconds.append(time.monotonic() - started)
                pieces.append(content or "")
                reason = choice["finish_reason"] or reason
                await asyncio.sleep(pause)
        self.report.counts["finished"] += 1
        if reason not in ("length", "stop"):
            self.report.trouble(f"an answer to {prompt!r} ended by {reason!r}")
        elif "".join(pieces) != self.expected[prompt]:
            self.report.counts["wrong_answers"] += 1
            self.report.trouble(f"{''.join(pieces)!r} is not {self.expected[prompt]!r}")
        return None

    async def read_slowly(self, prompt: str) -> None:
        await self.finish(prompt, pause=self.random.uniform(0.01, 0.1))
        self.report.counts["slow_readers"] += 1

    async def disconnect(self, prompt: str) -> None:
        """Leaves at a random moment, perhaps before the first token."""
        patience = self.random.expovariate(1 / self.args.patience)
        try:
            async with asyncio.timeout(patience):
                async with self.post(self.body(prompt)) as response:
                    async for _ in self.choices(response):
                        pass
        except TimeoutError:
            self.report.counts["disconnected"] += 1
        await asyncio.sleep(self.random.uniform(0, 0.1))

    async def be_refused(self, prompt: str) -> None:
        body, expected = self.random.choice(INVALID)
        if isinstance(body, dict):
            body = {**self.body(prompt), **body}
        async with self.post(body) as response:
            text = await response.text()
            if response.status != expected or "message" not in json.loads(text)["error"]:
                self.report.trouble(f"{str(body)[:80]} got {response.status}: {text[:200]}")
        self.report.counts["refused"] += 1
        await asyncio.sleep(self.random.uniform(0, 0.2))

    async def wait_for_room(self, response: aiohttp.ClientResponse) -> None:
        """As a polite client does after a 429."""
        self.report.counts["told_to_wait"] += 1
        await asyncio.sleep(float(response.headers["Retry-After"]))

    async def choices(self, response: aiohttp.ClientResponse) -> Any:
        """The choices of each chunk until [DONE]. Raises ValueError for anything unexpected."""
        if response.status not in (200, 429):
            raise ValueError(f"status {response.status}: {(await response.text())[:200]}")
        async for line in response.content:
            if not line.startswith(b"data:"):
                continue
            if line.strip() == b"data: [DONE]":
                return
            chunk = json.loads(line[5:])
            if "error" in chunk:
                raise ValueError(f"a stream failed: {chunk['error']}")
            self.report.num_chunks += 1
            for choice in chunk["choices"]:
                yield choice
        if response.status == 200:
            raise ValueError("a stream ended without [DONE]")

    async def sample_memory(self) -> None:
        """Resident memory of the server's process, if its id was given."""
        if self.args.pid is None:
            return
        import psutil

        process = psutil.Process(self.args.pid)
        while True:
            self.report.memory_mib.append(process.memory_info().rss / 2**20)
            await asyncio.sleep(0.1)

    async def check_idle(self) -> None:
        """Within some seconds the server must hold nothing any more."""
        url = f"{self.args.base_url}/load"
        headers = {"Authorization": f"Bearer {self.args.api_key}"} if self.args.api_key else {}
        load: dict[str, Any] = {}
        for _ in range(100):
            async with self.session.get(url, headers=headers) as response:
                if response.status == 404:
                    self.report.counts["without_load_route"] = 1
                    return
                load = await response.json()
            if not any(load.get(name) for name in HELD):
                return
            await asyncio.sleep(0.05)
        self.report.trouble(f"not idle after 5 s: {load}")


async def run(args: argparse.Namespace) -> Report:
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=args.timeout)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        return await LoadTest(session, args).run()


def main() -> None:
    """Runs the test, prints what happened, and exits with 1 if something should not have."""
    parser = argparse.ArgumentParser(description="load on an OpenAI-compatible server")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", required=True)
    parser.add_argument("--api-key")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--max-tokens", type=int, default=24)
    parser.add_argument("--patience", type=float, default=1.0, help="mean until a disconnect, s")
    parser.add_argument("--timeout", type=float, default=120.0, help="of one request, s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pid", type=int, help="the server's process, whose memory is watched")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    report = asyncio.run(run(args))
    figures = report.figures()
    print(json.dumps(figures, indent=1))
    if args.json:
        args.json.write_text(json.dumps(figures) + "\n")
    sys.exit(1 if report.troubles or not report.counts["finished"] else 0)


if __name__ == "__main__":
    main()
