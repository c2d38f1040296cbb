"""The fields of a request that wants the likeliest answers: best_of and beam search."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from jaxllm.beam_search_params import BeamSearchParams
from jaxllm.request_error import RequestError
from jaxllm.sampling_params import MAX_N, SamplingParams
from jaxllm.server.body import StrictModel
from jaxllm.server.context import ServerContext
from jaxllm.server.errors import ApiError, to_api_error
from jaxllm.server.sampling import SamplingFields, check_size

DEFAULTS = SamplingParams()


class BestAnswerFields(StrictModel):
    """best_of: answers that are computed, the n likeliest of which are returned; with beam search
    the beam width (n, if it is not given). length_penalty, early_stopping: of BeamSearchParams."""

    best_of: int | None = Field(None, ge=1, le=MAX_N)
    use_beam_search: bool | None = None
    length_penalty: float | None = Field(None, ge=-10, le=10)
    early_stopping: bool | Literal["never"] | None = None

    def check_best(self, stream: bool | None) -> None:
        """Raises ApiError for what does not go together."""
        if not self.use_beam_search:
            for name in ("length_penalty", "early_stopping"):
                if getattr(self, name) is not None:
                    raise ApiError(400, f"{name} needs use_beam_search = true", param=name)
        for name in ("use_beam_search", "best_of"):
            if stream and getattr(self, name) not in (None, False, 1):
                raise ApiError(400, f"{name} cannot be combined with stream", param=name)


def search_params(
    best: BestAnswerFields,
    sampling: SamplingFields,
    context: ServerContext,
    *,
    max_tokens: int | None,
    num_prompts: int = 1,
    skip_special_tokens: bool | None = None,
    **other: Any,
) -> BeamSearchParams | None:
    """None unless beam search is wanted. other: what else the request asks for, by its name, None
    where it does not. Raises ApiError, naming the field, for what beams have no use for. What the
    model's makers recommend for sampling has no effect on a search."""
    if not best.use_beam_search:
        return None
    given = sampling.model_dump(include=set(SamplingFields.model_fields), exclude_none=True)
    given |= {name: value for name, value in other.items() if value is not None}
    wanted = {name: v for name, v in given.items() if v != getattr(DEFAULTS, name, None)}
    n = wanted.pop("n", 1)
    if skip_special_tokens is not None:
        wanted["skip_special_tokens"] = skip_special_tokens
    for name in ("length_penalty", "early_stopping"):
        if getattr(best, name) is not None:
            wanted[name] = getattr(best, name)
    width = best.best_of or n
    try:
        search = BeamSearchParams.from_dict(
            {**wanted, "beam_width": width, "n": n, "max_tokens": max_tokens}
        )
    except RequestError as error:
        refused = to_api_error(error)
        if refused.param == "beam_width":
            refused.param = "n" if best.best_of is None else "best_of"
        raise refused from None
    config = context.ready_engine().running.engine.config
    check_size(width, search.max_tokens, config.max_model_len, num_prompts, context.options)
    return search
