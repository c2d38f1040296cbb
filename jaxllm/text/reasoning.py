"""What a model thinks before it answers, told apart from the answer: <think>...</think>."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from jaxllm.text.tool_calls.events import ContentDelta
from jaxllm.text.tool_calls.source import Steps, TextSource

__all__ = [
    "REASONING_PARSERS",
    "ContentDelta",
    "ReasoningDelta",
    "ReasoningParser",
    "choose_reasoning_parser",
    "get_reasoning_parser",
    "opens_reasoning",
]

OPEN, CLOSE = "<think>", "</think>"
_SPACE = re.compile(r"\s+")
_NEWLINES = re.compile(r"\n+")


@dataclass(frozen=True)
class ReasoningDelta:
    """Text that belongs to the reasoning."""

    text: str


class ReasoningParser:
    """Splits one answer's text, which may be cut into pieces anywhere, into at most one stretch of
    reasoning at its start and the content after it. Line breaks next to the tags belong to neither;
    all else is passed on as it is. Without an end tag, all is reasoning.

    starts_open: the prompt ends in the opening tag, so that the answer starts inside.
    """

    def __init__(self, *, starts_open: bool = False) -> None:
        self._starts_open = starts_open
        self._source = TextSource()
        self._parts: list[ReasoningDelta | ContentDelta] = []
        self._newlines: list[str] = []  # at the end of the reasoning so far
        self._steps = self._parse()

    def feed(self, text: str) -> list[ReasoningDelta | ContentDelta]:
        """What is certain with this piece and was not before."""
        self._source.feed(text)
        next(self._steps, None)
        return self._take()

    def finish(self) -> list[ReasoningDelta | ContentDelta]:
        """What waited for text that never came. Nothing may be fed after it."""
        self._source.end()
        for _ in self._steps:
            raise AssertionError("an ended text has nothing to wait for")
        return self._take()

    def _parse(self) -> Steps[None]:
        space: list[str] = []
        yield from self._source.run(_SPACE, space.append)
        has_tag = (yield from self._source.one_of((OPEN,))) is not None
        if has_tag or self._starts_open:
            if has_tag:
                yield from self._source.run(_NEWLINES, lambda text: None)
            else:
                self._reason("".join(space).lstrip("\n"))
            if (yield from self._source.until((CLOSE,), self._reason)) is None:
                self._parts.append(ReasoningDelta("".join(self._newlines)))
                return
            self._source.take(len(CLOSE))
            yield from self._source.run(_NEWLINES, lambda text: None)
        else:
            self._parts.append(ContentDelta("".join(space)))
        while True:
            self._parts.append(ContentDelta(self._source.take_rest()))
            if not (yield from self._source.ahead(1)):
                return

    def _reason(self, text: str) -> None:
        """Line breaks wait, since the end tag may follow them."""
        kept = text.rstrip("\n")
        if kept:
            self._parts.append(ReasoningDelta("".join([*self._newlines, kept])))
            self._newlines.clear()
        if len(kept) < len(text):
            self._newlines.append(text[len(kept) :])

    def _take(self) -> list[ReasoningDelta | ContentDelta]:
        parts, self._parts = [part for part in self._parts if part.text], []
        return parts


# Whether the prompt, by habit of the model's makers, ends in the opening tag.
REASONING_PARSERS: Mapping[str, bool] = {"qwen3": False, "deepseek_r1": True, "think": False}


def get_reasoning_parser(name: str, *, starts_open: bool | None = None) -> ReasoningParser:
    """A parser for one answer. starts_open: what `opens_reasoning` says of the prompt; by default
    what is usual for the model. Raises ValueError for an unknown name."""
    if name not in REASONING_PARSERS:
        known = ", ".join(REASONING_PARSERS)
        raise ValueError(f"unknown reasoning parser {name!r}; known: {known}")
    return ReasoningParser(
        starts_open=REASONING_PARSERS[name] if starts_open is None else starts_open
    )


def opens_reasoning(prompt: str) -> bool:
    """Whether a rendered prompt ends in the opening tag."""
    return prompt.rstrip().endswith(OPEN)


def choose_reasoning_parser(chat_template: str) -> str | None:
    """The parser for a model with this chat template; None if the template knows no reasoning."""
    if OPEN not in chat_template and CLOSE not in chat_template:
        return None
    if "<｜Assistant｜>" in chat_template:
        return "deepseek_r1"
    return "qwen3" if "<|im_start|>" in chat_template else "think"
