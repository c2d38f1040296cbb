"""Qwen 3: what Hermes writes, or from Qwen3-Coder on a form of XML without types.

<tool_call>
<function=get_weather>
<parameter=city>
Paris
</parameter>
</function>
</tool_call>
"""

from __future__ import annotations

import re
from typing import ClassVar

from jaxllm.text.tool_calls.hermes import CLOSE, OPEN, HermesParser
from jaxllm.text.tool_calls.json_text import MalformedCall, pass_char, quoted_inside
from jaxllm.text.tool_calls.schema_types import json_of_text, types_of_property
from jaxllm.text.tool_calls.source import EndOfText, Steps

FUNCTION, END_FUNCTION = "<function=", "</function>"
PARAMETER = "<parameter="
END_VALUE = ("\n</parameter>", "</parameter>")
_NAME = re.compile(r"[^<>\n]+")


class Qwen3Parser(HermesParser):
    """Both forms in one text. The first tag of the XML form is often left out by the models."""

    openings: ClassVar[tuple[str, ...]] = (OPEN, FUNCTION)

    def _tagged_call(self) -> Steps[bool]:
        if (yield from self._source.one_of(self.openings)) == OPEN:
            yield from self._space()
            if (yield from self._source.peek()) == "{":
                return (yield from self._json_call())
            if not (yield from self._source.one_of((FUNCTION,))):
                raise MalformedCall
        self._set_name((yield from self._name_in_tag()))
        self._begin()
        yield from self._parameters()
        return True

    def _name_in_tag(self) -> Steps[str]:
        """What stands between = and >."""
        parts: list[str] = []
        yield from self._source.run(_NAME, parts.append)
        yield from pass_char(self._source, ">")
        return "".join(parts)

    def _parameters(self) -> Steps[None]:
        """Up to the end of the function. Some models forget that tag, not the one after it."""
        assert self._name is not None
        keys: set[str] = set()
        while True:
            yield from self._space()
            tag = yield from self._source.one_of((PARAMETER, END_FUNCTION, CLOSE))
            if tag != PARAMETER:
                break
            key = yield from self._name_in_tag()
            if key in keys:
                raise MalformedCall
            self._arguments(f'{", " if keys else "{"}"{quoted_inside(key)}": ')
            keys.add(key)
            yield from self._value(types_of_property(self._schemas[self._name], key))
        if tag is None:
            yield from self._source.peek()
            raise MalformedCall
        self._arguments("}" if keys else "{}")

    def _value(self, types: frozenset[str]) -> Steps[None]:
        """A string is passed on as it comes; anything else has to be known whole to be told from
        one."""
        yield from self._source.one_of(("\n",))  # the template sets values on lines of their own
        if types <= {"string"}:
            self._arguments('"')
            end = yield from self._source.until(
                END_VALUE, lambda text: self._arguments(quoted_inside(text))
            )
        else:
            parts: list[str] = []
            end = yield from self._source.until(END_VALUE, parts.append)
        if end is None:
            raise EndOfText
        self._arguments('"' if types <= {"string"} else json_of_text("".join(parts), types))
        self._source.take(len(end))
