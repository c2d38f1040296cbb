"""The sampling fields that the APIs share, and what becomes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import core_schema

from jaxllm.request_error import RequestError
from jaxllm.sampling_params import MAX_LOGPROBS, MAX_N, RequestOutputKind, SamplingParams
from jaxllm.server.body import HasModel, ListOf, StrictModel, TokenId
from jaxllm.server.context import ServerContext
from jaxllm.server.errors import ApiError, to_api_error
from jaxllm.server.options import ServerOptions


class only:
    """For a field that is not supported: takes null and values that ask for nothing."""

    def __init__(self, *allowed: Any) -> None:
        self._allowed = allowed

    def _check(self, value: Any) -> Any:
        if value is None or any(value == one and type(value) is type(one) for one in self._allowed):
            return value
        neutral = f", or {self._allowed[0]!r}" if self._allowed else ""
        raise ValueError(f"is not supported; leave it out{neutral}")

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"enum": [None, *self._allowed]}


class SamplingFields(StrictModel):
    """Sampling, as vLLM's users know it. Null is the same as absent. SamplingParams checks more;
    what one number can be alone is said here, for the OpenAPI description."""

    n: int | None = Field(None, ge=1, le=MAX_N)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | ListOf[str] | None = None
    stop_token_ids: ListOf[TokenId] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = Field(None, ge=0)
    skip_special_tokens: bool | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    allowed_token_ids: ListOf[TokenId] | None = None
    banned_token_ids: ListOf[TokenId] | None = None
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)


class RequestFields(HasModel, SamplingFields):
    """What else every request for text may say. user, metadata and the like are labels, which
    change nothing."""

    stream: bool | None = None
    priority: int | None = None
    cache_salt: str | None = Field(None, min_length=1, max_length=256)
    timeout: float | None = Field(None, gt=0, lt=1e9, allow_inf_nan=False)
    user: str | None = Field(None, max_length=512)


def sampling_params(
    fields: SamplingFields,
    context: ServerContext,
    *,
    max_tokens: int | None,
    stream: bool | None,
    default_max_tokens: int | None = None,
    num_prompts: int = 1,
    **other: Any,
) -> SamplingParams:
    """Defaults of the model's makers, then the request's values. max_tokens, stream: as the
    request says. default_max_tokens: if nobody says; None for what is left of the context. other:
    further SamplingParams, such as logprobs. Raises ApiError, naming the field."""
    engine = context.ready_engine()
    given = fields.model_dump(include=set(SamplingFields.model_fields), exclude_none=True)
    _check_limits(given, context.options)
    values = {"max_tokens": default_max_tokens, **engine.running.default_sampling, **given, **other}
    if max_tokens is not None:
        values["max_tokens"] = max_tokens
    kind = RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY
    try:
        params = SamplingParams(**values, output_kind=kind)
    except RequestError as error:
        raise to_api_error(error) from None
    longest = engine.running.engine.config.max_model_len
    check_size(params.num_sequences, params.max_tokens, longest, num_prompts, context.options)
    return params


def _check_limits(given: Mapping[str, Any], options: ServerOptions) -> None:
    stops = given.get("stop") or []
    stops = [stops] if isinstance(stops, str) else stops
    _at_most(options.max_stop_strings, stops, "stop")
    for text in stops:
        if len(text) > options.max_stop_chars:
            raise ApiError(
                400, f"stop: a text may have {options.max_stop_chars} characters", param="stop"
            )
    _at_most(options.max_logit_bias, given.get("logit_bias", ()), "logit_bias")
    _at_most(options.max_logit_bias, given.get("stop_token_ids", ()), "stop_token_ids")


def _at_most(limit: int, values: Sequence[Any] | Mapping[str, Any], name: str) -> None:
    if len(values) > limit:
        raise ApiError(400, f"{name} may have {limit} entries, got {len(values)}", param=name)


def check_size(
    num_sequences: int,
    max_tokens: int | None,
    max_model_len: int,
    num_prompts: int,
    options: ServerOptions,
) -> None:
    """What one request may ask for, all that is computed for each of its prompts together. Raises
    ApiError."""
    num_answers = num_sequences * num_prompts
    if num_answers > options.max_completions:
        raise ApiError(
            400,
            f"{num_prompts} prompts with n = {num_sequences} are {num_answers} answers; the limit "
            f"is {options.max_completions}",
            param="n",
        )
    longest = min(max_tokens or max_model_len, max_model_len)
    if num_answers * longest > options.max_total_tokens:
        raise ApiError(
            400,
            f"{num_answers} answers of {longest} tokens are more than the "
            f"{options.max_total_tokens} tokens that a request may ask for; lower max_tokens or n",
            param="max_tokens",
        )
