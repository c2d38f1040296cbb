"""AsyncEngine: the same answers as LLM, and nothing left behind however a consumer leaves."""

from __future__ import annotations

import asyncio
import gc
import itertools
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxllm import LLM, AsyncEngine, CompletionOutput, RequestOutput, RequestOutputKind
from jaxllm import SamplingParams as Params
from jaxllm.async_engine import EngineDeadError
from jaxllm.engine.engine import QueueFullError
from jaxllm.engine_mailbox import merge_deltas

PROMPTS = ["The quick brown", "Once upon a time", "What is", "The dog", "In the house", "a"]
GREEDY = Params(temperature=0, max_tokens=24, ignore_eos=True)
LONG = Params(temperature=0, max_tokens=200, ignore_eos=True, output_kind=RequestOutputKind.DELTA)


@pytest.fixture(scope="module")
def shared(tiny_llama_folder: Path, tiny_llm: dict[str, Any]) -> Iterator[AsyncEngine]:
    engine = AsyncEngine(str(tiny_llama_folder), **tiny_llm)
    yield engine
    engine.close()


@pytest.fixture
def engine(shared: AsyncEngine) -> Iterator[AsyncEngine]:
    """One engine for all tests, each of which has an event loop of its own."""
    yield shared
    scheduler = shared.running.engine.scheduler
    deadline = time.monotonic() + 10
    while shared.running.engine.has_unfinished_requests() and time.monotonic() < deadline:
        time.sleep(0.005)
    scheduler.pool.check_integrity()
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.pool.usage) == (0, 0, 0)


@pytest.fixture
def own_engine(tiny_llama_folder: Path, tiny_llm: dict[str, Any]) -> Iterator[AsyncEngine]:
    """For tests that break it."""
    engine = AsyncEngine(str(tiny_llama_folder), **tiny_llm)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def expected(tiny_llama_folder: Path, tiny_llm: dict[str, Any]) -> dict[str, CompletionOutput]:
    with LLM(str(tiny_llama_folder), **tiny_llm) as llm:
        outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        chat = llm.chat([{"role": "user", "content": "Hello"}], GREEDY, use_tqdm=False)
    answers = {output.prompt or "": output.outputs[0] for output in outputs}
    return {**answers, "chat": chat[0].outputs[0]}


async def collect(outputs: AsyncIterator[RequestOutput]) -> list[RequestOutput]:
    return [output async for output in outputs]


def of_kind(kind: RequestOutputKind) -> Params:
    return Params(temperature=0, max_tokens=24, ignore_eos=True, output_kind=kind)


async def test_concurrent_requests_equal_llm(
    engine: AsyncEngine, expected: dict[str, CompletionOutput]
) -> None:
    streams = await asyncio.gather(*(collect(engine.generate(p, GREEDY)) for p in PROMPTS))
    for prompt, stream in zip(PROMPTS, streams, strict=True):
        assert stream[-1].outputs[0] == expected[prompt]
        assert [output.finished for output in stream] == [False] * (len(stream) - 1) + [True]
        texts = [output.outputs[0].text for output in stream]
        assert all(later.startswith(text) for text, later in itertools.pairwise(texts))


async def test_delta_pieces_join_to_the_answer(
    engine: AsyncEngine, expected: dict[str, CompletionOutput]
) -> None:
    params = of_kind(RequestOutputKind.DELTA)
    stream = await collect(engine.generate(PROMPTS[0], params, "mine"))
    assert {output.request_id for output in stream} == {"mine"}
    assert len(stream) > 1
    assert "".join(o.outputs[0].text for o in stream) == expected[PROMPTS[0]].text
    token_ids = [token_id for o in stream for token_id in o.outputs[0].token_ids]
    assert token_ids == expected[PROMPTS[0]].token_ids


async def test_final_only_is_one_output(
    engine: AsyncEngine, expected: dict[str, CompletionOutput]
) -> None:
    (output,) = await collect(engine.generate(PROMPTS[1], of_kind(RequestOutputKind.FINAL_ONLY)))
    assert output.finished
    assert output.outputs == [expected[PROMPTS[1]]]


async def test_chat_equals_llm(engine: AsyncEngine, expected: dict[str, CompletionOutput]) -> None:
    outputs = await collect(engine.chat([{"role": "user", "content": "Hello"}], GREEDY))
    assert outputs[-1].outputs == [expected["chat"]]
    assert outputs[-1].prompt == "<|user|>Hello<|end|><|assistant|>"


async def test_without_params_the_models_defaults_are_taken(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Params] = []
    add_request = engine.running.engine.add_request

    def spy(request: Any) -> None:
        seen.append(request.params)
        add_request(request)

    monkeypatch.setattr(engine.running.engine, "add_request", spy)
    await collect(engine.generate("The fox"))
    assert seen == [Params(temperature=0.5, top_k=20)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": [5, 100000]}, "100000 at position 1 is outside the vocabulary"),
        ({"prompt": [5] * 256}, "the prompt has 256 tokens"),
        ({"prompt": 3}, "a prompt must be text or token ids, got int"),
        ({"prompt": "a", "sampling_params": {"n": 1}}, "must be SamplingParams, got dict"),
        ({"prompt": "a", "sampling_params": Params(stop_token_ids=[320])}, "has token id 320"),
        ({"prompt": "a", "request_id": ""}, "request_id must be a non-empty string"),
        ({"prompt": "a", "priority": 1}, "scheduling_policy='priority'"),
        ({"prompt": "a", "cache_salt": 3}, "cache_salt must be a string"),
        ({"prompt": {"prompt": "a", "cache_salt": "x"}, "cache_salt": "x"}, "given twice"),
    ],
)
async def test_invalid_request_fails_in_its_own_caller_only(
    engine: AsyncEngine,
    expected: dict[str, CompletionOutput],
    arguments: dict[str, Any],
    message: str,
) -> None:
    good = asyncio.create_task(collect(engine.generate(PROMPTS[2], GREEDY)))
    with pytest.raises(ValueError, match=message):
        await collect(engine.generate(**arguments))
    assert (await good)[-1].outputs == [expected[PROMPTS[2]]]
    assert engine.is_running


async def test_full_queue_is_told_to_the_caller(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.running.engine, "max_num_waiting", 0)
    with pytest.raises(QueueFullError):
        await collect(engine.generate("a", GREEDY))


async def leave_by_aclose(engine: AsyncEngine) -> None:
    stream = engine.generate("The fox", LONG)
    await anext(stream)
    await stream.aclose()


async def leave_by_break(engine: AsyncEngine) -> None:
    async for _ in engine.generate("The fox", LONG):
        break
    await asyncio.sleep(0.01)  # the loop closes what was collected in a task of its own


async def leave_by_cancellation(engine: AsyncEngine) -> None:
    started = asyncio.Event()

    async def consume() -> None:
        async for _ in engine.generate("The fox", LONG):
            started.set()

    task = asyncio.create_task(consume())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def leave_while_tokenizing(engine: AsyncEngine) -> None:
    task = asyncio.create_task(collect(engine.generate("The fox", LONG)))
    await asyncio.sleep(0)  # it runs up to its first await
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def leave_by_collection(engine: AsyncEngine) -> None:
    cycle: list[Any] = [engine.generate("The fox", LONG)]
    cycle.append(cycle)
    await anext(cycle[0])
    del cycle
    gc.collect()
    await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    "leave",
    [
        leave_by_aclose, leave_by_break, leave_by_cancellation, leave_while_tokenizing,
        leave_by_collection,
    ],
)  # fmt: skip
async def test_an_abandoned_request_is_aborted(
    engine: AsyncEngine, leave: Callable[[AsyncEngine], Any]
) -> None:
    await leave(engine)
    stats = await engine.stats()  # handled after the abort, before another step
    assert (stats.num_running, stats.num_waiting, stats.kv_usage) == (0, 0, 0)


async def test_a_slow_consumer_gets_the_rest_in_one_piece(engine: AsyncEngine) -> None:
    whole = (await collect(engine.generate("The fox", LONG)))[0:]
    token_ids = [t for output in whole for t in output.outputs[0].token_ids]
    stream = engine.generate("The fox", LONG)
    first = await anext(stream)
    while (await engine.stats()).num_running:
        await asyncio.sleep(0.01)
    rest = await anext(stream)
    assert rest.finished
    assert first.outputs[0].token_ids + rest.outputs[0].token_ids == token_ids
    joined = first.outputs[0].text + rest.outputs[0].text
    assert joined == "".join(output.outputs[0].text for output in whole)
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def test_abort_ends_the_iterator_with_a_last_output(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, go_on, numbers = engine.running.engine.runner, threading.Event(), itertools.count()
    execute = runner.execute

    def held(batch: Any) -> Any:
        if next(numbers) > 1:  # the second is dispatched before the first one's result is taken
            assert go_on.wait(60)
        return execute(batch)

    monkeypatch.setattr(runner, "execute", held)
    stream = engine.generate("The fox", LONG, "one")
    first = await anext(stream)
    await engine.abort("one")
    await engine.abort("never seen")
    go_on.set()  # for the step under way
    rest = await collect(stream)
    assert (rest[-1].finished, rest[-1].outputs[0].finish_reason) == (True, "abort")
    assert [len(o.outputs[0].token_ids) for o in [first, *rest]] in ([1, 0], [1, 1, 0], [1, 1])


def test_an_engine_that_nobody_closes_does_not_hold_up_the_end(tiny_llama_folder: Path) -> None:
    program = f"""
import asyncio, atexit
from jaxllm import AsyncEngine

def report():  # after all that end before it, for it is registered first
    print(thread.is_alive, figures().num_ready_programs / figures().num_programs)

atexit.register(report)
engine = AsyncEngine({str(tiny_llama_folder)!r}, program_cache=False)
thread, figures = engine._thread, engine.running.runner.figures

async def answer():
    async for _ in engine.generate("The fox"):
        pass

asyncio.run(answer())
"""
    command = [sys.executable, "-c", program]
    child = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    is_alive, ready_share = child.stdout.split()
    assert is_alive == "False"
    assert float(ready_share) < 0.5


async def test_abort_before_the_request_is_tokenized(engine: AsyncEngine) -> None:
    task = asyncio.create_task(collect(engine.generate("The fox", LONG, "early")))
    await asyncio.sleep(0)
    await engine.abort("early")
    (output,) = await task
    assert (output.outputs[0].finish_reason, output.outputs[0].token_ids) == ("abort", [])


async def test_a_request_id_is_free_again_once_its_request_is_gone(engine: AsyncEngine) -> None:
    stream = engine.generate("The fox", LONG, "same")
    await anext(stream)
    with pytest.raises(ValueError, match="'same' is in use by a live request"):
        await anext(engine.generate("The dog", LONG, "same"))
    await stream.aclose()
    outputs = await collect(engine.generate("The dog", GREEDY, "same"))
    # what the engine still sent of the first one is not in it; outputs not read in time are merged
    assert all(output.outputs[0].finish_reason is None for output in outputs[:-1])
    token_ids = outputs[-1].outputs[0].token_ids
    assert (len(token_ids), outputs[-1].outputs[0].finish_reason) == (24, "length")
    for output in outputs:
        seen = output.outputs[0].token_ids
        assert seen == token_ids[: len(seen)]


async def test_one_wake_up_a_step(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    wake_ups = 0
    call_soon_threadsafe = loop.call_soon_threadsafe

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal wake_ups
        wake_ups += threading.current_thread().name == "jaxllm-engine"
        return call_soon_threadsafe(*args, **options)

    before = (await engine.stats()).num_steps
    monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
    streams = await asyncio.gather(*(collect(engine.generate(p, GREEDY)) for p in PROMPTS))
    num_outputs = sum(len(stream) for stream in streams)
    num_wake_ups = wake_ups
    num_steps = (await engine.stats()).num_steps - before
    assert num_wake_ups <= num_steps < num_outputs


async def test_an_idle_engine_sleeps(engine: AsyncEngine) -> None:
    await collect(engine.generate("a", GREEDY))
    thread = next(t for t in threading.enumerate() if t.name == "jaxllm-engine")
    assert thread.ident is not None
    clock = time.pthread_getcpuclockid(thread.ident)
    before = time.clock_gettime(clock)
    await asyncio.sleep(0.2)
    assert time.clock_gettime(clock) - before < 0.01


def test_a_closed_loop_takes_its_requests_with_it(engine: AsyncEngine) -> None:
    loop = asyncio.new_event_loop()
    stream = engine.generate("The fox", LONG)
    loop.run_until_complete(anext(stream))
    loop.close()  # without shutdown_asyncgens: the iterator is never told
    deadline = time.monotonic() + 10
    while engine.running.engine.has_unfinished_requests():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    generated = engine.running.engine.stats().num_generation_tokens
    outputs = asyncio.run(collect(engine.generate("a", GREEDY)))
    assert outputs[-1].outputs[0].finish_reason == "length"
    assert engine.running.engine.stats().num_generation_tokens == generated + 24


async def test_a_failed_step_is_the_answers_end_not_the_engines(
    engine: AsyncEngine, expected: dict[str, CompletionOutput], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(batch: Any) -> Any:
        raise RuntimeError("the device is on fire")

    with monkeypatch.context() as patch:
        patch.setattr(engine.running.engine.runner, "execute", fail)
        outputs = await collect(engine.generate(PROMPTS[3], GREEDY))
    assert outputs[-1].outputs[0].finish_reason == "error"
    assert engine.is_running
    assert not engine.errored
    outputs = await collect(engine.generate(PROMPTS[3], GREEDY))
    assert outputs[-1].outputs == [expected[PROMPTS[3]]]


async def test_when_the_engine_dies_every_waiter_learns_it(
    own_engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = own_engine
    scheduler = engine.running.engine.scheduler
    schedule = scheduler.schedule

    def fail(*_: Any) -> Any:
        if scheduler.num_running == 3:
            raise AssertionError("a block is lost")
        time.sleep(0.05)  # until the third has come
        return schedule()

    monkeypatch.setattr(scheduler, "schedule", fail)
    streams = [collect(engine.generate(prompt, LONG)) for prompt in PROMPTS[:3]]
    results = await asyncio.gather(*streams, return_exceptions=True)
    assert [str(result) for result in results] == [
        "the engine died: AssertionError: a block is lost"
    ] * 3
    assert all(isinstance(result, EngineDeadError) for result in results)
    assert (engine.errored, engine.is_running) == (True, False)
    with pytest.raises(EngineDeadError):
        await anext(engine.generate("a", GREEDY))
    with pytest.raises(EngineDeadError):
        await engine.stats()


async def test_close_ends_waiters_and_the_thread(
    own_engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with own_engine as engine:
        step = engine.running.engine.step
        monkeypatch.setattr(engine.running.engine, "step", lambda: time.sleep(0.05) or step())
        stream = engine.generate("The fox", LONG)
        await anext(stream)
        task = asyncio.create_task(collect(stream))
        await asyncio.sleep(0)
    with pytest.raises(EngineDeadError, match="was closed"):
        await task
    assert (engine.is_running, engine.errored) == (False, False)
    assert not engine._thread.is_alive
    engine.close()
    with pytest.raises(EngineDeadError, match="was closed"):
        await engine.stats()


def test_a_forgotten_engine_ends_its_thread(
    tiny_llama_folder: Path, tiny_llm: dict[str, Any]
) -> None:
    engine = AsyncEngine(str(tiny_llama_folder), **tiny_llm)
    thread = engine._thread
    assert thread.is_alive
    del engine
    gc.collect()
    assert not thread.is_alive


def test_merged_deltas_are_what_one_output_would_have_held() -> None:
    def output(*completions: CompletionOutput, finished: bool = False) -> RequestOutput:
        return RequestOutput("r", "p", [1], list(completions), finished)

    earlier = output(
        CompletionOutput(0, "ab", [1, 2], -1.0, [{}, {}]), CompletionOutput(2, "x", [7])
    )
    later = output(
        CompletionOutput(0, "c", [3], -1.5, [{}], "stop", 3),
        CompletionOutput(1, "y", [8]),
        finished=True,
    )
    earlier.prompt_logprobs = [None]
    merged = merge_deltas(earlier, later)
    assert merged.outputs == [
        CompletionOutput(0, "abc", [1, 2, 3], -1.5, [{}, {}, {}], "stop", 3),
        CompletionOutput(1, "y", [8]),
        CompletionOutput(2, "x", [7]),
    ]
    assert merged.finished
    assert merged.prompt_logprobs == [None]


async def test_two_loops_at_once_are_refused(engine: AsyncEngine) -> None:
    stream = engine.generate("The fox", LONG)
    await anext(stream)
    with pytest.raises(RuntimeError, match="another event loop"):
        await asyncio.to_thread(asyncio.run, collect(engine.generate("a", GREEDY)))
    await stream.aclose()
