"""Grammars of answers, in the forms that llguidance reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from jaxllm.structured_outputs import StructuredOutputsParams

# Between the tokens of JSON: nothing, a space, or a line break and an indentation. A weak model
# that may write any space at all often writes nothing else.
JSON_OPTIONS: dict[str, Any] = {
    "whitespace_flexible": False,
    "whitespace_pattern": r"( |\n {0,12})?",
}


def grammar_of(params: StructuredOutputsParams) -> str:
    """In the form that llguidance reads."""
    from llguidance import LLMatcher

    schema: Any = {"type": "object"} if params.json_object else params.json
    if schema is not None:
        return LLMatcher.grammar_from_json_schema(schema, overrides=JSON_OPTIONS)  # type: ignore[arg-type]
    if params.regex is not None:
        return LLMatcher.grammar_from_regex(params.regex)
    if params.choice is not None:
        choices = " | ".join(json.dumps(text) for text in params.choice)
        return LLMatcher.grammar_from_lark(f"start: {choices}")
    assert params.grammar is not None
    return LLMatcher.grammar_from_lark(params.grammar)


def schema_rule(schema: Mapping[str, Any]) -> str:
    """The right-hand side of a rule of a grammar: JSON of this schema."""
    return f"%json {json.dumps({**schema, 'x-guidance': JSON_OPTIONS})}"
