"""check_tools: what it accepts, and where it says the fault is."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from jaxllm.text.tool_calls import check_tools


def function(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **fields}}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return function(parameters={"type": "object", "properties": {"a": schema}})


def test_good_tools_are_copied() -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": ["string", "null"]}, "any": True},
        "required": ["city"],
        "additionalProperties": False,
    }
    tools = [function(description="what it does", parameters=schema)]
    checked = check_tools(tools)
    assert checked == tools
    checked[0]["function"]["parameters"]["properties"].clear()
    assert tools[0]["function"]["parameters"]["properties"]


def test_what_was_left_out_is_filled_in() -> None:
    empty = {"type": "object", "properties": {}}
    expected = [{"type": "function", "function": {"name": "f", "parameters": empty}}]
    assert check_tools([function()]) == expected
    assert check_tools([function(parameters={}, description=None, strict=False)]) == expected
    assert check_tools([function(parameters={"type": "object"})]) == expected


GOOD = function()
BAD: list[tuple[Any, str]] = [
    ([], "tools must be a list of 1 to 128 functions, got 0 of them"),
    ([GOOD] * 129, "got 129 of them"),
    ({"a": 1}, "got dict"),
    ([5], r"tools\[0\] must be an object, got 5"),
    ([{"type": "web_search"}], r"tools\[0\].type must be 'function', got 'web_search'"),
    ([{"type": "function"}], r"tools\[0\].function must be an object, got None"),
    ([{**GOOD, "x": 1}], r"tools\[0\] has the unknown field 'x'; known: type, function"),
    ([function(x=1)], r"tools\[0\].function has the unknown field 'x'"),
    ([GOOD, function(name="a b")], r"tools\[1\].function.name must be 1 to 64 .* got 'a b'"),
    ([function(name="")], r"tools\[0\].function.name"),
    ([function(name="f\n")], r"tools\[0\].function.name"),
    ([function(name="é")], r"tools\[0\].function.name"),
    ([function(name="x" * 65)], r"tools\[0\].function.name"),
    ([function(name=None)], r"tools\[0\].function.name"),
    ([GOOD, GOOD], r"tools\[1\].function.name 'f' is taken by tools\[0\]"),
    ([function(description=5)], r"tools\[0\].function.description must be a string"),
    ([function(strict=True)], r"tools\[0\].function.strict must be false"),
    ([function(parameters=[])], r"tools\[0\].function.parameters must be a JSON schema"),
    ([function(parameters={"type": "string"})], r"parameters must be a JSON schema of type"),
    ([function(parameters={"type": "object", "properties": []})], r"parameters.properties must"),
    ([function(parameters={"properties": {"a": 5}})], r"properties\['a'\] must be a JSON schema"),
    ([function(parameters={"properties": {"a": {"type": "int"}}})], r"\['a'\].type must be of"),
    ([function(parameters={"properties": {"a": {"type": [[]]}}})], r"\['a'\].type must be of"),
    ([function(parameters={"required": "a"})], r"parameters.required must be a list of strings"),
    ([function(parameters={"required": [5]})], r"parameters.required must be a list of strings"),
    ([function(parameters={"default": float("nan")})], r"tools\[0\] has the number nan"),
    ([function(parameters={5: 1})], r"tools\[0\] has the key 5"),
    ([function(description=b"a")], r"tools\[0\] must be JSON data, got bytes"),
    ([function(description="\ud800")], r"tools\[0\] has text with half of a surrogate pair"),
    ([GOOD, nested(40)], r"tools\[1\] is nested more than 32 levels deep"),
    ([nested(100_000)], "nested more than 32"),
    ([function(description="x" * 300_000)], "tools must be at most 262144 characters"),
    ([function(parameters={"required": ["a"] * 100_000})], "tools must be at most 262144"),
]


@pytest.mark.parametrize(("tools", "message"), BAD)
def test_bad_tools_are_refused_with_the_place(tools: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        check_tools(tools)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 250


def test_a_deep_schema_within_the_bound_is_accepted() -> None:
    tools = [nested(20)]
    assert check_tools(copy.deepcopy(tools)) == tools
