"""Text that comes in pieces, for parsers written as generators.

A parser reads with `yield from`; where it needs text that has not come yet, it yields and is
resumed with more of it. So it reads like a parser of a whole text, and where the text was cut
cannot change what it finds. Each character is looked at a bounded number of times.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence
from functools import lru_cache
from typing import TypeVar

T = TypeVar("T")
Steps = Generator[None, None, T]  # yields where it waits for text, returns a T
Sink = Callable[[str], None]

MAX_LOOKAHEAD = 256


class EndOfText(Exception):
    """A parser needed more text and there is none."""


class TextSource:
    """The text that was fed and not yet taken."""

    def __init__(self, text: str = "", *, ended: bool = False) -> None:
        self._text = text
        self._position = 0
        self._ended = ended
        self._record: list[str] | None = None

    def feed(self, text: str) -> None:
        """Appends a piece. What a waiting parser leaves is a short lookahead, so this is cheap."""
        assert not self._ended, "text after the end"
        self._text = self._text[self._position :] + text
        self._position = 0

    def end(self) -> None:
        """Says that no text follows."""
        self._ended = True

    def record(self) -> None:
        """Keeps what is taken from here on, until `recorded` gives it back."""
        self._record = []

    def recorded(self) -> str:
        """What was taken since `record`; ends the recording."""
        text = "".join(self._record or ())
        self._record = None
        return text

    def take(self, num_chars: int) -> str:
        """Takes characters that are known to be there."""
        text = self._text[self._position : self._position + num_chars]
        assert len(text) == num_chars
        self._position += num_chars
        if self._record is not None:
            self._record.append(text)
        return text

    def take_rest(self) -> str:
        """Takes all that has come."""
        return self.take(len(self._text) - self._position)

    def ahead(self, num_chars: int) -> Steps[str]:
        """The next characters, not taken; fewer than asked for only at the end."""
        assert num_chars <= MAX_LOOKAHEAD
        while len(self._text) - self._position < num_chars and not self._ended:
            yield
        return self._text[self._position : self._position + num_chars]

    def peek(self) -> Steps[str]:
        """The next character, not taken. Raises EndOfText."""
        char = yield from self.ahead(1)
        if not char:
            raise EndOfText
        return char

    def run(self, pattern: re.Pattern[str], sink: Sink) -> Steps[None]:
        """Takes characters as long as they match. pattern: one character class, repeated by +."""
        while True:
            match = pattern.match(self._text, self._position)
            if match:
                sink(self.take(match.end() - self._position))
            if self._position < len(self._text) or self._ended:
                return
            yield

    def one_of(self, literals: Sequence[str]) -> Steps[str | None]:
        """Takes and returns the literal that comes next; None, and takes nothing, if none does."""
        longest = max(map(len, literals))
        while True:
            ahead = self._text[self._position : self._position + longest]
            for literal in literals:
                if ahead.startswith(literal):
                    return self.take(len(literal))
            if self._ended or not any(literal.startswith(ahead) for literal in literals):
                return None
            yield

    def until(self, literals: Sequence[str], sink: Sink) -> Steps[str | None]:
        """Takes what comes before the first of the literals and returns that literal, which is
        left; None at the end. Text that might begin a literal waits."""
        pattern = _any_of(tuple(literals))
        while True:
            match = pattern.search(self._text, self._position)
            end = match.start() if match else len(self._text) - self._num_held(literals)
            if end > self._position:
                sink(self.take(end - self._position))
            if match:
                return match.group()
            if self._ended:
                return None
            yield

    def _num_held(self, literals: Sequence[str]) -> int:
        if self._ended:
            return 0
        longest = max(map(len, literals)) - 1
        for start in range(max(self._position, len(self._text) - longest), len(self._text)):
            if any(literal.startswith(self._text[start:]) for literal in literals):
                return len(self._text) - start
        return 0


@lru_cache(maxsize=64)
def _any_of(literals: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, literals)))
