"""Beam search as one would write it down: whole distributions, plain lists, no engine.

The rules are transformers': of the best (1 + number of stop tokens) x width continuations of all
beams, those that end count if they are among the first `width`, and the first `width` others go on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

import numpy as np

from jaxllm.beam_search_params import BeamSearchParams


class Answer(NamedTuple):
    score: float
    token_ids: list[int]
    reason: str


def beam_search(
    logprobs: Callable[[list[int]], np.ndarray],
    params: BeamSearchParams,
    stops: Collection[int],
    max_len: int,
) -> list[Answer]:
    """The answers, best first. logprobs: of the next token [V] after an output."""
    width, penalty = params.beam_width, params.length_penalty
    running: list[tuple[np.float32, list[int]]] = [(np.float32(0), [])]
    ended: list[Answer] = []
    for length in range(1, max_len + 1):
        grown = [
            (np.float32(total + logprob), [*tokens, token_id])
            for total, tokens in running
            for token_id, logprob in enumerate(logprobs(tokens))
        ]
        grown.sort(key=lambda pair: -pair[0])
        grown = grown[: width * max(2, 1 + len(stops))]
        for total, tokens in grown[:width]:
            if tokens[-1] in stops or length == max_len:
                reason = "stop" if tokens[-1] in stops else "length"
                ended.append(Answer(float(total / np.float32(length**penalty)), tokens, reason))
        ended = sorted(ended, key=lambda answer: -answer.score)[:width]
        running = [pair for pair in grown if pair[1][-1] not in stops][:width]
        if len(ended) == width:
            if params.early_stopping is True:
                break
            reach = max_len if params.early_stopping == "never" and penalty > 0 else length
            if running[0][0] / np.float32(reach**penalty) <= ended[-1].score:
                break
    return ended[: params.num_answers]
