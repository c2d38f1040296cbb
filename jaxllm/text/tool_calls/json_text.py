"""JSON (RFC 8259) checked while it comes and passed on as it is written.

Nothing is passed on that could not be the start of a JSON value, with one repair: models write
line breaks into strings unescaped, which JSON forbids; they are escaped.
"""

from __future__ import annotations

import json
import re

from jaxllm.text.tool_calls.source import EndOfText, Sink, Steps, TextSource

MAX_DEPTH = 64

SPACE = re.compile(r"[ \t\n\r]+")
_DIGITS = re.compile(r"[0-9]+")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')
_ESCAPE = re.compile(r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})')
_SURROGATE = re.compile("[\ud800-\udfff]")
_CLOSERS = {"{": "}", "[": "]"}
_LITERALS = {"t": "true", "f": "false", "n": "null"}


class MalformedCall(Exception):
    """The text is no call."""


def discard(text: str) -> None:
    """A sink for what nobody needs."""


def pass_value(source: TextSource, sink: Sink) -> Steps[None]:
    """Takes one JSON value. Raises MalformedCall at the first character that cannot belong to it,
    or if it is nested deeper than MAX_DEPTH; EndOfText if it is incomplete."""
    closers: list[str] = []  # a stack, not recursion: the depth is the model's choice
    while True:
        yield from source.run(SPACE, sink)
        char = yield from source.peek()
        if char in _CLOSERS:
            if len(closers) == MAX_DEPTH:
                raise MalformedCall
            closers.append(_CLOSERS[char])
            sink(source.take(1))
            yield from source.run(SPACE, sink)
            if (yield from source.peek()) != closers[-1]:
                if char == "{":
                    yield from _pass_key(source, sink)
                continue
        else:
            yield from _pass_scalar(source, sink, char)
        if (yield from _pass_ends(source, sink, closers)):
            return


def _pass_ends(source: TextSource, sink: Sink, closers: list[str]) -> Steps[bool]:
    """What follows a value: the ends of what it stands in, then a comma, unless all has ended."""
    while closers:
        yield from source.run(SPACE, sink)
        char = yield from source.peek()
        if char == closers[-1]:
            closers.pop()
            sink(source.take(1))
        elif char == ",":
            sink(source.take(1))
            if closers[-1] == "}":
                yield from _pass_key(source, sink)
            return False
        else:
            raise MalformedCall
    return True


def _pass_key(source: TextSource, sink: Sink) -> Steps[None]:
    yield from source.run(SPACE, sink)
    yield from pass_string(source, sink)
    yield from source.run(SPACE, sink)
    yield from pass_char(source, ":", sink)


def _pass_scalar(source: TextSource, sink: Sink, first: str) -> Steps[None]:
    if first == '"':
        yield from pass_string(source, sink)
    elif first in _LITERALS:
        for char in _LITERALS[first]:
            yield from pass_char(source, char, sink)
    else:
        yield from _pass_number(source, sink)


def _pass_number(source: TextSource, sink: Sink) -> Steps[None]:
    if (yield from source.peek()) == "-":
        sink(source.take(1))
    if (yield from source.peek()) == "0":
        sink(source.take(1))
    else:
        yield from _pass_digits(source, sink)
    if (yield from source.ahead(1)) == ".":
        sink(source.take(1))
        yield from _pass_digits(source, sink)
    if (yield from source.ahead(1)) in ("e", "E"):
        sink(source.take(1))
        if (yield from source.peek()) in "+-":
            sink(source.take(1))
        yield from _pass_digits(source, sink)


def _pass_digits(source: TextSource, sink: Sink) -> Steps[None]:
    if (yield from source.peek()) not in "0123456789":
        raise MalformedCall
    yield from source.run(_DIGITS, sink)


def pass_char(source: TextSource, char: str, sink: Sink = discard) -> Steps[None]:
    """Takes this character. Raises MalformedCall if another one comes."""
    if (yield from source.peek()) != char:
        raise MalformedCall
    sink(source.take(1))


def pass_string(source: TextSource, sink: Sink) -> Steps[None]:
    """Takes a JSON string, quotes included."""
    yield from pass_char(source, '"', sink)
    while True:
        yield from source.run(_PLAIN, sink)
        char = yield from source.peek()
        if char == "\\":
            sink((yield from _escape(source)))
            continue
        sink(source.take(1) if char == '"' else quoted_inside(source.take(1)))
        if char == '"':
            return


def _escape(source: TextSource) -> Steps[str]:
    """An escape sequence comes whole, so that a truncated string can at least be closed."""
    ahead = yield from source.ahead(2)
    num_chars = 6 if ahead[1:] == "u" else 2
    ahead = yield from source.ahead(num_chars)
    if len(ahead) < num_chars:
        raise EndOfText
    if not _ESCAPE.fullmatch(ahead):
        raise MalformedCall
    return source.take(num_chars)


def read_string(source: TextSource) -> Steps[str]:
    """Takes a JSON string and returns what it stands for; a half surrogate stays an escape, since
    no UTF-8 can hold it."""
    parts: list[str] = []
    yield from pass_string(source, parts.append)
    text = json.loads("".join(parts))
    return _SURROGATE.sub(lambda match: f"\\u{ord(match.group()):04x}", text)


def quoted_inside(text: str) -> str:
    """What stands between the quotes of a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def whole_value(text: str) -> str | None:
    """The one JSON value that a text consists of, without the space around it; None if it is
    none."""
    text = text.strip(" \t\n\r")
    source, parts = TextSource(text, ended=True), list[str]()
    try:
        for _ in pass_value(source, parts.append):
            raise AssertionError("an ended text has nothing to wait for")
    except (MalformedCall, EndOfText):
        return None
    return None if source.take_rest() else "".join(parts)
