"""Options of a beam search; names as in vLLM, rules as in transformers."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from jaxllm.request_error import RequestError
from jaxllm.sampling_params import RequestOutputKind, SamplingParams, with_form
from jaxllm.structured_outputs import StructuredOutputsParams

MAX_BEAM_WIDTH = 64


@dataclass(frozen=True, kw_only=True)
class BeamSearchParams:
    """A search for the most likely answers: the beam_width best are continued at each step.

    n: answers that are returned, best first; None: beam_width. temperature: divides the logits
    before they become log-probabilities; 0, vLLM's default, leaves them as they are. An ended
    answer scores its log-probability / its number of tokens ** length_penalty. early_stopping: True
    ends the search once beam_width answers have ended; False, when the best running one, scored at
    its present length, is no better than the worst ended one; "never", when it could not become
    better (for a positive length_penalty, scored at the longest length). structured_outputs: only
    what its form allows is continued; what it excludes makes nothing else more likely, and there
    may be fewer than n answers. logprobs: of each token as the search adds them up, at its
    temperature, and of so many of the likeliest tokens that may come there. The rest is as in
    SamplingParams. Raises ValueError naming the field, the value and what would do.
    """

    beam_width: int
    n: int | None = None
    max_tokens: int | None = 16
    temperature: float = 1.0
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    ignore_eos: bool = False
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        _check_width("beam_width", self.beam_width, MAX_BEAM_WIDTH)
        if self.n is not None:
            _check_width("n", self.n, self.beam_width)
        penalty = self.length_penalty
        is_number = isinstance(penalty, numbers.Real) and not isinstance(penalty, bool)
        if not is_number or not -10 <= penalty <= 10:
            raise RequestError(
                f"length_penalty must be a number in [-10, 10], got {penalty!r}",
                param="length_penalty",
            )
        if not any(self.early_stopping is choice for choice in (True, False)) and (
            self.early_stopping != "never"
        ):
            raise RequestError(
                f'early_stopping must be true, false or "never", got {self.early_stopping!r}',
                param="early_stopping",
            )
        self.sampling_params()  # checks the others

    @property
    def num_answers(self) -> int:
        """How many are returned."""
        return self.beam_width if self.n is None else self.n

    def sampling_params(self) -> SamplingParams:
        """What is the same for a request that samples."""
        return SamplingParams(
            n=self.num_answers,
            max_tokens=self.max_tokens,
            temperature=self.temperature or 1.0,
            ignore_eos=self.ignore_eos,
            stop_token_ids=self.stop_token_ids,
            include_stop_str_in_output=self.include_stop_str_in_output,
            skip_special_tokens=self.skip_special_tokens,
            logprobs=self.logprobs,
            structured_outputs=self.structured_outputs,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> BeamSearchParams:
        """From user input; a name that a search has no use for is a ValueError."""
        known = {field.name for field in fields(cls)}
        for name in options:
            if name not in known:
                raise RequestError(f"{name} cannot be combined with beam search", param=name)
        return cls(**with_form(options))


def _check_width(name: str, value: Any, most: int) -> None:
    is_integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_integer or not 1 <= value <= most:
        raise RequestError(f"{name} must be an integer in [1, {most}], got {value!r}", param=name)
