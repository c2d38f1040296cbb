"""bench serve: drives a server with a workload and takes the times."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import aiohttp

from jaxllm.bench import client
from jaxllm.bench.client import Dialogue, Target
from jaxllm.bench.metrics import METRICS, Record, active_seconds, summarize
from jaxllm.bench.progress import progress
from jaxllm.bench.timeline import Timeline, watched
from jaxllm.bench.vocabulary import Vocabulary, load_tokenizer, of_size, of_tokenizer
from jaxllm.bench.workloads import (
    Conversation,
    WorkloadOptions,
    check_least,
    make_workload,
    start_times,
)

Advance = Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """How requests are sent and what is computed of their times. goodput: limits in milliseconds
    by metric. Raises ValueError."""

    request_rate: float = math.inf
    burstiness: float = 1.0
    max_concurrency: int | None = None
    seed: int = 0
    label: str | None = None
    tokenizer: str | None = None
    vocab_size: int | None = None
    goodput: Mapping[str, float] = field(default_factory=dict)
    percentile_metrics: Sequence[str] = METRICS
    percentiles: Sequence[float] = (99.0,)

    def __post_init__(self) -> None:
        for name, value in (("request_rate", self.request_rate), ("burstiness", self.burstiness)):
            if not value > 0:
                raise ValueError(f"--{name.replace('_', '-')} must be above 0, got {value}")
        if math.isinf(self.burstiness):
            raise ValueError("--burstiness must be finite")
        if self.max_concurrency is not None:
            check_least("max_concurrency", self.max_concurrency, 1)
        for name in self.percentile_metrics:
            if name not in METRICS:
                raise ValueError(
                    f"--percentile-metrics must be of {', '.join(METRICS)}, got {name!r}"
                )
        for percentile in self.percentiles:
            if not 0 <= percentile <= 100:
                raise ValueError(
                    f"--metric-percentiles must be between 0 and 100, got {percentile:g}"
                )
        if self.tokenizer is not None and self.vocab_size is not None:
            raise ValueError("give either --tokenizer or --vocab-size")


def bench_serve(target: Target, workload: WorkloadOptions, options: ServeOptions) -> dict[str, Any]:
    """One run: the result under the keys of `vllm bench serve`."""
    return bench_points(target, workload, [options])[0]


def bench_points(
    target: Target, workload: WorkloadOptions, points: Sequence[ServeOptions]
) -> list[dict[str, Any]]:
    """A run for each of the points. Their prompts differ, so that none finds those of another in
    the server's cache. Raises ValueError for a bad workload and a server that does not answer."""
    return asyncio.run(_bench_points(target, workload, points))


async def _bench_points(
    target: Target, workload: WorkloadOptions, points: Sequence[ServeOptions]
) -> list[dict[str, Any]]:
    results = []
    async with client.new_session(target) as session:
        if not target.model:
            target = replace(target, model=await client.find_model(session, target))
        vocabulary = await _vocabulary(session, target, points[0])
        for number, options in enumerate(points):
            work = make_workload(replace(workload, seed=workload.seed + number), vocabulary)
            if work[0].at is not None and not math.isinf(options.request_rate):
                raise ValueError("--request-rate has no place with a trace, which has timestamps")
            if number == 0:  # another prompt than those that count: they would be in the cache
                other = replace(workload, num_prompts=1, seed=workload.seed + len(points))
                await _warm_up(session, target, make_workload(other, vocabulary)[0])
            records, duration, timeline = await _run(session, target, work, options)
            results.append(_result(target, options, records, duration, timeline))
    return results


async def _vocabulary(
    session: aiohttp.ClientSession, target: Target, options: ServeOptions
) -> Vocabulary:
    if options.tokenizer is not None:
        return of_tokenizer(load_tokenizer(options.tokenizer), as_text=target.is_chat)
    if options.vocab_size is not None:
        return of_size(options.vocab_size, as_text=target.is_chat)
    return await client.server_vocabulary(session, target)


async def _warm_up(
    session: aiohttp.ClientSession, target: Target, conversation: Conversation
) -> None:
    """One request whose times do not count. Raises ValueError if it fails."""
    turn = conversation.turns[0]
    dialogue = Dialogue(target.is_chat)
    dialogue.ask(turn.prompt)
    await client.check_server(session, target, dialogue, turn.output_len)


async def _run(
    session: aiohttp.ClientSession,
    target: Target,
    work: Sequence[Conversation],
    options: ServeOptions,
) -> tuple[list[Record], float, Timeline]:
    """The records in the order of the workload, their times from the start of the run."""
    slots = asyncio.Semaphore(options.max_concurrency or sum(len(c.turns) for c in work))
    starts = start_times(work, options.request_rate, options.burstiness, options.seed)
    num_requests = sum(len(conversation.turns) for conversation in work)
    async with watched(session, target) as timeline:
        origin = time.perf_counter()
        with progress(num_requests, "requests") as advance:
            per_conversation = await asyncio.gather(
                *(
                    _converse(session, target, conversation, origin + start, slots, advance)
                    for conversation, start in zip(work, starts, strict=True)
                )
            )
        duration = time.perf_counter() - origin
    records = [record for records in per_conversation for record in records]
    for record in records:
        record.start_time -= origin
    return records, duration, timeline


async def _converse(
    session: aiohttp.ClientSession,
    target: Target,
    conversation: Conversation,
    start: float,
    slots: asyncio.Semaphore,
    advance: Advance,
) -> list[Record]:
    """One turn after the other; what follows a failed one fails too, unsent."""
    await asyncio.sleep(start - time.perf_counter())
    dialogue, prompt_len = Dialogue(target.is_chat), 0
    records: list[Record] = []
    for turn in conversation.turns:
        prompt_len += turn.prompt_len
        if records and records[-1].error:
            record = Record(start_time=time.perf_counter(), error="an earlier turn failed")
        else:
            dialogue.ask(turn.prompt)
            async with slots:
                record = await client.stream(session, target, dialogue, prompt_len, turn.output_len)
            dialogue.answer(record.text)
            prompt_len += record.output_len
        records.append(record)
        advance()
    return records


def _result(
    target: Target,
    options: ServeOptions,
    records: Sequence[Record],
    duration: float,
    timeline: Timeline,
) -> dict[str, Any]:
    rate = options.request_rate
    return {
        "date": datetime.now(UTC).strftime("%Y%m%d-%H%M%S"),
        "backend": "openai-chat" if target.is_chat else "openai",
        "label": options.label,
        "model_id": target.model,
        "tokenizer_id": options.tokenizer,
        "num_prompts": len(records),
        "request_rate": "inf" if math.isinf(rate) else rate,
        "burstiness": options.burstiness,
        "max_concurrency": options.max_concurrency,
        **summarize(
            records,
            duration,
            percentile_metrics=options.percentile_metrics,
            percentiles=options.percentiles,
            goodput=options.goodput,
        ),
        "padding_share": timeline.padding_share(),
        "idle_share": timeline.idle_share(active_seconds(records)),
        "timeline": timeline.body(),
    }


def parse_goodput(pairs: Sequence[str]) -> dict[str, float]:
    """["ttft:200", "tpot:50"] to limits in milliseconds. Raises ValueError."""
    limits = {}
    for pair in pairs:
        name, _, text = pair.partition(":")
        try:
            limit = float(text)
        except ValueError:
            limit = math.nan
        if name not in ("ttft", "tpot", "e2el") or not limit >= 0:
            raise ValueError(
                f"--goodput must be ttft:MS, tpot:MS or e2el:MS with MS at least 0, got {pair!r}"
            )
        limits[name] = limit
    return limits
