"""Mistral: a list of JSON objects up to its tokenizer v7, names before arguments from v11.

[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}}, {"name": ...}]
[TOOL_CALLS]get_weather{"city": "Paris"}[TOOL_CALLS]...
[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}
[TOOL_CALLS]get_weather[CALL_ID]a1b2c3d4e[ARGS]{"city": "Paris"}
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from jaxllm.text.tool_calls.call_parser import CallParser
from jaxllm.text.tool_calls.events import new_short_call_id
from jaxllm.text.tool_calls.forced import CallForm
from jaxllm.text.tool_calls.json_text import MalformedCall, discard, pass_value
from jaxllm.text.tool_calls.source import Steps

TAG, CALL_ID, ARGUMENTS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
_NAME = re.compile(r"[a-zA-Z0-9_-]+")


class MistralParser(CallParser):
    """Calls after the tag, in a list or by name."""

    needs_special_tokens: ClassVar[bool] = True
    form: ClassVar[CallForm] = CallForm(before=(TAG, "["), between=(", ",), after=("]",))

    def __init__(
        self,
        tools: Sequence[Mapping[str, Any]],
        make_id: Callable[[], str] = new_short_call_id,
    ) -> None:
        super().__init__(tools, make_id)

    def _parse(self) -> Steps[None]:
        while (yield from self._source.until((TAG,), self._events.content)):
            in_list = yield from self._attempt(self._tagged_call())
            while in_list:
                in_list = yield from self._attempt(self._next_in_list())

    def _tagged_call(self) -> Steps[bool]:
        """True if the call stands in a list, which may go on."""
        if not (yield from self._source.one_of((TAG,))):
            raise MalformedCall
        yield from self._space()
        if (yield from self._source.one_of(("[",))):
            yield from self._space()
            return (yield from self._json_call())
        if (yield from self._source.peek()) == "{":
            yield from self._json_call()
        else:
            yield from self._named_call()
        return False

    def _next_in_list(self) -> Steps[bool]:
        yield from self._space()
        mark = yield from self._source.one_of((",", "]"))
        if mark == "]":
            self._source.recorded()
            self._events.boundary()
            return False
        if mark is None:
            raise MalformedCall
        yield from self._space()
        return (yield from self._json_call())

    def _named_call(self) -> Steps[None]:
        parts: list[str] = []
        yield from self._source.run(_NAME, parts.append)
        self._set_name("".join(parts))
        mark = yield from self._source.one_of((CALL_ID, ARGUMENTS))
        if mark == CALL_ID:  # made up by the model; the answer's ids are ours, so that they differ
            yield from self._source.run(_NAME, discard)
            mark = yield from self._source.one_of((ARGUMENTS,))
            if mark is None:
                raise MalformedCall
        yield from self._space()
        if (yield from self._source.peek()) != "{":
            raise MalformedCall
        self._begin()
        yield from pass_value(self._source, self._arguments)
