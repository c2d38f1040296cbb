"""What form a request's answer must have; names as in vLLM."""

from __future__ import annotations

import json as json_module
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxllm.request_error import RequestError

MAX_CHARS = 256 * 1024  # of a schema, a pattern or a grammar
MAX_CHOICES = 1024
FORMS = ("json", "regex", "choice", "grammar", "json_object")


class FormError(RequestError):
    """No answer of this form can be given. source: the option that asks for it."""

    def __init__(self, source: str, reason: str) -> None:
        super().__init__(f"{source}: {reason}", param=source)


@dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """Exactly one of json, regex, choice, grammar and json_object. Raises ValueError naming the
    field.

    json: a JSON schema, as an object or as text. regex: a pattern that the whole answer matches.
    choice: the answer is one of these texts. grammar: in llguidance's form of Lark
    (https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md). json_object: any JSON
    object. after_reasoning: where the prompt ends in <think>, the form is that of what comes after
    </think>. source: what the user calls the option, for error messages.
    """

    json: Mapping[str, Any] | str | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    after_reasoning: bool = False
    source: str = "structured_outputs"

    def __post_init__(self) -> None:
        given = [name for name in FORMS if getattr(self, name) is not None]
        if len(given) != 1 or self.json_object is False:
            raise RequestError(
                f"structured_outputs needs one of {', '.join(FORMS)}; got "
                f"{', '.join(given) or 'none'}"
            )
        if not isinstance(self.after_reasoning, bool):
            raise RequestError(
                f"after_reasoning must be true or false, got {self.after_reasoning!r}"
            )
        [name] = given
        set_ = object.__setattr__  # frozen: normalised once, here
        if name == "json":
            set_(self, "json", _schema(self.json))
        elif name == "choice":
            set_(self, "choice", _choices(self.choice))
        elif name == "json_object":
            if self.json_object is not True:
                raise RequestError(f"json_object must be true, got {self.json_object!r}")
        else:
            _text(name, getattr(self, name))

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> StructuredOutputsParams:
        """From user input, such as a JSON object; an unknown name is a ValueError."""
        for name in options:
            if name not in FORMS:
                raise RequestError(
                    f"structured_outputs has no {name!r:.80}; known: {', '.join(FORMS)}"
                )
        return cls(**options)


def _schema(schema: Any) -> Any:
    """As an object."""
    if isinstance(schema, str):
        _text("json", schema)
        try:
            schema = json_module.loads(schema)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"json must be a JSON schema: {error}") from None
    if not isinstance(schema, Mapping):
        raise RequestError(f"json must be a JSON schema, got {type(schema).__name__}")
    try:
        text = json_module.dumps(schema, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"json must be a JSON schema: {error}") from None
    _text("json", text)
    return json_module.loads(text)  # a copy, which nobody changes


def _choices(choices: Any) -> tuple[str, ...]:
    if isinstance(choices, str | bytes | Mapping) or not isinstance(choices, Sequence):
        raise RequestError(f"choice must be a list of texts, got {choices!r:.80}")
    if not 1 <= len(choices) <= MAX_CHOICES:
        raise RequestError(f"choice must have 1 to {MAX_CHOICES} texts, got {len(choices)}")
    for text in choices:
        _text("choice", text)
    return tuple(choices)


def _text(name: str, text: Any) -> None:
    if not isinstance(text, str) or not text:
        raise RequestError(f"{name} must be a text that is not empty, got {text!r:.80}")
    if len(text) > MAX_CHARS:
        raise RequestError(f"{name} may have {MAX_CHARS} characters, got {len(text)}")
