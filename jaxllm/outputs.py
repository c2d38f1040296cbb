"""What a request returns, with the names and fields that vLLM's users know."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Logprob:
    """The log-probability of one token before any sampling option changed it, and its rank (1 is
    the most likely token of the vocabulary)."""

    logprob: float
    rank: int
    decoded_token: str | None = None


TokenLogprobs = dict[int, Logprob]


@dataclass
class CompletionOutput:
    """One of the n answers of a request.

    finish_reason: None while running, then "stop", "length" or "abort" or "error".
    stop_reason: the stop string or stop token id that ended it; None for end of sequence.
    logprobs: one dict a token: the sampled token and the num_logprobs most likely ones.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(frozen=True)
class RequestMetrics:
    """Times in seconds on the clock of ``time.monotonic``. num_draft_tokens: guesses of speculation
    that steps verified; num_accepted_tokens: of these, those that the model generated too. Both are
    complete once the request has finished."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_preemptions: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0


@dataclass
class RequestOutput:
    """A request's answers so far. prompt_logprobs[0] is None: nothing precedes the first token.
    embedding: of the prompt, [E] or fewer float32; None unless the request embeds and is done."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    metrics: RequestMetrics | None = None
    num_cached_tokens: int = 0
    embedding: np.ndarray | None = None


class RequestFailedError(RuntimeError):
    """A request whose result is all or nothing ended without it."""


@dataclass
class EmbeddingOutput:
    """embedding: [E] float32, or fewer numbers if PoolingParams.dimensions says so."""

    embedding: np.ndarray

    @property
    def hidden_size(self) -> int:
        return len(self.embedding)


@dataclass
class EmbeddingRequestOutput:
    """The embedding of one prompt."""

    request_id: str
    outputs: EmbeddingOutput
    prompt: str | None
    prompt_token_ids: list[int]
    finished: bool = True
    metrics: RequestMetrics | None = None
    num_cached_tokens: int = 0

    @classmethod
    def from_request_output(cls, output: RequestOutput) -> EmbeddingRequestOutput:
        """Of the final output of a request that embeds. Raises RequestFailedError if it has
        none."""
        if output.embedding is None:
            reason = output.outputs[0].finish_reason
            raise RequestFailedError(f"the embedding could not be computed, it ended by {reason!r}")
        return cls(
            output.request_id,
            EmbeddingOutput(output.embedding),
            output.prompt,
            output.prompt_token_ids,
            metrics=output.metrics,
            num_cached_tokens=output.num_cached_tokens,
        )
