"""response_format and structured_outputs: the form that a client wants the answer to have."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from jaxllm.server.body import StrictModel
from jaxllm.server.errors import ApiError
from jaxllm.structured_outputs import StructuredOutputsParams


class TextFormat(StrictModel):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(StrictModel):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchema(StrictModel):
    """strict: every schema is kept to the letter here, whether it is true or not. name and
    description are labels, which change nothing."""

    name: str = Field(min_length=1, max_length=64)
    description: str | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(StrictModel):
    """JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


def _type_of(given: Any) -> str | None:
    kind = given.get("type") if isinstance(given, dict) else getattr(given, "type", None)
    return kind if isinstance(kind, str) else None


# Told apart by a function: a mapping in the OpenAPI description is more than its readers know.
BY_TYPE = Discriminator(
    _type_of,
    custom_error_type="format_type",
    custom_error_message="type must be text, json_object or json_schema",
)
ResponseFormat = Annotated[
    Annotated[TextFormat, Tag("text")]
    | Annotated[JsonObjectFormat, Tag("json_object")]
    | Annotated[JsonSchemaFormat, Tag("json_schema")],
    BY_TYPE,
]


@dataclass(frozen=True)
class WantedForm:
    """What a request says of its answer's form: OpenAI's field and vLLM's, of which one is given.
    source: what the client calls OpenAI's."""

    response_format: ResponseFormat | None = None
    structured_outputs: dict[str, Any] | None = None
    source: str = "response_format"

    def structured(self, *, after_reasoning: bool = False) -> StructuredOutputsParams | None:
        """None for any text. Raises ApiError, naming the field."""
        options, source = self.structured_outputs, "structured_outputs"
        if self.response_format is not None and self.response_format.type != "text":
            if options is not None:
                message = f"{source} and {self.source}: give one"
                raise ApiError(400, message, param=source)
            options, source = _options_of(self.response_format), self.source
        if options is None:
            return None
        try:
            form = StructuredOutputsParams.from_dict(options)
        except ValueError as error:
            raise ApiError(400, str(error), param=source) from None
        return replace(form, source=source, after_reasoning=after_reasoning)


NO_FORM = WantedForm()


def _options_of(response_format: JsonObjectFormat | JsonSchemaFormat) -> dict[str, Any]:
    if isinstance(response_format, JsonSchemaFormat):
        return {"json": response_format.json_schema.json_schema}
    return {"json_object": True}
