"""A grammar for answers that must be tool calls, in the form that a model has learned."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxllm.text.grammar import schema_rule

MAX_CALLS = 32  # in one answer


@dataclass(frozen=True)
class CallForm:
    """What stands around calls, each a JSON object with "name" and an object of arguments. Tags
    are pieces of their own, since they may be tokens of their own."""

    before: tuple[str, ...] = ()
    between: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    arguments_key: str = "arguments"


def forced_grammar(
    form: CallForm,
    tools: Sequence[Mapping[str, Any]],
    special_token_ids: Mapping[str, int],
    *,
    single_call: bool,
) -> str:
    """In llguidance's form of Lark: one call, or up to MAX_CALLS, with arguments of the schema of
    the function that is called. tools: as check_tools returns them. special_token_ids: by their
    text; a grammar does not take their characters for them."""

    def literal(pieces: Sequence[str]) -> str:
        return " ".join(
            f"<[{special_token_ids[piece]}]>" if piece in special_token_ids else json.dumps(piece)
            for piece in pieces
        )

    more = "" if single_call else f"({literal(form.between)} call){{0,{MAX_CALLS - 1}}}"
    rules = [
        f"start: {literal(form.before)} call {more} {literal(form.after)}",
        f"call: {' | '.join(f'call_{i}' for i in range(len(tools)))}",
    ]
    for i, tool in enumerate(tools):
        function = tool["function"]
        head = json.dumps({"name": function["name"], form.arguments_key: 0})[:-2]
        rules.append(f'call_{i}: {json.dumps(head)} arguments_{i} "}}"')
        rules.append(f"arguments_{i}: {schema_rule(function['parameters'])}")
    return "\n".join(rules)
