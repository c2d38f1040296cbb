"""Llama 3.1 to 3.3: the answer is a JSON object, or several with `;` between them.

    <|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris"}}; {"name": ...}

The tag is optional (the models often leave it out), so it is not asked of the tokenizer either.
"""

from __future__ import annotations

from typing import ClassVar

from jaxllm.text.tool_calls.call_parser import CallParser
from jaxllm.text.tool_calls.forced import CallForm
from jaxllm.text.tool_calls.source import Steps

TAG = "<|python_tag|>"


class Llama3JsonParser(CallParser):
    """Calls at the start of the answer, after the tag, and after another call."""

    form: ClassVar[CallForm] = CallForm(between=("; ",), arguments_key="parameters")

    def _parse(self) -> Steps[None]:
        yield from self._calls()
        while (yield from self._source.until((TAG,), self._events.content)):
            yield from self._calls()

    def _calls(self) -> Steps[None]:
        more = yield from self._attempt(self._call(separators=False))
        while more:
            more = yield from self._attempt(self._call(separators=True))

    def _call(self, separators: bool) -> Steps[bool]:
        yield from self._space()
        if separators:
            yield from self._source.one_of((";",))
            yield from self._space()
            if not (yield from self._source.ahead(1)):
                self._source.recorded()  # a separator that nothing follows is no content
                return False
        yield from self._source.one_of((TAG,))
        yield from self._space()
        # With the tag, too, the object may be something else: it also marks code.
        return (yield from self._json_call(is_certain=False))
