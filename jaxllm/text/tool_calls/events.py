"""What a parser of tool calls tells: text for the user, and calls piece by piece."""

from __future__ import annotations

import secrets
import string
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class ContentDelta:
    """Text that belongs to no call."""

    text: str


@dataclass(frozen=True)
class ToolCallStart:
    """A call begins. index: 0 for the first call of an answer, then 1, and so on."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class ToolCallArguments:
    """More of a call's arguments; all deltas of a call together are a JSON object's text."""

    index: int
    delta: str


Event = ContentDelta | ToolCallStart | ToolCallArguments


class ToolCallParser(Protocol):
    """Finds the calls in one answer's text, which may be cut into pieces anywhere. Neither method
    raises on what a model wrote."""

    def feed(self, text: str) -> list[Event]:
        """What is certain with this piece and was not before."""

    def finish(self) -> list[Event]:
        """What waited for text that never came. Nothing may be fed after it."""


def new_call_id() -> str:
    """An id like OpenAI's."""
    return "call_" + secrets.token_hex(12)


def new_short_call_id() -> str:
    """An id like Mistral's, whose chat templates accept only nine letters or digits."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


class EventWriter:
    """Collects events. Neighbouring deltas become one; space that only sets calls apart from each
    other or from the ends of the answer is dropped."""

    def __init__(self) -> None:
        self.num_calls = 0
        self._events: list[Event] = []
        self._parts: list[str] = []  # of the last delta, not yet an event
        self._is_content = True
        self._space: list[str] = []  # waits for what follows it
        self._at_boundary = True  # only space since the start or the last call

    def content(self, text: str) -> None:
        """Text that belongs to no call."""
        if self._at_boundary and (not text or text.isspace()):
            self._space.append(text)
            return
        self._collect(is_content=True)
        self._parts += [*self._space, text]
        self._space.clear()
        self._at_boundary = False

    def boundary(self) -> None:
        """A call was closed: space before this and after it only sets it apart."""
        self._space.clear()
        self._at_boundary = True

    def start_call(self, call_id: str, name: str) -> None:
        """A call begins; arguments that follow are its."""
        self._flush()
        self._space.clear()
        self._at_boundary = True
        self._events.append(ToolCallStart(self.num_calls, call_id, name))
        self.num_calls += 1

    def arguments(self, text: str) -> None:
        """More arguments of the call that began last."""
        self._collect(is_content=False)
        self._parts.append(text)

    def finish(self) -> None:
        """An answer of space alone is still its text."""
        if not self.num_calls:
            self._collect(is_content=True)
            self._parts += self._space
        self._space.clear()

    def take(self) -> list[Event]:
        """The events since the last call of this method."""
        self._flush()
        events, self._events = self._events, []
        return events

    def _collect(self, *, is_content: bool) -> None:
        """What comes next is of this kind."""
        if is_content != self._is_content:
            self._flush()
            self._is_content = is_content

    def _flush(self) -> None:
        text = "".join(self._parts)
        self._parts.clear()
        if text and self._is_content:
            self._events.append(ContentDelta(text))
        elif text:
            self._events.append(ToolCallArguments(self.num_calls - 1, text))
