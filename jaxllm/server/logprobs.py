"""Log-probabilities in the forms that OpenAI's two APIs and vLLM give them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxllm.outputs import Logprob, TokenLogprobs
from jaxllm.text.piece_decoder import PieceDecoder
from jaxllm.text.tokenizer import Tokenizer

LOWEST = -9999.0  # JSON has no infinity


def chat_logprobs(
    token_ids: Sequence[int],
    logprobs: Sequence[TokenLogprobs],
    num_top: int,
    tokenizer: Tokenizer,
) -> dict[str, Any]:
    """The chat form, with the bytes of each token."""
    content = []
    for token_id, found in zip(token_ids, logprobs, strict=True):
        entry = _chat_entry(token_id, found[token_id], tokenizer)
        entry["top_logprobs"] = [_chat_entry(i, one, tokenizer) for i, one in _top(found, num_top)]
        content.append(entry)
    return {"content": content, "refusal": None}


def _chat_entry(token_id: int, found: Logprob, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "token": found.decoded_token,
        "logprob": _finite(found),
        "bytes": list(tokenizer.bytes_of(token_id)),
    }


def _top(found: TokenLogprobs, num_top: int) -> list[tuple[int, Logprob]]:
    """The most likely tokens; the chosen one, which comes first in `found`, only if it is one."""
    top = [(token_id, one) for token_id, one in found.items() if one.rank <= num_top]
    return sorted(top, key=lambda item: item[1].rank)[:num_top]


def _finite(found: Logprob) -> float:
    return max(found.logprob, LOWEST)


class CompletionLogprobs:
    """The completions form of one answer, which may come in pieces. Offsets count characters of
    the answer's text, as the decoder makes it; a token that only begins a character, or that the
    text leaves out, has the offset of the next one."""

    def __init__(self, num_top: int, tokenizer: Tokenizer, decoder: PieceDecoder) -> None:
        self._num_top = num_top
        self._tokenizer = tokenizer
        self._decoder = decoder
        self._offset = 0

    def body(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None]
    ) -> dict[str, Any]:
        """The next tokens. The first of a prompt has no log-probability: None."""
        body: dict[str, Any] = {
            "text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": [],
        }  # fmt: skip
        for token_id, found in zip(token_ids, logprobs, strict=True):
            body["text_offset"].append(self._offset)
            body["tokens"].append(self._tokenizer.token_string(token_id))
            self._offset += len(self._decoder.push([token_id]))
            body["token_logprobs"].append(None if found is None else _finite(found[token_id]))
            body["top_logprobs"].append(None if found is None else self._top(token_id, found))
        return body

    def _top(self, token_id: int, found: TokenLogprobs) -> dict[str, float]:
        """The most likely tokens and the chosen one."""
        chosen = [(token_id, found[token_id])]
        top = _top(found, self._num_top)
        return {self._tokenizer.token_string(i): _finite(one) for i, one in [*top, *chosen]}


def prompt_logprobs_body(
    logprobs: Sequence[TokenLogprobs | None] | None,
) -> list[dict[str, Any] | None] | None:
    """vLLM's form: for each token of the prompt, token id -> logprob, rank, decoded_token."""
    if logprobs is None:
        return None
    return [None if found is None else _prompt_entry(found) for found in logprobs]


def _prompt_entry(found: TokenLogprobs) -> dict[str, Any]:
    return {
        str(token_id): {
            "logprob": _finite(one), "rank": one.rank, "decoded_token": one.decoded_token,
        }
        for token_id, one in found.items()
    }  # fmt: skip
