"""What users give as prompts, turned into token ids."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxllm.pooling_params import PoolingParams
from jaxllm.sampling_params import RequestOutputKind, SamplingParams
from jaxllm.text.chat_template import render_chat
from jaxllm.text.tokenizer import Tokenizer

Message = Mapping[str, Any]
# Text, token ids, {"prompt": ...} or {"prompt_token_ids": ...}, or the messages of a chat.
Prompt = str | Sequence[int] | Mapping[str, Any] | Sequence[Message]


@dataclass(frozen=True)
class TokenizedPrompt:
    """text is None where the user gave token ids."""

    token_ids: list[int]
    text: str | None


def is_single_prompt(prompts: Any) -> bool:
    """Whether this is one prompt and not a list of them."""
    if isinstance(prompts, str | Mapping):
        return True
    if not isinstance(prompts, Sequence):
        raise ValueError(f"prompts must be text, token ids or a list, got {type(prompts).__name__}")
    first = prompts[0] if prompts else ""
    return isinstance(first, int) or is_chat(prompts)


def is_chat(prompt: Any) -> bool:
    """Whether this is a list of chat messages."""
    return (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, str)
        and bool(prompt)
        and all(isinstance(item, Mapping) and "role" in item for item in prompt)
    )


def tokenize_prompt(prompt: Prompt, tokenizer: Tokenizer) -> TokenizedPrompt:
    """Raises ValueError for what is no prompt."""
    if isinstance(prompt, str):
        return TokenizedPrompt(tokenizer.encode(prompt), prompt)
    if isinstance(prompt, Mapping):
        known = {"prompt", "prompt_token_ids"}
        if len(prompt) != 1 or not known & prompt.keys():
            raise ValueError(
                f"a prompt given as a dict has 'prompt' or 'prompt_token_ids', got {list(prompt)}"
            )
        return tokenize_prompt(next(iter(prompt.values())), tokenizer)
    if is_chat(prompt):
        return tokenize_chat([dict(message) for message in prompt], tokenizer)  # type: ignore[arg-type]
    if isinstance(prompt, Sequence):
        return TokenizedPrompt(list(prompt), None)  # type: ignore[arg-type]
    raise ValueError(f"a prompt must be text or token ids, got {type(prompt).__name__}")


def tokenize_chat(
    messages: list[dict[str, Any]],
    tokenizer: Tokenizer,
    *,
    chat_template: str | None = None,
    **options: Any,
) -> TokenizedPrompt:
    """Messages through a chat template, the model's own if none is given. options: see render_chat.
    The template writes special tokens itself, so none are added."""
    template = chat_template or tokenizer.chat_template
    if template is None:
        raise ValueError("this model has no chat template; give chat_template or use generate")
    text = render_chat(template, messages, special_tokens=tokenizer.special_tokens, **options)
    return TokenizedPrompt(tokenizer.encode(text, add_special_tokens=False), text)


def checked_pooling(params: PoolingParams | None, hidden_size: int) -> PoolingParams:
    """The user's parameters of an embedding, or the defaults. Raises ValueError for what does not
    fit the model."""
    if params is None:
        return PoolingParams()
    if not isinstance(params, PoolingParams):
        raise ValueError(f"pooling_params must be PoolingParams, got {type(params).__name__}")
    params.check_size(hidden_size)
    return params


def params_of_kind(
    params: SamplingParams | Mapping[str, Any] | None,
    default: Mapping[str, Any],
    kind: RequestOutputKind,
) -> SamplingParams:
    """The user's parameters, or those that the model's makers recommend, with another output
    kind."""
    if params is None:
        params = SamplingParams.from_dict(default)
    elif not isinstance(params, SamplingParams):
        raise ValueError(f"sampling_params must be SamplingParams, got {type(params).__name__}")
    return dataclasses.replace(params, output_kind=kind)
