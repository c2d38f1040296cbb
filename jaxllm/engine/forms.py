"""Answers of a given form: tokens that it leaves no choice of, and guesses of those to come."""

from __future__ import annotations

import numpy as np

from jaxllm.engine.batch import uses_table
from jaxllm.engine.sequence import Constraint, Sequence


def forced_tokens(sequence: Sequence, constraint: Constraint) -> list[int]:
    """The tokens that come next in any case, by a constraint of the sequence: they need no logits,
    and their keys and values are computed with those of the token that follows. None where
    something is wanted of the logits, or kept of sampled tokens on the device."""
    if sequence.params.is_scored or uses_table(sequence):
        return []
    return constraint.forced()


def masks_ahead(sequence: Sequence, guess: list[int]) -> list[np.ndarray]:
    """What may come after each token of a guess, as Constraint.mask, for as many of them as are
    worth being verified.

    A token that the form excludes, or that ends the answer, ends the guess before it. Where the
    form leaves no choice, only the token that the engine would put there may come; a guess does not
    end among such tokens, which cost less if they are taken unverified.
    """
    assert sequence.constraint is not None
    constraint, mask = sequence.constraint.copy(), sequence.constraint.mask
    stops = sequence.params.all_stop_token_ids(sequence.eos_token_ids)
    masks: list[np.ndarray] = []
    forced: list[int] = []
    num_wanted = 0
    for token_id in guess:
        if token_id in stops or not _is_allowed(mask, token_id):
            break
        try:
            constraint.accept(token_id)
        except ValueError:  # it is the sequence's affair, if it gets there
            break
        if constraint.is_complete:
            break
        forced = forced[1:] if forced else forced_tokens(sequence, constraint)
        mask = _only(forced[0], len(mask)) if forced else constraint.mask
        masks.append(mask)
        if not forced:
            num_wanted = len(masks)
    return masks[:num_wanted]


def _is_allowed(mask: np.ndarray, token_id: int) -> bool:
    return bool(mask[token_id // 32] >> (token_id % 32) & 1)


def _only(token_id: int, num_words: int) -> np.ndarray:
    mask = np.zeros(num_words, np.uint32)
    mask[token_id // 32] = 1 << (token_id % 32)
    return mask.view(np.int32)
