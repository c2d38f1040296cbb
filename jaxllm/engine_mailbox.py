"""The event loop's side of the engine's thread: what it sent, by request, until it is read."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jaxllm.engine.engine import EngineSnapshot, EngineStats
from jaxllm.engine_thread import (
    EngineStopped,
    FromEngine,
    Outputs,
    RequestRefused,
    Snapshot,
    Stats,
)
from jaxllm.outputs import CompletionOutput, RequestOutput


class Stream:
    """What the engine sent of one request and its consumer has not read: never more than one
    output, however slow the consumer is."""

    def __init__(self, request_id: str, engine_id: str, delta: bool) -> None:
        self.request_id = request_id
        self.engine_id = engine_id
        self.was_aborted = False
        self._delta = delta
        self._ready = asyncio.Event()
        self._output: RequestOutput | None = None
        self._error: Exception | None = None

    def put(self, output: RequestOutput) -> None:
        output.request_id = self.request_id
        if self._output is not None and self._delta:
            output = merge_deltas(self._output, output)
        self._output = output
        self._ready.set()

    def fail(self, error: Exception) -> None:
        self._error = error
        self._ready.set()

    async def get(self) -> RequestOutput:
        """The next output; what came before an error is read before it is raised."""
        await self._ready.wait()
        output, self._output = self._output, None
        if output is None:
            assert self._error is not None
            raise self._error
        if self._error is None:
            self._ready.clear()
        return output


def merge_deltas(earlier: RequestOutput, later: RequestOutput) -> RequestOutput:
    """Two outputs of kind DELTA as if they had been sent as one."""
    outputs = {output.index: output for output in earlier.outputs}
    for output in later.outputs:
        before = outputs.get(output.index)
        outputs[output.index] = output if before is None else _merge(before, output)
    return replace(
        later,
        outputs=[outputs[index] for index in sorted(outputs)],
        prompt_logprobs=(
            later.prompt_logprobs if earlier.prompt_logprobs is None else earlier.prompt_logprobs
        ),
    )


def _merge(earlier: CompletionOutput, later: CompletionOutput) -> CompletionOutput:
    logprobs = later.logprobs
    if earlier.logprobs is not None and later.logprobs is not None:
        logprobs = earlier.logprobs + later.logprobs
    return replace(
        later,
        text=earlier.text + later.text,
        token_ids=earlier.token_ids + later.token_ids,
        logprobs=logprobs,
    )


class Mailbox:
    """The event loop's side: hands what the engine sent to those who wait for it. All but `post`
    is called on the loop's thread."""

    def __init__(self) -> None:
        self.stopped: EngineStopped | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._streams: dict[str, Stream] = {}  # by engine_id
        self._engine_ids: dict[str, str] = {}  # of live request ids
        self._answers: dict[int, asyncio.Future[Any]] = {}  # by ticket
        self._counter = itertools.count()

    def post(self, messages: Sequence[FromEngine]) -> bool:
        """From the engine's thread: one wake-up of the loop for all messages of a step."""
        if isinstance(messages[-1], EngineStopped):
            self.stopped = messages[-1]  # before the loop is read: see attach()
        loop = self._loop
        if loop is None:
            return True
        try:
            loop.call_soon_threadsafe(self._receive, messages)
        except RuntimeError:  # the loop is closed, and all who waited are gone
            return False
        return True

    def attach(self) -> None:
        """Before anything waits: the loop is the running one, and the engine lives."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            if self._loop is not None and not self._loop.is_closed() and self._streams:
                raise RuntimeError("this AsyncEngine has live requests in another event loop")
            self._streams.clear()
            self._engine_ids.clear()
            self._answers.clear()
            self._loop = loop
        if self.stopped is not None:
            raise self.stopped.error()

    def open(self, request_id: str, delta: bool) -> Stream:
        """The engine gets an id of its own, never used again: what it may still send of an aborted
        request does not reach the next one of the same name."""
        if request_id in self._engine_ids:
            raise ValueError(f"request id {request_id!r} is in use by a live request")
        stream = Stream(request_id, f"{request_id}#{next(self._counter)}", delta)
        self._engine_ids[request_id] = stream.engine_id
        self._streams[stream.engine_id] = stream
        return stream

    def find(self, request_id: str) -> Stream | None:
        engine_id = self._engine_ids.get(request_id)
        return None if engine_id is None else self._streams[engine_id]

    def close(self, stream: Stream) -> None:
        """May be called again."""
        if self._streams.pop(stream.engine_id, None) is not None:
            del self._engine_ids[stream.request_id]

    def expect_answer(self) -> tuple[int, asyncio.Future[Any]]:
        """A ticket for a question to the engine, and the future of its answer."""
        ticket = next(self._counter)
        self._answers[ticket] = asyncio.get_running_loop().create_future()
        return ticket, self._answers[ticket]

    def _answer(self, ticket: int, answer: EngineStats | EngineSnapshot) -> None:
        future = self._answers.pop(ticket, None)
        if future is not None and not future.done():
            future.set_result(answer)

    def _receive(self, messages: Sequence[FromEngine]) -> None:
        for message in messages:
            if isinstance(message, Outputs):
                for output in message.outputs:
                    stream = self._streams.get(output.request_id)
                    if stream is not None:  # else its consumer has left
                        stream.put(output)
            elif isinstance(message, RequestRefused):
                refused = self._streams.get(message.request_id)
                if refused is not None:
                    refused.fail(message.error)
            elif isinstance(message, Stats):
                self._answer(message.ticket, message.stats)
            elif isinstance(message, Snapshot):
                self._answer(message.ticket, message.snapshot)
            else:
                self._fail_all(message)

    def _fail_all(self, stopped: EngineStopped) -> None:
        for stream in self._streams.values():
            stream.fail(stopped.error())
        for future in self._answers.values():
            if not future.done():
                future.set_exception(stopped.error())
        self._answers.clear()
