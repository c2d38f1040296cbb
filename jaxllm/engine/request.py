"""What a user asks of the engine, and what cannot be asked."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass, field

import numpy as np

from jaxllm.beam_search_params import BeamSearchParams
from jaxllm.config import EngineConfig
from jaxllm.engine.beam_search import check_search
from jaxllm.engine.sequence import Constraint
from jaxllm.pooling_params import PoolingParams
from jaxllm.request_error import RequestError
from jaxllm.sampling_params import RequestOutputKind, SamplingParams

# What the step reads of a sequence that embeds. Its token is not used, so it is not drawn either.
NO_SAMPLING = SamplingParams(
    temperature=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
)


TOO_LONG = "context_length_exceeded"  # as OpenAI's clients know it


class QueueFullError(RuntimeError):
    """The engine takes no more requests now; later it will."""


@dataclass(frozen=True)
class Request:
    """What a user sent, tokenized. The engine makes num_sequences sequences of it.

    prompt: the text, only to be handed back. priority: smaller runs earlier, under the priority
    policy. cache_salt: cached blocks are shared only between requests of the same salt.
    arrival_time: on the clock of ``time.monotonic``. pooling: if given, the request returns the
    embedding of its prompt and generates nothing; params is NO_SAMPLING then. constraint: that of
    params.structured_outputs, at the start of an answer; it takes time to make, so it comes made.
    beam_search: if given, the answers are found by it; params is beam_search.sampling_params().
    """

    request_id: str
    prompt_token_ids: AbstractSequence[int]
    params: SamplingParams
    prompt: str | None = None
    priority: int = 0
    cache_salt: str | None = None
    arrival_time: float = field(default_factory=time.monotonic)
    pooling: PoolingParams | None = None
    constraint: Constraint | None = None
    beam_search: BeamSearchParams | None = None

    @property
    def num_sequences(self) -> int:
        """Those that are computed."""
        if self.beam_search is not None:
            return self.beam_search.beam_width
        return self.params.num_sequences

    def check(
        self, vocab_size: int, config: EngineConfig, eos_token_ids: AbstractSequence[int] = ()
    ) -> list[int]:
        """The prompt as a list of ints. Raises ValueError with what is wrong."""
        if not isinstance(self.request_id, str) or not self.request_id:
            raise RequestError(
                f"request_id must be a non-empty string, got {self.request_id!r}",
                param="request_id",
            )
        if not isinstance(self.params, SamplingParams):
            raise RequestError(
                f"params must be SamplingParams, got {type(self.params).__name__}", param="params"
            )
        if not isinstance(self.priority, int) or isinstance(self.priority, bool):
            raise RequestError(
                f"priority must be an integer, got {self.priority!r}", param="priority"
            )
        if not isinstance(self.cache_salt, str | None):
            raise RequestError(
                f"cache_salt must be a string, got {self.cache_salt!r}", param="cache_salt"
            )
        if not isinstance(self.arrival_time, int | float) or not math.isfinite(self.arrival_time):
            raise RequestError(
                f"arrival_time must be a finite number, got {self.arrival_time!r}",
                param="arrival_time",
            )
        prompt = _as_list(self.prompt_token_ids)
        self._check_prompt_len(len(prompt), config.max_model_len)
        token_ids = _checked_token_ids(prompt, vocab_size)
        if self.pooling is not None:
            self._check_pooling()
            return token_ids
        if (self.params.structured_outputs is None) != (self.constraint is None):
            raise RequestError(
                "structured_outputs needs its constraint, and no other has one",
                param="structured_outputs",
            )
        self.params.check_vocabulary(vocab_size)
        if self.beam_search is not None:
            self._check_beam_search(len(prompt), config, eos_token_ids)
        self._check_some_token_can_come(vocab_size, eos_token_ids)
        return token_ids

    def _check_prompt_len(self, num_tokens: int, max_model_len: int) -> None:
        """Comes before the tokens are looked at, of which there may be millions."""
        room = max_model_len - (self.pooling is None)  # for a token to be generated
        if num_tokens > room:
            raise RequestError(
                f"the prompt has {num_tokens} tokens, and there is room for {room}: max_model_len "
                f"is {max_model_len}; shorten the prompt or raise max_model_len",
                param="prompt",
                code=TOO_LONG,
            )

    def _check_pooling(self) -> None:
        if not isinstance(self.pooling, PoolingParams):
            raise RequestError(
                f"pooling must be PoolingParams, got {type(self.pooling).__name__}", param="pooling"
            )
        if self.params != NO_SAMPLING:
            raise RequestError(
                "a request that embeds takes no SamplingParams; give NO_SAMPLING", param="params"
            )

    def _check_beam_search(
        self, prompt_len: int, config: EngineConfig, eos_token_ids: AbstractSequence[int]
    ) -> None:
        if not isinstance(self.beam_search, BeamSearchParams):
            raise RequestError(
                f"beam_search must be BeamSearchParams, got {type(self.beam_search).__name__}",
                param="params",
            )
        if self.params != self.beam_search.sampling_params():
            raise RequestError(
                "a beam search takes no SamplingParams but its own, beam_search.sampling_params()",
                param="params",
            )
        stop_token_ids = self.params.all_stop_token_ids(eos_token_ids)
        check_search(self.beam_search, prompt_len, stop_token_ids, config)

    def _check_some_token_can_come(
        self, vocab_size: int, eos_token_ids: AbstractSequence[int]
    ) -> None:
        """Before min_tokens no stop token may be generated, and something has to be."""
        params = self.params
        excluded = {*(params.banned_token_ids or ())}
        if params.min_tokens:
            excluded.update(params.all_stop_token_ids(eos_token_ids))
        if params.allowed_token_ids is None:
            if len(excluded) == vocab_size:
                raise RequestError(
                    f"banned tokens (and before min_tokens stop tokens) are the whole vocabulary "
                    f"of {vocab_size}; leave some to be generated",
                    param="banned_token_ids",
                )
        elif excluded.issuperset(params.allowed_token_ids):
            raise RequestError(
                f"allowed_token_ids holds only stop tokens, and min_tokens is {params.min_tokens}; "
                f"allow another token or set min_tokens to 0",
                param="allowed_token_ids",
            )


def _as_list(token_ids: AbstractSequence[int]) -> list[int] | tuple[int, ...]:
    if isinstance(token_ids, np.ndarray):
        token_ids = token_ids.tolist()
    if not isinstance(token_ids, list | tuple):
        raise RequestError(
            f"prompt_token_ids must be a list, got {type(token_ids).__name__}", param="prompt"
        )
    if not token_ids:
        raise RequestError("the prompt is empty; give at least one token", param="prompt")
    return token_ids


def _checked_token_ids(token_ids: AbstractSequence[int], vocab_size: int) -> list[int]:
    for position, token_id in enumerate(token_ids):
        if type(token_id) is not int and not isinstance(token_id, np.integer):
            raise RequestError(
                f"prompt_token_ids must be integers, got {token_id!r} at position {position}",
                param="prompt",
            )
        if not 0 <= token_id < vocab_size:
            raise RequestError(
                f"prompt token id {token_id} at position {position} is outside the vocabulary "
                f"of {vocab_size}",
                param="prompt",
            )
    return [int(token_id) for token_id in token_ids]
