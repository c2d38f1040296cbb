"""How the tokens of one request are chosen; names, defaults and ranges as in vLLM."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any, NoReturn

from jaxllm.request_error import RequestError
from jaxllm.structured_outputs import StructuredOutputsParams

MAX_LOGPROBS = 20
MAX_N = 16384
GREEDY_TEMPERATURE = 1e-5  # below it the most likely token is taken
NUMBERS = {
    "n": int, "best_of": int, "presence_penalty": float, "frequency_penalty": float,
    "repetition_penalty": float, "temperature": float, "top_p": float, "top_k": int,
    "min_p": float, "seed": int, "max_tokens": int, "min_tokens": int, "logprobs": int,
    "prompt_logprobs": int,
}  # fmt: skip
FLOAT32_MIN, FLOAT32_MAX = 2.0**-126, 2.0**127  # the device computes in float32


class RequestOutputKind(Enum):
    """CUMULATIVE: each output holds everything so far. DELTA: only what is new. FINAL_ONLY: one."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling options of one request. Order of application: allowed_token_ids, banned_token_ids,
    logit_bias and min_tokens; penalties; temperature; min_p; top_k; top_p.

    Raises ValueError naming the field, the value and what would do; TypeError for an unknown name.
    """

    n: int = 1  # independent answers; answer i of a seeded request uses seed + i
    best_of: int | None = None  # so many are computed, the n of them with the highest probability
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 and -1: off
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16  # None: as many as max_model_len allows
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    banned_token_ids: Sequence[int] | None = None
    structured_outputs: StructuredOutputsParams | None = None
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_flags()
        set_ = object.__setattr__  # frozen: normalised once, here
        for name, kind in NUMBERS.items():  # such as numpy's, whose arithmetic overflows
            if getattr(self, name) is not None:
                set_(self, name, kind(getattr(self, name)))
        set_(self, "stop", _strings("stop", self.stop))
        for name in ("stop_token_ids", "allowed_token_ids", "banned_token_ids"):
            set_(self, name, _token_ids(name, getattr(self, name)))
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise RequestError(
                "allowed_token_ids must not be empty; leave it out to allow all",
                param="allowed_token_ids",
            )
        set_(self, "logit_bias", _bias(self.logit_bias))
        if self.stop and not self.detokenize:
            raise RequestError("stop strings need detokenize=True", param="stop")
        if self.allowed_token_ids and set(self.allowed_token_ids) <= set(
            self.banned_token_ids or ()
        ):
            raise RequestError(
                "banned_token_ids leaves nothing of allowed_token_ids; allow another",
                param="banned_token_ids",
            )
        if self.top_k == -1:
            set_(self, "top_k", 0)
        self._check_structured_outputs()

    def _check_structured_outputs(self) -> None:
        """Together with options that forbid tokens there may be none left, in the middle of an
        answer."""
        structured = self.structured_outputs
        if structured is None:
            return
        if not isinstance(structured, StructuredOutputsParams):
            raise RequestError(
                f"structured_outputs must be StructuredOutputsParams, got "
                f"{type(structured).__name__}",
                param="structured_outputs",
            )
        for name in ("min_tokens", "allowed_token_ids", "banned_token_ids"):
            if getattr(self, name):
                raise RequestError(f"{name} cannot be combined with structured_outputs", param=name)

    def _check_numbers(self) -> None:
        _integer("n", self.n, 1, MAX_N)
        if self.best_of is not None:
            _integer("best_of", self.best_of, self.n, MAX_N)
        _number("presence_penalty", self.presence_penalty, -2, 2)
        _number("frequency_penalty", self.frequency_penalty, -2, 2)
        _number("repetition_penalty", self.repetition_penalty, FLOAT32_MIN, FLOAT32_MAX)
        _number("temperature", self.temperature, 0, 2)
        _number("top_p", self.top_p, 0, 1, open_low=True)
        _integer("top_k", self.top_k, -1, 2**31 - 1)
        _number("min_p", self.min_p, 0, 1)
        if self.seed is not None:
            _integer("seed", self.seed, -(2**63), 2**63 - 1)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _integer("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens})",
                param="min_tokens",
            )
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                _integer(name, value, 0, MAX_LOGPROBS)
        if self.greedy and self.num_sequences > 1:
            name = "n" if self.n > 1 else "best_of"
            raise RequestError(
                f"{name} must be 1 with temperature 0 (all answers would be the same), got "
                f"{self.num_sequences}",
                param=name,
            )

    def _check_flags(self) -> None:
        for name in (
            "include_stop_str_in_output", "ignore_eos", "detokenize", "skip_special_tokens",
        ):  # fmt: skip
            if not isinstance(getattr(self, name), bool):
                _refuse(name, "be true or false", getattr(self, name))
        if not isinstance(self.output_kind, RequestOutputKind):
            _refuse("output_kind", "be a RequestOutputKind", self.output_kind)

    @property
    def num_sequences(self) -> int:
        """Answers that are computed."""
        return self.n if self.best_of is None else self.best_of

    @property
    def ranks_answers(self) -> bool:
        """Whether only some of them are returned, which is not known before all have ended."""
        return self.num_sequences > self.n

    @property
    def is_scored(self) -> bool:
        """Whether log-probabilities of the answers' tokens are wanted, or needed to rank them."""
        return self.logprobs is not None or self.ranks_answers

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_TEMPERATURE

    def all_stop_token_ids(self, eos_token_ids: Sequence[int]) -> frozenset[int]:
        """The tokens that end an answer: the request's own and, unless ignored, the model's."""
        eos = () if self.ignore_eos else eos_token_ids
        return frozenset((*eos, *(self.stop_token_ids or ())))

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises ValueError if a token id of any option is outside [0, vocab_size)."""
        for name in ("stop_token_ids", "allowed_token_ids", "banned_token_ids", "logit_bias"):
            for token_id in getattr(self, name) or ():
                if not 0 <= token_id < vocab_size:
                    raise RequestError(
                        f"{name} has token id {token_id}, outside the vocabulary of {vocab_size}",
                        param=name,
                    )

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> SamplingParams:
        """From user input, such as a JSON object; an unknown name is a ValueError."""
        known = {f.name for f in fields(cls)} - {"output_kind"}
        for name in options:
            if name not in known:
                raise RequestError(
                    f"unknown sampling option {name!r}; known: {', '.join(sorted(known))}"
                )
        return cls(**with_form(options))


def with_form(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """The options of a user, with structured_outputs, if it is a JSON object, as its parameters."""
    structured = options.get("structured_outputs")
    if not isinstance(structured, Mapping):
        return options
    return {**options, "structured_outputs": StructuredOutputsParams.from_dict(structured)}


def _refuse(name: str, must: str, value: Any) -> NoReturn:
    """name: the option, and perhaps which entry of it."""
    option = name.replace("[", " ").split()[0]
    raise RequestError(f"{name} must {must}, got {value!r}", param=option)


def _number(name: str, value: Any, low: float, high: float, *, open_low: bool = False) -> None:
    ok = isinstance(value, numbers.Real) and not isinstance(value, bool)  # NaN fails the next line
    if not ok or not (low < value if open_low else low <= value) or value > high:
        _refuse(name, f"be a number in {'(' if open_low else '['}{low}, {high}]", value)


def _integer(name: str, value: Any, low: int, high: int) -> None:
    ok = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not ok or not low <= value <= high:
        _refuse(name, f"be an integer in [{low}, {high}]", value)


def _strings(name: str, value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, (bytes, Mapping)) or not hasattr(value, "__iter__"):
        _refuse(name, "be a string or a list of strings", value)
    values = (value,) if isinstance(value, str) else tuple(value)
    for item in values:
        if not isinstance(item, str) or not item:
            _refuse(name, "be non-empty strings", item)
    return values


def _token_ids(name: str, value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    if isinstance(value, (str, bytes, Mapping)) or not hasattr(value, "__iter__"):
        _refuse(name, "be a list of token ids", value)
    values = tuple(value)
    for item in values:
        _integer(f"{name} entry", item, 0, 2**31 - 1)
    return tuple(map(int, values))


def _bias(value: Any) -> dict[int, float] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        _refuse("logit_bias", "map token ids to numbers", value)
    bias = {}
    for key, number in value.items():
        token_id = int(key) if isinstance(key, str) and key.isdecimal() and len(key) < 20 else key
        _integer("logit_bias key", token_id, 0, 2**31 - 1)
        _number(f"logit_bias[{token_id}]", number, -100, 100)
        bias[int(token_id)] = float(number)
    return bias
