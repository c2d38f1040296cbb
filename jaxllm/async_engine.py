"""The engine for asyncio: requests come and go at any time, each an async iterator of outputs.

The engine runs on a thread of its own (engine_thread.py). Here is the event loop's side.
"""

from __future__ import annotations

import asyncio
import time
import uuid
import weakref
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from jaxllm.beam_search_params import BeamSearchParams
from jaxllm.engine.engine import EngineSnapshot, EngineStats, Request
from jaxllm.engine.request import NO_SAMPLING
from jaxllm.engine_mailbox import Mailbox
from jaxllm.engine_options import EngineOptions
from jaxllm.engine_thread import (
    AbortRequest,
    AddRequest,
    EngineDeadError,
    EngineThread,
    GetSnapshot,
    GetStats,
)
from jaxllm.outputs import EmbeddingRequestOutput, RequestOutput
from jaxllm.pooling_params import PoolingParams
from jaxllm.prompts import (
    Message,
    Prompt,
    TokenizedPrompt,
    checked_pooling,
    checked_search,
    params_of_kind,
    tokenize_chat,
    tokenize_prompt,
)
from jaxllm.request_error import RequestError
from jaxllm.sampling_params import RequestOutputKind, SamplingParams
from jaxllm.startup import RunningEngine, start_engine
from jaxllm.text.tokenizer import Tokenizer

__all__ = [
    "AsyncEngine",
    "EngineDeadError",
    "EngineSnapshot",
    "EngineStats",
    "Heartbeat",
]

AnyParams = SamplingParams | BeamSearchParams


@dataclass(frozen=True)
class Heartbeat:
    """How long the engine has been at what it does; both None while it has nothing to do.

    busy_seconds: since the step under way began, waits for a compilation left out.
    compile_wait_seconds: since it began to wait for a compilation, while it does.
    """

    busy_seconds: float | None
    compile_wait_seconds: float | None


class AsyncEngine:
    """A model served to one event loop.

        async with AsyncEngine("smollm2-135m-instruct", max_model_len=2048) as engine:
            async for output in engine.generate("The capital of France is"):
                print(output.outputs[0].text)

    Takes what LLM takes, and like it returns when the model is loaded: in a loop that serves others
    already, make it with ``asyncio.to_thread``. Once it has died or was closed, everything raises
    EngineDeadError.
    """

    def __init__(self, model: str, **options: Any) -> None:
        self._start(start_engine(str(model), EngineOptions(**options)))

    @classmethod
    def from_running(cls, running: RunningEngine) -> AsyncEngine:
        """Takes over an engine; nobody else may use it from now on, and close() closes it."""
        engine = cls.__new__(cls)
        engine._start(running)
        return engine

    def _start(self, running: RunningEngine) -> None:
        self.running = running
        self._mailbox = Mailbox()
        self._thread = EngineThread(running.engine, self._mailbox.post, running.close)
        # also when it is forgotten, or the program ends
        self._stop = weakref.finalize(self, self._thread.stop)

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """Ends all requests with EngineDeadError, waits for the step under way, and frees the
        device's memory. May be called again, from any thread."""
        self._stop()

    @property
    def is_running(self) -> bool:
        """Whether requests are taken."""
        return self._thread.is_alive and self._mailbox.stopped is None

    @property
    def errored(self) -> bool:
        """Whether the engine has died of an error."""
        stopped = self._mailbox.stopped
        return stopped is not None and stopped.failure is not None

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self.running.tokenizer

    def generate(
        self,
        prompt: Prompt,
        sampling_params: AnyParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Outputs to one prompt as they come, of the kind that sampling_params.output_kind says.
        With BeamSearchParams there is one output, at the end. Outputs that the consumer has not
        read are merged. Leaving the iterator (aclose, cancellation, or when it is collected)
        aborts the request.

        Raises, at the first item, ValueError for what cannot be served and QueueFullError if not
        now.
        """

        def tokenize() -> TokenizedPrompt:
            return tokenize_prompt(prompt, self.running.tokenizer)

        return self._run(tokenize, sampling_params, request_id, priority, cache_salt)

    def chat(
        self,
        messages: Sequence[Message],
        sampling_params: AnyParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Like `generate`, for a conversation, through the chat template."""

        def tokenize() -> TokenizedPrompt:
            return tokenize_chat(
                list(messages),  # type: ignore[arg-type]  # render_chat checks them
                self.running.tokenizer,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
                **(chat_template_kwargs or {}),
            )

        return self._run(tokenize, sampling_params, request_id, priority, cache_salt)

    async def beam_search(
        self,
        prompt: Prompt,
        params: BeamSearchParams,
        request_id: str | None = None,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> RequestOutput:
        """The most likely answers to one prompt, the best first; cancellation aborts the search.
        Raises ValueError for what cannot be served, QueueFullError if not now."""
        search = checked_search(params)
        outputs = self.generate(
            prompt, search, request_id, priority=priority, cache_salt=cache_salt
        )
        async with aclosing(outputs):
            return await anext(outputs)

    def encode(
        self,
        prompt: Prompt,
        pooling_params: PoolingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Like `generate`, for the embedding of a prompt: one output, which has it."""

        def tokenize() -> TokenizedPrompt:
            return tokenize_prompt(prompt, self.running.tokenizer)

        hidden_size = self.running.model_config.hidden_size
        pooling = checked_pooling(pooling_params, hidden_size)
        return self._run(tokenize, NO_SAMPLING, request_id, priority, cache_salt, pooling)

    async def embed(
        self,
        prompt: Prompt,
        pooling_params: PoolingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> EmbeddingRequestOutput:
        """The embedding of one prompt; cancellation aborts it. Raises ValueError for what cannot be
        served, QueueFullError if not now, RequestFailedError if it was aborted or its step
        failed."""
        outputs = self.encode(
            prompt, pooling_params, request_id, priority=priority, cache_salt=cache_salt
        )
        async with aclosing(outputs):
            return EmbeddingRequestOutput.from_request_output(await anext(outputs))

    async def abort(self, request_id: str) -> None:
        """Ends a request: its iterator gets a last output with the finish reason "abort". An
        unknown or finished request is passed over."""
        stream = self._mailbox.find(request_id)
        if stream is not None:
            stream.was_aborted = True
            self._thread.send(AbortRequest(stream.engine_id))

    async def stats(self) -> EngineStats:
        """The engine's counters, taken between two steps."""
        self._mailbox.attach()
        ticket, future = self._mailbox.expect_answer()
        self._thread.send(GetStats(ticket))
        stats: EngineStats = await future
        return stats

    async def snapshot(self) -> EngineSnapshot:
        """Who holds which blocks between two steps, by the request ids that callers gave."""
        self._mailbox.attach()
        ticket, future = self._mailbox.expect_answer()
        self._thread.send(GetSnapshot(ticket))
        snapshot: EngineSnapshot = await future
        running = (
            replace(sequence, request_id=sequence.request_id.rpartition("#")[0])
            for sequence in snapshot.running
        )
        return replace(snapshot, running=tuple(running))

    def heartbeat(self) -> Heartbeat:
        """Read without asking the engine, so that it also tells of a step that hangs."""
        runner = self.running.runner
        compile_wait_since = runner.compile_wait_since  # before busy_since: it is the shorter one
        busy_since = self._thread.busy_since
        now = time.monotonic()
        if busy_since is None:
            return Heartbeat(None, None)
        if compile_wait_since is not None:
            return Heartbeat(None, now - compile_wait_since)
        return Heartbeat(now - max(busy_since, runner.compile_wait_end), None)

    async def _run(
        self,
        tokenize: Callable[[], TokenizedPrompt],
        params: AnyParams | None,
        request_id: str | None,
        priority: int,
        cache_salt: str | None,
        pooling: PoolingParams | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        search = params if isinstance(params, BeamSearchParams) else None
        if isinstance(params, BeamSearchParams):
            params = params.sampling_params()
        params = self._checked_params(params)
        if request_id is None:
            request_id = uuid.uuid4().hex
        elif not isinstance(request_id, str) or not request_id:
            raise RequestError(f"request_id must be a non-empty string, got {request_id!r}")
        self._mailbox.attach()
        stream = self._mailbox.open(request_id, params.output_kind is RequestOutputKind.DELTA)
        finished = False

        def make_request() -> Request:
            prompt = tokenize()
            if None not in (cache_salt, prompt.cache_salt):
                raise RequestError("cache_salt was given twice: in the prompt and beside it")
            return self.running.request(
                stream.engine_id,
                prompt,
                params,
                priority=priority,
                cache_salt=prompt.cache_salt if cache_salt is None else cache_salt,
                pooling=pooling,
                beam_search=search,
            )

        try:
            # On a thread: a long prompt or a large grammar would hold up the loop.
            self._thread.send(AddRequest(await asyncio.to_thread(make_request)))
            if stream.was_aborted:  # meanwhile
                self._thread.send(AbortRequest(stream.engine_id))
            while not finished:
                output = await stream.get()
                finished = output.finished
                if finished:  # some consumers never come back after the last output
                    self._mailbox.close(stream)
                yield output
        finally:
            self._mailbox.close(stream)
            if not finished:
                self._thread.send(AbortRequest(stream.engine_id))

    def _checked_params(self, params: SamplingParams | None) -> SamplingParams:
        is_given = isinstance(params, SamplingParams)
        kind = params.output_kind if is_given else RequestOutputKind.CUMULATIVE  # type: ignore[union-attr]
        return params_of_kind(params, self.running.default_sampling, kind)
