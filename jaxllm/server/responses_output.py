"""The output items of POST /v1/responses, and the events that tell of them while they are written.

https://platform.openai.com/docs/api-reference/responses-streaming
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxllm.server.answers import AnswerEvent
from jaxllm.server.context import new_request_id
from jaxllm.text.reasoning import ReasoningDelta
from jaxllm.text.tool_calls import ToolCallArguments, ToolCallStart

Event = tuple[str, dict[str, Any]]  # its type and its fields, without the sequence number


@dataclass(frozen=True)
class _TextKind:
    """What sets items of text apart. item, part: their constant fields. events: of the text."""

    id_prefix: str
    item: dict[str, Any]
    part: dict[str, Any]
    events: str
    has_logprobs: bool


_MESSAGE = _TextKind(
    "msg",
    {"type": "message", "role": "assistant"},
    {"type": "output_text", "annotations": []},
    "response.output_text",
    has_logprobs=True,
)
_REASONING = _TextKind(
    "rs",
    {"type": "reasoning", "summary": []},
    {"type": "reasoning_text"},
    "response.reasoning_text",
    has_logprobs=False,
)


class _TextItem:
    """A message or a reasoning item while its text comes; it has one part."""

    def __init__(self, kind: _TextKind, index: int) -> None:
        self.kind = kind
        self._index = index
        self._id = f"{kind.id_prefix}_{new_request_id()}"
        self._part_place = {"item_id": self._id, "output_index": index, "content_index": 0}
        self._texts: list[str] = []
        self._logprobs: list[Any] = []

    def start(self) -> list[Event]:
        part = self._part("", [])
        return [
            _added(self._index, self._item("in_progress", [])),
            ("response.content_part.added", {**self._part_place, "part": part}),
        ]

    def add(self, text: str, logprobs: Sequence[Any] = ()) -> list[Event]:
        self._texts.append(text)
        self._logprobs += logprobs
        extra = self._logprobs_field(logprobs)
        return [(f"{self.kind.events}.delta", {**self._part_place, "delta": text, **extra})]

    def finish(self, status: str) -> tuple[dict[str, Any], list[Event]]:
        text = "".join(self._texts)
        part = self._part(text, self._logprobs)
        item = self._item(status, [part])
        extra = self._logprobs_field(self._logprobs)
        return item, [
            (f"{self.kind.events}.done", {**self._part_place, "text": text, **extra}),
            ("response.content_part.done", {**self._part_place, "part": part}),
            _done(self._index, item),
        ]

    def _item(self, status: str, parts: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._id, **self.kind.item, "status": status, "content": parts}

    def _part(self, text: str, logprobs: Sequence[Any]) -> dict[str, Any]:
        return {**self.kind.part, "text": text, **self._logprobs_field(logprobs)}

    def _logprobs_field(self, logprobs: Sequence[Any]) -> dict[str, Any]:
        return {"logprobs": list(logprobs)} if self.kind.has_logprobs else {}


class _CallItem:
    """A call of a function while its arguments come."""

    def __init__(self, call: ToolCallStart, index: int) -> None:
        self._call = call
        self._index = index
        self._id = f"fc_{new_request_id()}"
        self._place = {"item_id": self._id, "output_index": index}
        self._texts: list[str] = []

    def start(self) -> list[Event]:
        return [_added(self._index, self._item("in_progress", ""))]

    def add(self, text: str) -> list[Event]:
        self._texts.append(text)
        return [("response.function_call_arguments.delta", {**self._place, "delta": text})]

    def finish(self, status: str) -> tuple[dict[str, Any], list[Event]]:
        arguments = "".join(self._texts)
        item = self._item(status, arguments)
        fields = {**self._place, "name": self._call.name, "arguments": arguments}
        return item, [
            ("response.function_call_arguments.done", fields),
            _done(self._index, item),
        ]

    def _item(self, status: str, arguments: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "function_call",
            "status": status,
            "call_id": self._call.id,
            "name": self._call.name,
            "arguments": arguments,
        }


def _added(index: int, item: dict[str, Any]) -> Event:
    return "response.output_item.added", {"output_index": index, "item": item}


def _done(index: int, item: dict[str, Any]) -> Event:
    return "response.output_item.done", {"output_index": index, "item": item}


@dataclass
class OutputItems:
    """One item after the other. done: those that are complete."""

    done: list[dict[str, Any]] = field(default_factory=list)
    _open: _TextItem | _CallItem | None = None

    def add(self, one: AnswerEvent, logprobs: Sequence[Any] = ()) -> list[Event]:
        """More of the answer. logprobs: of the tokens of a content delta."""
        if isinstance(one, ToolCallStart):
            return self._begin(_CallItem(one, self._next_index()))
        if isinstance(one, ToolCallArguments):
            assert isinstance(self._open, _CallItem)
            return self._open.add(one.delta)
        kind = _REASONING if isinstance(one, ReasoningDelta) else _MESSAGE
        events: list[Event] = []
        if not isinstance(self._open, _TextItem) or self._open.kind is not kind:
            events = self._begin(_TextItem(kind, self._next_index()))
        assert isinstance(self._open, _TextItem)
        return events + self._open.add(one.text, logprobs)

    def finish(self, status: str) -> list[Event]:
        """The answer's end. status: of the last item. An empty answer is an empty message."""
        events: list[Event] = []
        if self._next_index() == 0:
            events = self._begin(_TextItem(_MESSAGE, 0))
        return events + self.close(status)

    def close(self, status: str) -> list[Event]:
        """The end of the item that is being written, if there is one."""
        if self._open is None:
            return []
        item, events = self._open.finish(status)
        self.done.append(item)
        self._open = None
        return events

    def _next_index(self) -> int:
        return len(self.done) + (self._open is not None)

    def _begin(self, item: _TextItem | _CallItem) -> list[Event]:
        events = self.close("completed")
        self._open = item
        return events + item.start()
