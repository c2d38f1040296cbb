"""The reasoning parser on text cut anywhere, against a regular expression over the whole text."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.text.reasoning import (
    REASONING_PARSERS,
    ContentDelta,
    ReasoningDelta,
    choose_reasoning_parser,
    get_reasoning_parser,
    opens_reasoning,
)


def parse(pieces: list[str], *, starts_open: bool) -> tuple[str, str]:
    """The reasoning and the content."""
    parser = get_reasoning_parser("think", starts_open=starts_open)
    events = [event for piece in pieces for event in parser.feed(piece)] + parser.finish()
    assert all(event.text for event in events)
    kinds = [isinstance(event, ContentDelta) for event in events]
    assert kinds == sorted(kinds), "content before the end of the reasoning"
    content = "".join(event.text for event in events if isinstance(event, ContentDelta))
    return "".join(e.text for e in events if isinstance(e, ReasoningDelta)), content


# text, starts_open, reasoning, content
EXAMPLES = [
    (
        "<think>\nTwo and two.\n\nFour.\n</think>\n\nIt is 4.\n",
        False,
        "Two and two.\n\nFour.",
        "It is 4.\n",
    ),
    ("Two and two.\n</think>\n\n4", True, "Two and two.", "4"),
    ("<think>\nTwo.\n</think>\n\n4", True, "Two.", "4"),
    ("\n<think>a</think>b", False, "a", "b"),
    ("<think>\n\n</think>\n\n4", False, "", "4"),
    ("The answer is 4.", False, "", "The answer is 4."),
    ("  4 <think>a</think>", False, "", "  4 <think>a</think>"),
    ("<thin", False, "", "<thin"),
    ("<think>still thin", False, "still thin", ""),
    ("still </thin", True, "still </thin", ""),
    ("a\n\n", True, "a\n\n", ""),
    ("  a\n b</think>\n  c", True, "  a\n b", "  c"),
    ("a</think>b</think><think>c", True, "a", "b</think><think>c"),
    ("", True, "", ""),
    (" \n", False, "", " \n"),
]


@pytest.mark.parametrize(("text", "starts_open", "reasoning", "content"), EXAMPLES)
def test_examples(text: str, starts_open: bool, reasoning: str, content: str) -> None:
    assert parse([text], starts_open=starts_open) == (reasoning, content)
    assert parse(list(text), starts_open=starts_open) == (reasoning, content)


def by_expression(text: str, starts_open: bool) -> tuple[str, str]:
    opened = re.match(r"\s*<think>\n*" if not starts_open else r"(\s*<think>)?\n*", text)
    if opened is None:
        return "", text
    rest = text[opened.end() :]
    reasoning, tag, content = rest.partition("</think>")
    return (reasoning.rstrip("\n"), content.lstrip("\n")) if tag else (reasoning, "")


FRAGMENTS = ["<think>", "</think>", "<", "</", "think>", "\n", " ", "a", "é😀"]


@settings(max_examples=300, deadline=None)
@given(
    pieces=st.lists(st.lists(st.sampled_from(FRAGMENTS), max_size=5).map("".join), max_size=6),
    starts_open=st.booleans(),
)
def test_agrees_with_a_regular_expression(pieces: list[str], starts_open: bool) -> None:
    text = "".join(pieces)
    expected = by_expression(text, starts_open)
    assert parse(pieces, starts_open=starts_open) == expected
    assert parse(list(text), starts_open=starts_open) == expected


def test_text_comes_at_once_unless_it_may_belong_to_a_tag() -> None:
    parser = get_reasoning_parser("qwen3")
    assert parser.feed("<thi") == []
    assert parser.feed("nk>\nSo") == [ReasoningDelta("So")]
    assert parser.feed(" far\n") == [ReasoningDelta(" far")]
    assert parser.feed("so <") == [ReasoningDelta("\nso ")]
    assert parser.feed("/b>\n</think>") == [ReasoningDelta("</b>")]
    assert parser.feed("\n\nGood") == [ContentDelta("Good")]
    assert parser.feed("\n<") == [ContentDelta("\n<")]
    assert parser.finish() == []


def test_the_name_says_whether_the_answer_starts_inside() -> None:
    found = {name: get_reasoning_parser(name).feed("a ") for name in REASONING_PARSERS}
    assert found == {
        "qwen3": [ContentDelta("a ")],
        "deepseek_r1": [ReasoningDelta("a ")],
        "think": [ContentDelta("a ")],
    }
    assert get_reasoning_parser("deepseek_r1", starts_open=False).feed("a") == [ContentDelta("a")]
    with pytest.raises(ValueError, match="'o1'; known: qwen3, deepseek_r1, think"):
        get_reasoning_parser("o1")


def test_opens_reasoning() -> None:
    assert opens_reasoning("<|im_start|>assistant\n<think>\n")
    assert not opens_reasoning("<|im_start|>assistant\n<think>\n\n</think>\n\n")


TEMPLATES = [
    ("{{ '<｜Assistant｜><think>\\n' }}", "deepseek_r1"),
    ("{{ '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' }}", "qwen3"),
    ("[INST] {{ content.split('</think>')[-1] }}", "think"),
    ("<|im_start|>{{ message.content }}", None),
]


@pytest.mark.parametrize(("template", "name"), TEMPLATES)
def test_choose_reasoning_parser(template: str, name: str | None) -> None:
    assert choose_reasoning_parser(template) == name


@pytest.mark.parametrize("text", ["</think" * 150_000, "\n" * 10**6, "<think>" * 150_000])
def test_a_megabyte_takes_linear_time(text: str) -> None:
    start = time.perf_counter()
    parse([text[i : i + 23] for i in range(0, len(text), 23)], starts_open=True)
    assert time.perf_counter() - start < 10
