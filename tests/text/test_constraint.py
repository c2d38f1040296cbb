"""Answers of a given form: random walks through each grammar, read back by independent parsers."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from typing import Any

import jsonschema
import numpy as np
import pytest
from masks import allowed

from jaxllm.structured_outputs import FormError, StructuredOutputsParams
from jaxllm.text.constraint import ConstraintMaker
from jaxllm.text.tokenizer import Tokenizer
from jaxllm.text.tool_calls import (
    PARSERS,
    ToolCallArguments,
    ToolCallStart,
    check_tools,
    forced_calls,
    get_parser,
)

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
TOOLS = check_tools(
    [
        {"type": "function", "function": {"name": name, "parameters": PERSON}}
        for name in ("add_person", "remove_person")
    ]
)
MAX_STEPS = 5000
Params = StructuredOutputsParams


@pytest.fixture(params=["byte_level", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    found: Tokenizer = request.getfixturevalue(request.param)
    return found


def maker(tokenizer: Tokenizer, extra: int = 0) -> ConstraintMaker:
    assert tokenizer.eos_token_id is not None
    return ConstraintMaker(tokenizer, tokenizer.vocab_size + extra, (tokenizer.eos_token_id,))


def random_answer(tokenizer: Tokenizer, constraint: Any, seed: int) -> str:
    """Tokens drawn from those allowed, up to the end of the form."""
    draw = random.Random(seed)
    token_ids: list[int] = []
    for _ in range(MAX_STEPS):
        token_id = draw.choice(np.flatnonzero(allowed(constraint.mask)).tolist())
        if token_id == tokenizer.eos_token_id:
            break
        token_ids.append(token_id)
        constraint.accept(token_id)
        if constraint.is_complete:
            break
    else:
        raise AssertionError(f"no end: {tokenizer.decode(token_ids)!r}")
    return tokenizer.decode(token_ids, skip_special_tokens=False)


def is_of_schema(text: str) -> bool:
    jsonschema.validate(json.loads(text), PERSON)
    return True


CHECKS: list[tuple[dict[str, Any], Callable[[str], Any]]] = [
    ({"json": PERSON}, is_of_schema),
    ({"json": json.dumps(PERSON)}, is_of_schema),
    ({"regex": r"[a-c]{2,4}(-[0-9]{3}|x)"}, re.compile(r"[a-c]{2,4}(-[0-9]{3}|x)").fullmatch),
    ({"choice": ["yes", 'no "never"\n', "é"]}, {"yes", 'no "never"\n', "é"}.__contains__),
    ({"choice": ["yes", "yes sir"]}, {"yes", "yes sir"}.__contains__),
    ({"grammar": 'start: "(" start ")" | "x"'}, re.compile(r"(\()*x(\))*").fullmatch),
]  # fmt: skip


@pytest.mark.parametrize(("options", "check"), CHECKS)
def test_every_walk_through_a_form_has_it(
    tokenizer: Tokenizer, options: dict[str, Any], check: Callable[[str], Any]
) -> None:
    constraints = maker(tokenizer)
    answers = set()
    for seed in range(10):
        constraint = constraints.constraint(Params(**options), None)
        text = random_answer(tokenizer, constraint, seed)
        # The tokenizer takes the space in front of a text for a separator, as SentencePiece does.
        assert check(text), text
        answers.add(text)
    assert len(answers) > 1


def test_a_json_object_is_any_of_them(byte_level: Tokenizer) -> None:
    constraint = maker(byte_level).constraint(Params(json_object=True), None)
    for token_id in byte_level.encode('{"a": [1, {"b": null}]}', add_special_tokens=False):
        assert allowed(constraint.mask)[token_id]
        constraint.accept(token_id)
    assert constraint.is_complete


def test_space_between_the_parts_of_json_is_bounded(byte_level: Tokenizer) -> None:
    constraint = maker(byte_level).constraint(Params(json=PERSON), None)
    for token_id in byte_level.encode("{ ", add_special_tokens=False):
        constraint.accept(token_id)
    texts = {byte_level.token_string(i) for i in np.flatnonzero(allowed(constraint.mask))}
    assert texts
    assert not any(text.startswith((" ", "\n")) for text in texts)


def test_tokens_beyond_the_tokenizer_are_never_allowed(byte_level: Tokenizer) -> None:
    constraint = maker(byte_level, extra=70).constraint(Params(regex="(.|\n)*"), None)
    assert constraint.mask.shape == (-(-(byte_level.vocab_size + 70) // 32),)
    assert allowed(constraint.mask)[: byte_level.vocab_size].any()
    assert not allowed(constraint.mask)[byte_level.vocab_size :].any()


def test_a_copy_goes_its_own_way(byte_level: Tokenizer) -> None:
    constraints = maker(byte_level)
    first = constraints.constraint(Params(choice=["ab", "cd"]), None)
    second = first.copy()
    [a], [c] = byte_level.encode("a"), byte_level.encode("c")
    first.accept(a)
    assert not allowed(first.mask)[c]
    assert allowed(second.mask)[c]
    assert allowed(constraints.constraint(Params(choice=["ab", "cd"]), None).mask)[c]


def test_a_token_that_is_not_allowed_is_an_error(byte_level: Tokenizer) -> None:
    constraint = maker(byte_level).constraint(Params(choice=["ab"]), None)
    with pytest.raises(FormError, match="structured_outputs"):
        constraint.accept(byte_level.encode("z")[0])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"regex": "("}, "unclosed group|invalid regex"),
        ({"grammar": "start: nowhere"}, "unknown name"),
        ({"grammar": "start: <|nope|>"}, "unknown special token"),
        ({"json": {"type": "colour"}}, "Invalid type"),
        ({"json": {"type": "object", "dependentSchemas": {}}}, "dependentSchemas"),
        ({"json": {"allOf": [{"type": "string"}, {"type": "integer"}]}}, "Unsatisfiable"),
        ({"json": {"$ref": "http://127.0.0.1:9/schema"}}, "structured_outputs"),
    ],
)
def test_what_is_no_form_is_refused(
    byte_level: Tokenizer, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(FormError, match=reason):
        maker(byte_level).constraint(Params(**options), None)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "needs one of"),
        ({"json": {}, "regex": "a"}, "needs one of"),
        ({"json_object": False}, "needs one of"),
        ({"json_object": 1}, "json_object must be true"),
        ({"json": "{"}, "json must be a JSON schema"),
        ({"json": [1]}, "json must be a JSON schema"),
        ({"json": {"a": float("nan")}}, "json must be a JSON schema"),
        ({"json": {"a": object()}}, "json must be a JSON schema"),
        ({"json": {"a": "x" * 300_000}}, "json may have"),
        ({"regex": ""}, "regex must be a text"),
        ({"regex": 3}, "regex must be a text"),
        ({"choice": "yes"}, "choice must be a list"),
        ({"choice": []}, "choice must have"),
        ({"choice": ["a", ""]}, "choice must be a text"),
        ({"grammar": "x" * 300_000}, "grammar may have"),
        ({"regex": "a", "after_reasoning": 1}, "after_reasoning"),
    ],
)
def test_broken_options_are_named(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Params(**options)


def test_an_unknown_option_is_named() -> None:
    with pytest.raises(ValueError, match="structured_outputs has no 'xml'"):
        Params.from_dict({"xml": "a"})


def test_a_form_begins_after_reasoning_that_the_prompt_opened(byte_level: Tokenizer) -> None:
    constraints = maker(byte_level)
    params = Params(choice=["yes"], after_reasoning=True)
    constraint = constraints.constraint(params, "Question?<think>\n").copy()
    for token_id in byte_level.encode("no, no </thin no </think>", add_special_tokens=False):
        assert allowed(constraint.mask).all()
        constraint.accept(token_id)
    assert not constraint.is_complete
    assert not allowed(constraint.mask)[byte_level.encode("n")].any()
    for token_id in byte_level.encode("yes", add_special_tokens=False):
        constraint.accept(token_id)
    assert constraint.is_complete
    for prompt in (None, "Question?", "<think></think>"):
        assert not allowed(constraints.constraint(params, prompt).mask).all()


@pytest.mark.parametrize("single_call", [True, False])
@pytest.mark.parametrize("name", PARSERS)
def test_forced_calls_are_calls_to_their_parser(
    byte_level: Tokenizer, name: str, single_call: bool
) -> None:
    grammar = forced_calls(name, TOOLS, {}, single_call=single_call)
    constraints, counts = maker(byte_level), set()
    for seed in range(20):
        constraint = constraints.constraint(Params(grammar=grammar), None)
        text = random_answer(byte_level, constraint, seed)
        parser = get_parser(name, TOOLS)
        events = [*parser.feed(text), *parser.finish()]
        starts = [event for event in events if isinstance(event, ToolCallStart)]
        assert {start.name for start in starts} <= {"add_person", "remove_person"}
        for start in starts:
            deltas = [e for e in events if isinstance(e, ToolCallArguments)]
            assert is_of_schema("".join(e.delta for e in deltas if e.index == start.index))
        assert all(isinstance(event, ToolCallStart | ToolCallArguments) for event in events)
        counts.add(len(starts))
    assert min(counts) == 1
    assert single_call == (max(counts) == 1)


def test_tags_that_are_special_tokens_are_forced_as_such(byte_level: Tokenizer) -> None:
    end = byte_level.special_token_texts()["<|begin|>"]
    grammar = forced_calls("mistral", TOOLS, {"[TOOL_CALLS]": end}, single_call=True)
    constraint = maker(byte_level).constraint(Params(grammar=grammar), None)
    assert np.flatnonzero(allowed(constraint.mask)).tolist() == [end]
