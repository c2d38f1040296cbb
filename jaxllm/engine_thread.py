"""An engine on a thread of its own, reached by messages.

The thread and those who use it share nothing but the messages below, so the border between them
could also be one between processes.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxllm.engine.engine import Engine, EngineSnapshot, EngineStats, Request
from jaxllm.outputs import RequestOutput

logger = logging.getLogger(__name__)


class EngineDeadError(RuntimeError):
    """The engine's thread has ended: it was closed, or it failed."""


# ---- messages to the engine


@dataclass(frozen=True)
class AddRequest:
    request: Request


@dataclass(frozen=True)
class AbortRequest:
    request_id: str


@dataclass(frozen=True)
class GetStats:
    ticket: int


@dataclass(frozen=True)
class GetSnapshot:
    ticket: int


@dataclass(frozen=True)
class Shutdown:
    pass


# ---- messages from the engine


@dataclass(frozen=True)
class Outputs:
    outputs: list[RequestOutput]


@dataclass(frozen=True)
class RequestRefused:
    request_id: str
    error: Exception


@dataclass(frozen=True)
class Stats:
    ticket: int
    stats: EngineStats


@dataclass(frozen=True)
class Snapshot:
    ticket: int
    snapshot: EngineSnapshot


@dataclass(frozen=True)
class EngineStopped:
    """failure: what went wrong; None if the engine was closed."""

    failure: str | None

    def error(self) -> EngineDeadError:
        """For one waiter; each raises its own."""
        reason = "was closed" if self.failure is None else f"died: {self.failure}"
        return EngineDeadError(f"the engine {reason}")


ToEngine = AddRequest | AbortRequest | GetStats | GetSnapshot | Shutdown
FromEngine = Outputs | RequestRefused | Stats | Snapshot | EngineStopped


class EngineThread:
    """Steps the engine while it has requests and sleeps while it has none.

    post: delivers messages; False when nobody is left to receive them. close: called at the end.
    busy_since: when the round under way (messages, then a step) began, on the clock of
    time.monotonic; None while the thread waits for messages. May be read from any thread.
    """

    def __init__(
        self,
        engine: Engine,
        post: Callable[[Sequence[FromEngine]], bool],
        close: Callable[[], None],
    ) -> None:
        self._engine = engine
        self._post = post
        self._close = close
        self._inbox: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()
        self._replies: list[FromEngine] = []
        self._live: set[str] = set()
        self.busy_since: float | None = None
        self._thread = threading.Thread(target=self._run, name="jaxllm-engine", daemon=True)
        self._thread.start()

    def send(self, message: ToEngine) -> None:
        """To be called from any thread. What comes after the end is dropped."""
        self._inbox.put(message)

    def stop(self) -> None:
        """Ends the thread and frees the device. From any thread, also the collector's."""
        self.send(Shutdown())
        if threading.current_thread() is not self._thread:
            self._thread.join()

    @property
    def is_alive(self) -> bool:
        """Whether messages are still taken."""
        return self._thread.is_alive()

    def _run(self) -> None:
        failure = None
        try:
            while self._take_messages():
                self._step()
        except BaseException as error:
            logger.error("the engine died", exc_info=error)
            failure = f"{type(error).__name__}: {error}"
        # waiters learn it now: closing may wait for a compilation
        self._post([*self._replies, EngineStopped(failure)])
        self._close()

    def _take_messages(self) -> bool:
        """Waits for a message only if there is nothing to compute. False: the end."""
        wait = not self._engine.has_unfinished_requests()
        self.busy_since = None if wait else time.monotonic()
        while True:
            try:
                message = self._inbox.get(block=wait)
            except queue.Empty:
                return True
            if wait:
                wait = False
                self.busy_since = time.monotonic()
            if isinstance(message, Shutdown):
                return False
            self._handle(message)

    def _handle(self, message: AddRequest | AbortRequest | GetStats | GetSnapshot) -> None:
        if isinstance(message, AddRequest):
            request_id = message.request.request_id
            try:
                self._engine.add_request(message.request)
                self._live.add(request_id)
            except Exception as error:  # whatever it is, it is this request's
                self._replies.append(RequestRefused(request_id, error))
        elif isinstance(message, AbortRequest):
            self._engine.abort(message.request_id)
        elif isinstance(message, GetSnapshot):
            self._replies.append(Snapshot(message.ticket, self._engine.snapshot()))
        else:
            self._replies.append(Stats(message.ticket, self._engine.stats()))

    def _step(self) -> None:
        if self._engine.has_unfinished_requests():
            outputs = self._engine.step()
            self._live.difference_update(o.request_id for o in outputs if o.finished)
            if outputs:
                self._replies.append(Outputs(outputs))
        replies, self._replies = self._replies, []
        if replies and not self._post(replies):
            for request_id in self._live:
                self._engine.abort(request_id)
