"""Hermes, Qwen 2.5, Qwen 3 and many others: JSON objects between tags.

<tool_call>
{"name": "get_weather", "arguments": {"city": "Paris"}}
</tool_call>
"""

from __future__ import annotations

from typing import ClassVar

from jaxllm.text.tool_calls.call_parser import CallParser
from jaxllm.text.tool_calls.forced import CallForm
from jaxllm.text.tool_calls.json_text import MalformedCall
from jaxllm.text.tool_calls.source import Steps

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class HermesParser(CallParser):
    """Calls anywhere in the text, each between tags of its own; a missing end tag is forgiven."""

    openings: ClassVar[tuple[str, ...]] = (OPEN,)
    form: ClassVar[CallForm] = CallForm(
        before=(OPEN, "\n"), between=("\n", CLOSE, "\n", OPEN, "\n"), after=("\n", CLOSE)
    )

    def _parse(self) -> Steps[None]:
        tags = self.openings
        while tag := (yield from self._source.until(tags, self._events.content)):
            if tag == CLOSE:
                self._source.take(len(CLOSE))
                self._events.boundary()
                tags = self.openings
            else:
                yield from self._attempt(self._tagged_call())
                # The end tag of what was no call is content like the rest of it.
                tags = (*self.openings, CLOSE) if self._has_begun else self.openings

    def _tagged_call(self) -> Steps[bool]:
        if not (yield from self._source.one_of((OPEN,))):
            raise MalformedCall
        yield from self._space()
        return (yield from self._json_call())
