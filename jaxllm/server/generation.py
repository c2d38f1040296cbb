"""Requests in the engine on behalf of a client: admission, deadline, several prompts, usage."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxllm.async_engine import AsyncEngine
from jaxllm.outputs import RequestOutput
from jaxllm.request_error import RequestError
from jaxllm.sampling_params import RequestOutputKind, SamplingParams
from jaxllm.server.body import OneText
from jaxllm.server.context import ServerContext, new_request_id
from jaxllm.server.errors import RETRY_AFTER, ApiError, to_api_error
from jaxllm.server.logs import RequestRecord
from jaxllm.server.metrics import FinishedRequest

GRACE_SECONDS = 5.0  # for the engine to end a request whose deadline has passed

Outputs = AsyncGenerator[RequestOutput, None]
# Starts one request: AsyncEngine.generate or .chat with all but the id, which is the argument.
Start = Callable[[AsyncEngine, str], Outputs]


def as_prompt(text: OneText) -> dict[str, OneText]:
    """For the engine. A dict says which it is: an empty list is no list of messages."""
    return {"prompt" if isinstance(text, str) else "prompt_token_ids": text}


@dataclass
class Usage:
    """Tokens of a request. Its prompt counts once, however many answers there are."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def add_prompt(self, output: RequestOutput) -> None:
        """Once for each prompt."""
        self.prompt_tokens += len(output.prompt_token_ids)
        self.cached_tokens += output.num_cached_tokens

    def add_output(self, output: RequestOutput) -> None:
        """With each output of kind DELTA, or with the final one."""
        self.completion_tokens += sum(len(one.token_ids) for one in output.outputs)

    def body(self) -> dict[str, Any]:
        """As OpenAI sends it."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


async def run_request(
    context: ServerContext,
    start: Start,
    params: SamplingParams,
    timeout: float | None = None,
    record: RequestRecord | None = None,
    prompt_field: str = "prompt",
    num_sequences: int | None = None,
) -> Outputs:
    """The outputs of one request. When its time (the client's or the server's, whichever is
    shorter) is over it ends with the finish reason "timeout" and what it has. Close it to abort.
    record: the HTTP request's, for its line in the log. prompt_field: of the client's request.
    num_sequences: that the engine computes, if it is not what params says.

    Raises ApiError if the engine takes it neither now (429, 503) nor ever (400).
    """
    engine = context.ready_engine()
    request_id = new_request_id()
    limits = [limit for limit in (timeout, context.options.request_timeout) if limit is not None]
    seconds = min(limits, default=None)
    with (
        context.registered(request_id, num_sequences or params.num_sequences),
        _Observer(context, params, record) as observer,
        _naming(prompt_field),
    ):
        async with (
            contextlib.aclosing(start(engine, request_id)) as outputs,
            _deadline(engine, request_id, seconds) as deadline,
        ):
            async for output in _within_grace(outputs, deadline):
                output = _timed_out(output) if deadline.passed else output
                observer.take(output)
                yield output


@contextlib.contextmanager
def _naming(prompt_field: str) -> Iterator[None]:
    """What the engine calls the prompt has another name in each API."""
    try:
        yield
    except RequestError as error:
        refused = to_api_error(error)
        if refused.param == "prompt":
            refused.param = prompt_field
        raise refused from None


class _Observer:
    """Tells the metrics and the log what became of a request in the engine."""

    def __init__(
        self, context: ServerContext, params: SamplingParams, record: RequestRecord | None
    ) -> None:
        self._metrics = context.metrics
        self._params = params
        self._record = record
        self._is_stream = params.output_kind is RequestOutputKind.DELTA
        self._usage = Usage()
        self._last: RequestOutput | None = None
        self._last_time: float | None = None

    def take(self, output: RequestOutput) -> None:
        """The next output."""
        self._last = output
        self._usage.add_output(output)
        if self._is_stream and any(answer.token_ids for answer in output.outputs):
            now = time.monotonic()
            if self._last_time is not None:
                self._metrics.inter_token(now - self._last_time)
            self._last_time = now

    def __enter__(self) -> _Observer:
        self._metrics.request_received()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        last, usage = self._last, self._usage
        is_failure = kind is not None and issubclass(kind, Exception)
        reason = "error" if is_failure else "abort"  # by leaving
        if last is not None:
            usage.add_prompt(last)
            if last.finished and last.outputs:
                reason = last.outputs[0].finish_reason or reason
        times = None if last is None else last.metrics
        self._metrics.request_finished(
            FinishedRequest(
                times,
                usage.prompt_tokens,
                usage.completion_tokens,
                reason,
                num_cached_tokens=usage.cached_tokens,
                max_tokens=self._params.max_tokens,
                n=self._params.n,
            )
        )
        if self._record is not None:
            ttft = None
            if times is not None and times.first_token_time is not None:
                ttft = times.first_token_time - times.arrival_time
            tokens = usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens
            self._record.add(*tokens, ttft, reason)


@dataclass
class _Deadline:
    at: float | None  # on the loop's clock
    passed: bool = False


@contextlib.asynccontextmanager
async def _deadline(
    engine: AsyncEngine, request_id: str, seconds: float | None
) -> AsyncIterator[_Deadline]:
    """Aborts the request when its time is over."""
    if seconds is None:
        yield _Deadline(None)
        return
    loop = asyncio.get_running_loop()
    deadline = _Deadline(loop.time() + seconds)
    tasks = []

    def abort() -> None:
        deadline.passed = True
        tasks.append(loop.create_task(engine.abort(request_id)))

    assert deadline.at is not None
    timer = loop.call_at(deadline.at, abort)
    try:
        yield deadline
    finally:
        timer.cancel()


async def _within_grace(outputs: Outputs, deadline: _Deadline) -> AsyncIterator[RequestOutput]:
    """The outputs. A step that hangs does not hold a request with a deadline."""
    end = None if deadline.at is None else deadline.at + GRACE_SECONDS
    while True:
        try:
            async with asyncio.timeout_at(end):
                output = await anext(outputs)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise ApiError(
                503, "the engine did not answer in time", code="timeout", headers=RETRY_AFTER
            ) from None
        yield output


def _timed_out(output: RequestOutput) -> RequestOutput:
    answers = [
        replace(answer, finish_reason="timeout") if answer.finish_reason == "abort" else answer
        for answer in output.outputs
    ]
    return replace(output, outputs=answers)


async def run_all(requests: Sequence[Outputs]) -> list[RequestOutput]:
    """The final outputs of several requests. If one fails the others are aborted."""
    if len(requests) == 1:
        return [await _last(requests[0])]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_last(request)) for request in requests]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


async def _last(outputs: Outputs) -> RequestOutput:
    async with contextlib.aclosing(outputs):
        async for output in outputs:
            last = output
    check_answers(last)
    return last


def check_answers(output: RequestOutput) -> None:
    """Raises a 500 for answers that a failed step ended: they are not the model's."""
    if any(answer.finish_reason == "error" for answer in output.outputs):
        raise ApiError(500, "the engine failed while it computed this request")


async def run_merged(
    requests: Sequence[Outputs],
) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """Outputs of several requests as they come, each with its request's index. A slow consumer
    holds them all up, and what the engine makes meanwhile is merged."""
    if len(requests) == 1:
        async with contextlib.aclosing(requests[0]) as only:
            async for output in only:
                check_answers(output)
                yield 0, output
        return
    queue: asyncio.Queue[tuple[int, RequestOutput | Exception | None]] = asyncio.Queue(1)

    async def pump(index: int, outputs: Outputs) -> None:
        last: Exception | None = None
        try:
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    await queue.put((index, output))
        except Exception as error:
            last = error
        await queue.put((index, last))

    tasks = [asyncio.create_task(pump(i, outputs)) for i, outputs in enumerate(requests)]
    num_open = len(tasks)
    try:
        while num_open:
            index, item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_open -= 1
                continue
            check_answers(item)
            yield index, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
