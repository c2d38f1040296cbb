"""JSON schemas of the kinds that tools and public collections use: whatever is drawn from the
tokens that a schema allows is an instance of it."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import pytest
from test_constraint import maker, random_answer

from jaxllm.structured_outputs import StructuredOutputsParams
from jaxllm.text.tokenizer import Tokenizer

NUM_SCHEMAS = 310  # two may be the same
NUM_GROUPS = 10
NAMES = ("id", "name", "city", "unit", "tags", "items", "from_date", "limit", "is_new", "größe")
PATTERNS = ("^[a-z]{2,6}$", r"^\d{4}-\d{2}$", "^(yes|no)$", "^[A-Z][a-z]{0,4}$")


class Schemas:
    """Draws schemas; what ends them gets likelier with their depth."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def whole(self) -> dict[str, Any]:
        """An object, with definitions that it refers to."""
        names = self.random.sample(("point", "label"), self.random.randint(0, 2))
        schema = self.object(0, names)
        if names:
            schema["$defs"] = {name: self.any(2, []) for name in names}
        return schema

    def any(self, depth: int, names: list[str]) -> dict[str, Any]:
        """A schema of any kind. names: of definitions."""
        kinds = [self.text, self.pattern, self.integer, self.number, self.enum, self.const]
        if depth < 3:
            kinds += [self.object, self.array, self.any_of, self.nullable] * 2
        if names:
            kinds += [self.reference] * 3
        return self.random.choice(kinds)(depth, names)

    def object(self, depth: int, names: list[str]) -> dict[str, Any]:
        fields = self.random.sample(NAMES, self.random.randint(1, 4))
        return {
            "type": "object",
            "properties": {field: self.any(depth + 1, names) for field in fields},
            "required": self.random.sample(fields, self.random.randint(0, len(fields))),
            "additionalProperties": False,
        }

    def array(self, depth: int, names: list[str]) -> dict[str, Any]:
        least = self.random.randint(0, 2)
        most = least + self.random.randint(0, 2)
        items = self.any(depth + 1, names)
        return {"type": "array", "items": items, "minItems": least, "maxItems": most}

    def any_of(self, depth: int, names: list[str]) -> dict[str, Any]:
        return {"anyOf": [self.any(depth + 1, names) for _ in range(self.random.randint(2, 3))]}

    def nullable(self, depth: int, names: list[str]) -> dict[str, Any]:
        return {"anyOf": [self.any(depth + 1, names), {"type": "null"}]}

    def reference(self, depth: int, names: list[str]) -> dict[str, Any]:
        return {"$ref": f"#/$defs/{self.random.choice(names)}"}

    def text(self, depth: int, names: list[str]) -> dict[str, Any]:
        least = self.random.randint(0, 3)
        return {"type": "string", "minLength": least, "maxLength": least + 6}

    def pattern(self, depth: int, names: list[str]) -> dict[str, Any]:
        return {"type": "string", "pattern": self.random.choice(PATTERNS)}

    def integer(self, depth: int, names: list[str]) -> dict[str, Any]:
        least = self.random.randint(-20, 20)
        return {"type": "integer", "minimum": least, "maximum": least + self.random.randint(0, 900)}

    def number(self, depth: int, names: list[str]) -> dict[str, Any]:
        return {"type": "number", "minimum": 0, "exclusiveMaximum": self.random.randint(1, 99)}

    def enum(self, depth: int, names: list[str]) -> dict[str, Any]:
        values = ["celsius", "fahrenheit", 'a "quoted" text', 7, None, True]
        return {"enum": self.random.sample(values, self.random.randint(1, 4))}

    def const(self, depth: int, names: list[str]) -> dict[str, Any]:
        return {"const": self.random.choice(["fixed", 3, False])}


@pytest.mark.parametrize("group", range(NUM_GROUPS))
def test_what_a_schema_allows_is_an_instance_of_it(byte_level: Tokenizer, group: int) -> None:
    constraints = maker(byte_level)
    for seed in range(group, NUM_SCHEMAS, NUM_GROUPS):
        schema = Schemas(seed).whole()
        jsonschema.Draft202012Validator.check_schema(schema)
        constraint = constraints.constraint(StructuredOutputsParams(json=schema), None)
        answer = random_answer(byte_level, constraint, seed)
        jsonschema.validate(json.loads(answer), schema)


def test_the_schemas_are_of_all_kinds() -> None:
    text = json.dumps([Schemas(seed).whole() for seed in range(NUM_SCHEMAS)])
    for word in ("$ref", "anyOf", "enum", "const", "pattern", "minItems", "exclusiveMaximum"):
        assert text.count(f'"{word}"') > 30, word
    assert len({json.dumps(Schemas(seed).whole()) for seed in range(NUM_SCHEMAS)}) >= 300
