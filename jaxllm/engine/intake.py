"""From a request to its sequences."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from jaxllm.config import EngineConfig
from jaxllm.engine.batch import is_host_bound
from jaxllm.engine.beam_search import BeamSearch
from jaxllm.engine.request import Request
from jaxllm.engine.request_state import Detokenizer, RequestState, SequenceState
from jaxllm.engine.sequence import NOT_LIMITED, Sequence

if TYPE_CHECKING:
    from jaxllm.text.tokenizer import Tokenizer


class Intake:
    """Makes what an engine keeps of a request. Numbers its sequences and draws seeds for requests
    that have none."""

    def __init__(
        self, config: EngineConfig, eos_token_ids: tuple[int, ...], tokenizer: Tokenizer | None
    ) -> None:
        self._config = config
        self._eos_token_ids = eos_token_ids
        self._tokenizer = tokenizer
        self._next_sequence_id = 0
        self._random = random.Random(config.seed)

    def state_of(self, request: Request, prompt_token_ids: list[int]) -> RequestState:
        """The state of a request that was checked, with its sequences, which wait."""
        state = RequestState(request, prompt_token_ids)
        for sequence in self._make_sequences(request, prompt_token_ids):
            detokenizer = self._make_detokenizer(sequence)
            state.sequences.append(SequenceState(state, sequence, detokenizer))
        if request.beam_search is not None:
            first = state.sequences[0].sequence
            max_len = first.max_num_tokens - first.num_prompt_tokens
            stop_token_ids = request.params.all_stop_token_ids(self._eos_token_ids)
            state.search = BeamSearch(request.beam_search, stop_token_ids, max_len)
            for answer in state.sequences:
                answer.sequence.num_candidates = state.search.num_candidates
        return state

    def _make_sequences(self, request: Request, prompt_token_ids: list[int]) -> list[Sequence]:
        seed = request.params.seed
        if seed is None:
            seed = self._random.getrandbits(63)
        max_num_tokens = NOT_LIMITED
        if request.pooling is None:
            wanted = request.params.max_tokens or NOT_LIMITED
            max_num_tokens = min(len(prompt_token_ids) + wanted, self._config.max_model_len)
        constraint = request.constraint
        is_search = (
            request.beam_search is not None
        )  # whose beams get their constraints as they come
        host_bound = is_search or is_host_bound(
            request.params, self._eos_token_ids, constraint is not None
        )
        first_id = self._next_sequence_id
        self._next_sequence_id += request.num_sequences
        return [
            Sequence(
                sequence_id=first_id + index,
                request_id=request.request_id,
                index=index,
                params=request.params,
                seed=(seed + index + 2**63) % 2**64 - 2**63,  # stays a signed 64-bit number
                token_ids=list(prompt_token_ids),
                num_prompt_tokens=len(prompt_token_ids),
                eos_token_ids=self._eos_token_ids,
                priority=request.priority,
                arrival_time=request.arrival_time,
                cache_salt=request.cache_salt,
                max_num_tokens=max_num_tokens,
                is_host_bound=host_bound,
                pooling=request.pooling,
                constraint=constraint if is_search or constraint is None else constraint.copy(),
                first_constraint=constraint if is_search else None,
            )
            for index in range(request.num_sequences)
        ]

    def _make_detokenizer(self, sequence: Sequence) -> Detokenizer | None:
        params = sequence.params
        if self._tokenizer is None or not params.detokenize:
            return None
        from jaxllm.text.detokenizer import IncrementalDetokenizer

        return IncrementalDetokenizer(
            self._tokenizer,
            sequence.token_ids,
            skip_special_tokens=params.skip_special_tokens,
            stop=params.stop or (),
            include_stop_str_in_output=params.include_stop_str_in_output,
            min_tokens=params.min_tokens,
        )
