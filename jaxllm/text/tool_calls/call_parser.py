"""What the parsers of all formats share: driving the generator, and a call's way to its events."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from jaxllm.text.tool_calls.events import Event, EventWriter, new_call_id
from jaxllm.text.tool_calls.forced import CallForm
from jaxllm.text.tool_calls.json_text import (
    SPACE,
    MalformedCall,
    discard,
    pass_char,
    pass_value,
    read_string,
)
from jaxllm.text.tool_calls.source import EndOfText, Steps, TextSource

ARGUMENT_KEYS = ("arguments", "parameters")
LABEL_KEYS = ("id", "type")  # of a call; they say nothing that is needed


class CallParser:
    """A ToolCallParser; a format gives `_parse`, which reads the whole answer.

    A call is certain, and begins, when the name of one of the tools is known. What turns out to be
    no call before that is content, as the model wrote it. A call that fails later has the
    arguments that came until then, which are incomplete JSON, so nobody mistakes it for whole; what
    follows is content. Nothing is read twice, so no text takes more than linear time.

    needs_special_tokens: the format's marks are special tokens, so the text has to hold them.
    form: how a model is made to call.
    """

    needs_special_tokens: ClassVar[bool] = False
    form: ClassVar[CallForm] = CallForm()

    def __init__(
        self,
        tools: Sequence[Mapping[str, Any]],
        make_id: Callable[[], str] = new_call_id,
    ) -> None:
        functions = [tool["function"] for tool in tools]
        self._schemas = {f["name"]: f.get("parameters") or {} for f in functions}
        self._make_id = make_id
        self._source = TextSource()
        self._events = EventWriter()
        self._name: str | None = None  # of the call that is being read
        self._has_begun = False
        self._has_arguments = False
        self._waiting: list[str] = []  # arguments that came before the name
        self._steps = self._parse()

    def feed(self, text: str) -> list[Event]:
        """What is certain with this piece and was not before."""
        self._source.feed(text)
        next(self._steps, None)
        return self._events.take()

    def finish(self) -> list[Event]:
        """What waited for text that never came."""
        self._source.end()
        for _ in self._steps:
            raise AssertionError("an ended text has nothing to wait for")
        self._events.finish()
        return self._events.take()

    def _parse(self) -> Steps[None]:
        raise NotImplementedError

    def _attempt(self, steps: Steps[bool]) -> Steps[bool]:
        """Reads what should be a call. False if it is none, or not whole."""
        self._name, self._has_begun, self._has_arguments = None, False, False
        self._waiting.clear()
        self._source.record()
        try:
            return (yield from steps)
        except MalformedCall:
            pass
        except EndOfText:
            if self._has_begun:
                self._source.take_rest()  # the start of an escape or a tag
        finally:
            read = self._source.recorded()
            if not self._has_begun:
                self._events.content(read)
        return False

    def _space(self) -> Steps[None]:
        yield from self._source.run(SPACE, discard)

    def _json_call(self, *, is_certain: bool = True) -> Steps[bool]:
        """{"name": ..., "arguments": {...}}. is_certain: a mark before it says that it is a call.
        Any JSON object may have a name; without a mark, it must have arguments and little else."""
        yield from pass_char(self._source, "{")
        while True:  # an empty object has no name, so it is no call
            yield from self._space()
            yield from self._member(is_certain)
            yield from self._space()
            if (yield from self._source.peek()) == "}":
                break
            yield from pass_char(self._source, ",")
        yield from pass_char(self._source, "}")
        if self._name is None or not (is_certain or self._has_arguments):
            raise MalformedCall
        self._begin()
        if not self._has_arguments:
            self._arguments("{}")
        return True

    def _member(self, is_certain: bool) -> Steps[None]:
        key = yield from read_string(self._source)
        yield from self._space()
        yield from pass_char(self._source, ":")
        yield from self._space()
        if key == "name":
            self._set_name((yield from read_string(self._source)))
            if is_certain or self._has_arguments:
                self._begin()
        elif key in ARGUMENT_KEYS:
            yield from self._argument_value()
        elif is_certain or key in LABEL_KEYS:
            yield from pass_value(self._source, discard)
        else:
            raise MalformedCall

    def _argument_value(self) -> Steps[None]:
        """An object; or a string that holds one, or null, as some models write."""
        char = yield from self._source.peek()
        if self._has_arguments or char not in '{"n':
            raise MalformedCall
        self._has_arguments = True
        if self._name is not None:
            self._begin()
        if char == "{":
            yield from pass_value(self._source, self._arguments)
        elif char == '"':
            text = yield from read_string(self._source)
            self._arguments(text if text.strip() else "{}")
        else:
            yield from pass_value(self._source, discard)
            self._arguments("{}")

    def _set_name(self, name: str) -> None:
        if self._name is not None or name not in self._schemas:
            raise MalformedCall
        self._name = name

    def _begin(self) -> None:
        """The call is certain. Has no effect when it has begun."""
        if self._has_begun:
            return
        assert self._name is not None
        self._has_begun = True
        self._source.recorded()  # nothing is given back from here on
        self._events.start_call(self._make_id(), self._name)
        for text in self._waiting:
            self._events.arguments(text)
        self._waiting.clear()

    def _arguments(self, text: str) -> None:
        if self._has_begun:
            self._events.arguments(text)
        else:
            self._waiting.append(text)
