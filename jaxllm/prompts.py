"""What users give as prompts, turned into token ids."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxllm.beam_search_params import BeamSearchParams
from jaxllm.pooling_params import PoolingParams
from jaxllm.request_error import RequestError
from jaxllm.sampling_params import RequestOutputKind, SamplingParams
from jaxllm.text.chat_template import render_chat
from jaxllm.text.tokenizer import Tokenizer

Message = Mapping[str, Any]
# Text, token ids, {"prompt": ...} or {"prompt_token_ids": ...} (both may have a "cache_salt"), or
# the messages of a chat.
Prompt = str | Sequence[int] | Mapping[str, Any] | Sequence[Message]


@dataclass(frozen=True)
class TokenizedPrompt:
    """text is None where the user gave token ids. cache_salt: cached blocks are shared only between
    prompts of the same salt."""

    token_ids: list[int]
    text: str | None
    cache_salt: str | None = None


def is_single_prompt(prompts: Any) -> bool:
    """Whether this is one prompt and not a list of them."""
    if isinstance(prompts, str | Mapping):
        return True
    if not isinstance(prompts, Sequence):
        raise RequestError(
            f"prompts must be text, token ids or a list, got {type(prompts).__name__}",
            param="prompt",
        )
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


def conversations(messages: Any) -> list[list[dict[str, Any]]]:
    """One conversation or a list of them as a list. Raises ValueError for what is neither."""
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise RequestError(
            f"messages must be a list of messages, got {type(messages).__name__}", param="prompt"
        )
    if not messages:
        raise RequestError("messages is empty; give at least one message", param="prompt")
    batch = [messages] if isinstance(messages[0], Mapping) else messages
    for conversation in batch:
        is_list = isinstance(conversation, Sequence) and not isinstance(conversation, str)
        if not is_list or not conversation or not all(isinstance(m, Mapping) for m in conversation):
            raise RequestError(
                f"messages must be a conversation or a list of them, each a non-empty list of "
                f"objects; got {conversation!r:.80}",
                param="prompt",
            )
    return [[dict(message) for message in conversation] for conversation in batch]


def tokenize_prompt(prompt: Prompt, tokenizer: Tokenizer) -> TokenizedPrompt:
    """Raises ValueError for what is no prompt."""
    if isinstance(prompt, str):
        return TokenizedPrompt(tokenizer.encode(prompt), prompt)
    if isinstance(prompt, Mapping):
        return _tokenize_dict(dict(prompt), tokenizer)
    if is_chat(prompt):
        return tokenize_chat([dict(message) for message in prompt], tokenizer)  # type: ignore[arg-type]
    if isinstance(prompt, Sequence):
        return TokenizedPrompt(list(prompt), None)  # type: ignore[arg-type]
    raise RequestError(
        f"a prompt must be text or token ids, got {type(prompt).__name__}", param="prompt"
    )


def _tokenize_dict(prompt: dict[str, Any], tokenizer: Tokenizer) -> TokenizedPrompt:
    given = list(prompt)
    salt = prompt.pop("cache_salt", None)
    if "cache_salt" in given and (not isinstance(salt, str) or not salt):
        raise RequestError(
            f"cache_salt must be a non-empty string, got {salt!r}", param="cache_salt"
        )
    if len(prompt) != 1 or not {"prompt", "prompt_token_ids"} & prompt.keys():
        raise RequestError(
            f"a prompt given as a dict has 'prompt' or 'prompt_token_ids', and may have "
            f"'cache_salt'; got {given}",
            param="prompt",
        )
    (content,) = prompt.values()
    return dataclasses.replace(tokenize_prompt(content, tokenizer), cache_salt=salt)


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
        raise RequestError(
            "this model has no chat template; give chat_template or use generate", param="prompt"
        )
    text = render_chat(template, messages, special_tokens=tokenizer.special_tokens, **options)
    return TokenizedPrompt(tokenizer.encode(text, add_special_tokens=False), text)


def checked_pooling(params: PoolingParams | None, hidden_size: int) -> PoolingParams:
    """The user's parameters of an embedding, or the defaults. Raises ValueError for what does not
    fit the model."""
    if params is None:
        return PoolingParams()
    if not isinstance(params, PoolingParams):
        raise RequestError(
            f"pooling_params must be PoolingParams, got {type(params).__name__}", param="prompt"
        )
    params.check_size(hidden_size)
    return params


def checked_search(params: BeamSearchParams) -> BeamSearchParams:
    """Raises ValueError for what is none."""
    if not isinstance(params, BeamSearchParams):
        raise RequestError(
            f"params must be BeamSearchParams, got {type(params).__name__}", param="prompt"
        )
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
        raise RequestError(
            f"sampling_params must be SamplingParams, got {type(params).__name__}", param="prompt"
        )
    return dataclasses.replace(params, output_kind=kind)
