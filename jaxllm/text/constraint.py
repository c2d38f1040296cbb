"""Answers of a given form: which tokens may come next, as llguidance computes it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from copy import copy as shallow_copy
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from jaxllm.engine.sequence import mask_len
from jaxllm.structured_outputs import FormError, StructuredOutputsParams
from jaxllm.text.grammar import grammar_of
from jaxllm.text.reasoning import CLOSE, opens_reasoning
from jaxllm.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

NUM_KEPT = 64  # grammars, the last ones used


class Constraint:
    """How far one answer has come in its grammar. Implements engine.sequence.Constraint.

    mask: [ceil(V / 32)] int32, a bit for each token that may come next, the lowest first.
    is_complete: nothing may come any more.
    """

    def __init__(
        self,
        matcher: LLMatcher,
        vocab_size: int,
        source: str,
        mask: np.ndarray | None = None,
    ) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._source = source
        self.is_complete = False
        self.mask = self._next() if mask is None else mask

    def accept(self, token_id: int) -> None:
        """Takes the next token. Raises FormError for one that is not allowed, and for a grammar
        that turns out to need more than its share of time or memory."""
        self._matcher.consume_token(token_id)
        self._check()
        self.is_complete = self._matcher.is_stopped()
        if not self.is_complete:
            self.mask = self._next()

    def forced(self) -> list[int]:
        """The tokens that come next whatever the model thinks: those of the text that every answer
        goes on with here, as far as the tokenizer would split it so whatever follows."""
        return [] if self.is_complete else self._matcher.compute_ff_tokens()

    def copy(self) -> Constraint:
        """For another answer that goes on from here."""
        other = Constraint(self._matcher.deep_copy(), self._vocab_size, self._source, self.mask)
        other.is_complete = self.is_complete
        return other

    def _next(self) -> np.ndarray:
        bits = self._matcher.compute_bitmask()
        mask = np.frombuffer(bits, np.int32, mask_len(self._vocab_size))
        self._check()
        if not mask.any():
            raise FormError(self._source, "no token of this model continues the answer")
        return mask

    def _check(self) -> None:
        if self._matcher.is_error():
            raise FormError(self._source, _first_line(self._matcher.get_error()))


class AfterReasoning:
    """A constraint that begins after the reasoning which the prompt has opened. Implements
    engine.sequence.Constraint."""

    def __init__(self, constraint: Constraint, tokenizer: Tokenizer) -> None:
        self._constraint = constraint
        self._tokenizer = tokenizer
        self._text = ""  # its end, in which the tag may begin
        self._has_begun = False
        self.mask = np.full_like(constraint.mask, -1)  # all bits
        self.is_complete = False

    def accept(self, token_id: int) -> None:
        """Takes the next token. Raises FormError as Constraint.accept does."""
        if self._has_begun:
            self._constraint.accept(token_id)
            self.is_complete = self._constraint.is_complete
        else:
            text = self._text + self._tokenizer.token_string(token_id)
            self._has_begun = CLOSE in text
            self._text = text[-len(CLOSE) :]
        if self._has_begun:
            self.mask = self._constraint.mask

    def forced(self) -> list[int]:
        """As Constraint.forced; none while it reasons."""
        return self._constraint.forced() if self._has_begun else []

    def copy(self) -> AfterReasoning:
        """For another answer that goes on from here."""
        other = shallow_copy(self)
        other._constraint = self._constraint.copy()
        return other


class ConstraintMaker:
    """Makes the constraints of one model. It reads the vocabulary when it is first used, which
    takes a second; any thread may call it.

    vocab_size: of the model, whose last tokens the tokenizer may not know.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._lock = threading.Lock()
        self._tokens: LLTokenizer | None = None
        self._start = lru_cache(NUM_KEPT)(self._compile)

    def constraint(
        self, params: StructuredOutputsParams, prompt: str | None
    ) -> Constraint | AfterReasoning:
        """At the start of an answer to a prompt. Raises FormError for what is no grammar, or needs
        too much."""
        constraint = self._start(grammar_of(params), params.source).copy()
        if params.after_reasoning and opens_reasoning(prompt or ""):
            return AfterReasoning(constraint, self._tokenizer)
        return constraint

    def _compile(self, grammar: str, source: str) -> Constraint:
        from llguidance import LLMatcher  # a tenth of a second, for those who use it

        with self._lock:
            vocabulary = self._vocabulary(source)
        return Constraint(LLMatcher(vocabulary, grammar, log_level=0), self._vocab_size, source)

    def _vocabulary(self, source: str) -> LLTokenizer:
        from llguidance import LLTokenizer

        if self._tokens is not None:
            return self._tokens
        text = self._tokenizer.backend.to_str()
        try:
            self._tokens = LLTokenizer(
                text, n_vocab=self._vocab_size, eos_token=self._eos_token_ids
            )
        except Exception as error:  # the library raises what its parts raise
            reason = f"not supported with this model's tokenizer: {_first_line(str(error))}"
            raise FormError(source, reason) from error
        return self._tokens


def _first_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[0][:300] if lines else "unknown error"
