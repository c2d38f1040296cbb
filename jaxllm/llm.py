"""The Python API: a model that generates."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from jaxllm.beam_search_params import BeamSearchParams
from jaxllm.engine.engine import Request
from jaxllm.engine.request import NO_SAMPLING
from jaxllm.outputs import CompletionOutput, EmbeddingRequestOutput, RequestOutput
from jaxllm.pooling_params import PoolingParams
from jaxllm.prompts import (
    Message,
    Prompt,
    TokenizedPrompt,
    checked_pooling,
    checked_search,
    conversations,
    is_single_prompt,
    params_of_kind,
    tokenize_chat,
    tokenize_prompt,
)
from jaxllm.sampling_params import RequestOutputKind, SamplingParams
from jaxllm.startup import EngineOptions, start_engine
from jaxllm.text.tokenizer import Tokenizer

Params = SamplingParams | Sequence[SamplingParams] | None


class LLM:
    """A model on this machine's device, for offline use from one thread.

        llm = LLM("smollm2-135m-instruct", max_model_len=2048)
        llm.generate(["The capital of France is"], SamplingParams(temperature=0))

    model: a folder, a .gguf file, org/name of the Hugging Face hub, or a built-in name. Options are
    those of startup.EngineOptions; an unknown one is a TypeError. Raises ModelError for files that
    cannot be used. A context manager: leaving it frees the device's memory.
    """

    def __init__(self, model: str, **options: Any) -> None:
        self._running = start_engine(str(model), EngineOptions(**options))
        self.engine = self._running.engine
        self._ids = itertools.count()
        self._inboxes: dict[str, deque[RequestOutput]] = {}
        self._closed = False

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the device's memory. The model cannot be used after it."""
        self._closed = True
        self._running.close()

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._running.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's makers recommend, over the defaults of SamplingParams."""
        return SamplingParams.from_dict(self._running.default_sampling)

    def reset_prefix_cache(self) -> None:
        """Forgets cached prompts."""
        self.engine.reset_prefix_cache()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Answers in the order of the prompts: text, token ids, or chats. sampling_params: one for
        all, or one each; None takes the model's defaults. Raises ValueError, before anything is
        computed, if one of them cannot be served."""
        tokenized = self._tokenize(prompts)
        per_prompt = self._params_of_each(sampling_params, len(tokenized))
        return self._run(tokenized, per_prompt, use_tqdm, priority)

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams | Sequence[BeamSearchParams],
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """The most likely answers in the order of the prompts, of each prompt the best first, each
        with its cumulative_logprob. params: one for all, or one each. Raises ValueError, before
        anything is computed, if one of them cannot be served."""
        tokenized = self._tokenize(prompts)
        searches = _searches_of_each(params, len(tokenized))
        per_prompt = [search.sampling_params() for search in searches]
        options = [{"beam_search": search} for search in searches]
        return self._run(tokenized, per_prompt, use_tqdm, priority, options)

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[EmbeddingRequestOutput]:
        """Embeddings in the order of the prompts, from the hidden states after the model's final
        norm. pooling_params: one for all, or one each; None: the normalized mean. Raises
        ValueError, before anything is computed, if one of the prompts cannot be served, and
        RequestFailedError if a step fails."""
        tokenized = self._tokenize(prompts)
        pooling = self._pooling_of_each(pooling_params, len(tokenized))
        params = [NO_SAMPLING] * len(tokenized)
        options = [{"pooling": each} for each in pooling]
        outputs = self._run(tokenized, params, use_tqdm, None, options)
        return [EmbeddingRequestOutput.from_request_output(output) for output in outputs]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Params = None,
        *,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers to one conversation or to a list of them, through the chat template."""
        tokenized = [
            tokenize_chat(
                conversation,
                self._running.tokenizer,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
                **(chat_template_kwargs or {}),
            )
            for conversation in conversations(messages)
        ]
        per_prompt = self._params_of_each(sampling_params, len(tokenized))
        return self._run(tokenized, per_prompt, use_tqdm, None)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Iterator[CompletionOutput]:
        """Pieces of the answers to one prompt as they come: each holds what is new. The request
        begins with the first piece; leaving the loop early ends it. Raises ValueError at once if
        it cannot be served."""
        tokenized = tokenize_prompt(prompt, self._running.tokenizer)
        params = self._params(sampling_params, RequestOutputKind.DELTA)
        request = self._request(tokenized, params, 0)
        self.engine.check(request)
        return self._stream(request)

    def _stream(self, request: Request) -> Iterator[CompletionOutput]:
        self._check_open()
        self.engine.add_request(request)
        inbox = self._inboxes[request.request_id] = deque()
        try:
            finished = False
            while not finished:
                while not inbox:
                    self._step()
                output = inbox.popleft()
                finished = output.finished
                yield from output.outputs
        finally:
            self._forget([request])

    def _tokenize(self, prompts: Prompt | Sequence[Prompt]) -> list[TokenizedPrompt]:
        batch = [prompts] if is_single_prompt(prompts) else list(prompts)
        tokenizer = self._running.tokenizer
        return [tokenize_prompt(prompt, tokenizer) for prompt in batch]  # type: ignore[arg-type]

    def _run(
        self,
        prompts: Sequence[TokenizedPrompt],
        per_prompt: Sequence[SamplingParams],
        use_tqdm: bool,
        priority: Sequence[int] | None,
        options: Sequence[dict[str, Any]] | None = None,
    ) -> list[RequestOutput]:
        """options: of Request, for each prompt."""
        if priority is not None:
            _check_list("priority", priority, "a list of integers")
            if len(priority) != len(prompts):
                raise ValueError(f"{len(priority)} priorities for {len(prompts)} prompts")
        self._check_open()
        requests = [
            self._request(
                prompt, params, priority[i] if priority else 0, **(options[i] if options else {})
            )
            for i, (prompt, params) in enumerate(zip(prompts, per_prompt, strict=True))
        ]
        try:
            return self._collect(requests, use_tqdm)
        finally:
            self._forget(requests)

    def _collect(self, requests: Sequence[Request], use_tqdm: bool) -> list[RequestOutput]:
        from tqdm.auto import tqdm

        waiting = deque(requests)
        inboxes = [self._inboxes.setdefault(r.request_id, deque()) for r in requests]
        self._feed(waiting)
        for request in waiting:  # those whose turn comes later
            self.engine.check(request)
        with tqdm(total=len(requests), disable=not use_tqdm, desc="Processed prompts") as bar:
            for inbox in inboxes:
                while not inbox:
                    self._step(bar)
                    self._feed(waiting)
            bar.update(len(requests) - bar.n)
        return [inbox.popleft() for inbox in inboxes]

    def _feed(self, waiting: deque[Request]) -> None:
        """Gives the engine as many requests as its queue takes."""
        while waiting and self.engine.has_room:
            self.engine.add_request(waiting.popleft())

    def _params_of_each(self, params: Params, count: int) -> list[SamplingParams]:
        kind = RequestOutputKind.FINAL_ONLY
        if params is None or isinstance(params, SamplingParams):
            return [self._params(params, kind)] * count
        _check_list("sampling_params", params, "SamplingParams or a list of them")
        if len(params) != count:
            raise ValueError(f"{len(params)} sampling_params for {count} prompts")
        return [self._params(each, kind) for each in params]

    def _pooling_of_each(
        self, params: PoolingParams | Sequence[PoolingParams] | None, count: int
    ) -> list[PoolingParams]:
        hidden_size = self._running.model_config.hidden_size
        if params is None or isinstance(params, PoolingParams):
            return [checked_pooling(params, hidden_size)] * count
        if not isinstance(params, Sequence) or len(params) != count:
            raise ValueError(f"give one PoolingParams for all, or one for each of {count} prompts")
        return [checked_pooling(each, hidden_size) for each in params]

    def _params(self, params: SamplingParams | None, kind: RequestOutputKind) -> SamplingParams:
        return params_of_kind(params, self._running.default_sampling, kind)

    def _request(
        self,
        prompt: TokenizedPrompt,
        params: SamplingParams,
        priority: int,
        **options: Any,
    ) -> Request:
        request_id = str(next(self._ids))
        return self._running.request(
            request_id,
            prompt,
            params,
            priority=priority,
            cache_salt=prompt.cache_salt,
            **options,
        )

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("this LLM was closed; make another one")

    def _step(self, bar: Any = None) -> None:
        """One step of the engine; each output goes to its request's inbox."""
        for output in self.engine.step():
            if output.request_id in self._inboxes:
                self._inboxes[output.request_id].append(output)
            if bar is not None and output.finished:
                bar.update()

    def _forget(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self.engine.abort(request.request_id)
            self._inboxes.pop(request.request_id, None)


def _searches_of_each(
    params: BeamSearchParams | Sequence[BeamSearchParams], count: int
) -> list[BeamSearchParams]:
    searches = [params] * count if isinstance(params, BeamSearchParams) else params
    if not isinstance(searches, Sequence) or len(searches) != count:
        raise ValueError(f"give one BeamSearchParams for all, or one for each of {count} prompts")
    return [checked_search(each) for each in searches]


def _check_list(name: str, value: Any, wanted: str) -> None:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"{name} must be {wanted}, got {type(value).__name__}")
