"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from aiohttp import web
from pydantic import Field

from jaxllm.async_engine import AsyncEngine
from jaxllm.beam_search_params import BeamSearchParams
from jaxllm.outputs import CompletionOutput, RequestOutput
from jaxllm.sampling_params import MAX_LOGPROBS, SamplingParams
from jaxllm.server.best_answers import BestAnswerFields, search_params
from jaxllm.server.body import OneText, Texts, one_by_one, open_request
from jaxllm.server.context import RECORD, ServerContext
from jaxllm.server.errors import ApiError
from jaxllm.server.generation import Outputs, Start, as_prompt, run_all, run_request
from jaxllm.server.logprobs import CompletionLogprobs, prompt_logprobs_body
from jaxllm.server.replies import Reply, StreamedFields
from jaxllm.server.response_format import ResponseFormat, WantedForm
from jaxllm.server.sampling import only, sampling_params
from jaxllm.structured_outputs import StructuredOutputsParams

DEFAULT_MAX_TOKENS = 16


class CompletionRequest(StreamedFields, BestAnswerFields):
    """OpenAI's fields and vLLM's. Those with `only` are not supported."""

    prompt: Texts
    max_tokens: int | None = Field(None, ge=0)
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool = False
    suffix: Annotated[Any, only("")] = None
    response_format: ResponseFormat | None = None
    structured_outputs: dict[str, Any] | None = None
    metadata: dict[str, str] | None = Field(None, max_length=16)

    @property
    def only_prompt(self) -> bool:
        """echo with max_tokens 0: the prompt is scored and nothing is generated."""
        return self.echo and self.max_tokens == 0


def add_routes(app: web.Application) -> None:
    """Registers the route of this file."""
    app.router.add_post("/v1/completions", create_completion)


async def create_completion(request: web.Request) -> web.StreamResponse:
    """Continues one or several prompts, at once or as a stream."""
    context, body = await open_request(request, CompletionRequest)
    prompts = one_by_one(body.prompt)
    _check_combinations(body, len(prompts))
    search = _search(body, context, len(prompts))
    params = search.sampling_params() if search else _params(body, context, len(prompts))
    num_sequences = search.beam_width if search else params.num_sequences
    context.check_room(num_sequences * len(prompts))
    requests = [
        run_request(
            context,
            _starter(body, prompt, search or params),
            params,
            body.timeout,
            request[RECORD],
            num_sequences=num_sequences,
        )
        for prompt in prompts
    ]
    reply = _Reply(request, body, params)
    if body.stream:
        return await reply.stream(request, requests)
    return await reply.respond(await run_all(requests))


def _search(
    body: CompletionRequest, context: ServerContext, num_prompts: int
) -> BeamSearchParams | None:
    max_tokens = body.max_tokens
    return search_params(
        body,
        body,
        context,
        max_tokens=DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens,
        num_prompts=num_prompts,
        logprobs=body.logprobs,
        structured_outputs=_wanted_form(body),
    )


def _wanted_form(body: CompletionRequest) -> StructuredOutputsParams | None:
    return WantedForm(body.response_format, body.structured_outputs).structured()


def _params(body: CompletionRequest, context: ServerContext, num_prompts: int) -> SamplingParams:
    other: dict[str, Any] = {
        "logprobs": body.logprobs,
        "best_of": body.best_of,
        "structured_outputs": _wanted_form(body),
    }
    if body.echo and body.logprobs is not None:
        other["prompt_logprobs"] = body.logprobs
    return sampling_params(
        body,
        context,
        max_tokens=1 if body.only_prompt else body.max_tokens,
        default_max_tokens=DEFAULT_MAX_TOKENS,
        stream=body.stream,
        num_prompts=num_prompts,
        **other,
    )


def _check_combinations(body: CompletionRequest, num_prompts: int) -> None:
    """Raises ApiError for what does not go together."""
    if not num_prompts:
        raise ApiError(400, "prompt must not be empty", param="prompt")
    body.check_stream()
    body.check_best(body.stream, body.n)
    if body.stream and body.echo and body.logprobs is not None:
        raise ApiError(400, "logprobs of an echoed prompt cannot be streamed", param="logprobs")
    if body.echo and body.logprobs is not None and body.use_beam_search:
        raise ApiError(400, "logprobs of an echoed prompt: not with beam search", param="logprobs")
    if body.echo and body.logprobs is not None and body.prompt_logprobs is not None:
        raise ApiError(
            400, "echo with logprobs gives the prompt's already", param="prompt_logprobs"
        )


def _starter(
    body: CompletionRequest, prompt: OneText, params: SamplingParams | BeamSearchParams
) -> Start:
    def start(engine: AsyncEngine, request_id: str) -> Outputs:
        return engine.generate(
            as_prompt(prompt),
            params,
            request_id,
            priority=body.priority or 0,
            cache_salt=body.cache_salt,
        )

    return start


class _Reply(Reply):
    """The choices of prompt i begin at i x n."""

    def __init__(
        self, request: web.Request, body: CompletionRequest, params: SamplingParams
    ) -> None:
        super().__init__(request, body, params, id_prefix="cmpl", kind="text_completion")
        self._body = body
        self._n = params.n
        self._logprobs: dict[int, CompletionLogprobs] = {}
        self._begun: set[int] = set()  # choices of a stream
        self._begun_prompts: set[int] = set()

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """The response that is not streamed."""
        choices = []
        for number, output in enumerate(outputs):
            self.usage.add_prompt(output)
            if not self._body.only_prompt:
                self.usage.add_output(output)
            choices += [self._choice(number, output, answer) for answer in output.outputs]
        return {**self._head, "choices": choices, "usage": self.usage.body()}

    def _choice(
        self, number: int, output: RequestOutput, answer: CompletionOutput
    ) -> dict[str, Any]:
        index = number * self._n + answer.index
        text, token_ids = answer.text, answer.token_ids
        logprobs: list[Any] | None = answer.logprobs
        if self._body.only_prompt:
            text, token_ids, logprobs = "", [], None if logprobs is None else []
        if self._body.echo:
            text = self._prompt_text(output) + text
            if logprobs is not None:
                assert output.prompt_logprobs is not None
                token_ids = [*output.prompt_token_ids, *token_ids]
                logprobs = [*output.prompt_logprobs, *logprobs]
        choice = self._body_of(index, text, token_ids, logprobs, output, answer)
        if self._body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs_body(output.prompt_logprobs)
        return choice

    def _body_of(
        self,
        index: int,
        text: str,
        token_ids: Sequence[int],
        logprobs: Sequence[Any] | None,
        output: RequestOutput,
        answer: CompletionOutput,
    ) -> dict[str, Any]:
        found, num_top = None, self._params.logprobs
        if logprobs is not None and num_top is not None:
            if index not in self._logprobs:
                before = [] if self._body.echo else output.prompt_token_ids
                skips = self._params.skip_special_tokens
                decoder = self._tokenizer.piece_decoder(before, skips)
                self._logprobs[index] = CompletionLogprobs(num_top, self._tokenizer, decoder)
            found = self._logprobs[index].body(token_ids, logprobs)
        return {
            "index": index,
            "text": text,
            "logprobs": found,
            "finish_reason": answer.finish_reason,
            "stop_reason": answer.stop_reason,
        }

    def _prompt_text(self, output: RequestOutput) -> str:
        if output.prompt is not None:
            return output.prompt
        return self._tokenizer.decode(output.prompt_token_ids, skip_special_tokens=False)

    def chunks(self, number: int, output: RequestOutput) -> list[dict[str, Any]]:
        """One chunk, a choice in it for each answer that has something new, or none."""
        if number not in self._begun_prompts:
            self._begun_prompts.add(number)
            self.usage.add_prompt(output)
        if not self._body.only_prompt:
            self.usage.add_output(output)
        choices = [self._delta(number, output, answer) for answer in output.outputs]
        news = [one for one in choices if one["text"] or one["logprobs"] or one["finish_reason"]]
        return [self.chunk(news)] if news else []

    def _delta(
        self, number: int, output: RequestOutput, answer: CompletionOutput
    ) -> dict[str, Any]:
        index = number * self._n + answer.index
        text = "" if self._body.only_prompt else answer.text
        if self._body.echo and index not in self._begun:
            text = self._prompt_text(output) + text
        self._begun.add(index)
        return self._body_of(index, text, answer.token_ids, answer.logprobs, output, answer)
