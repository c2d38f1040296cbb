"""Embeddings of LLM and AsyncEngine against transformers' last hidden state on torch."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch_reference import TorchModel

from jaxllm import LLM, AsyncEngine, PoolingParams, SamplingParams
from jaxllm.engine.request import Request
from jaxllm.outputs import RequestFailedError

HIDDEN_SIZE = 64
LIMITS = {"max_model_len": 128, "max_num_seqs": 4, "max_num_batched_tokens": 32}
PROMPT_LENS = (1, 2, 15, 16, 17, 31, 33, 65, 128)  # of blocks, chunks, and the whole context
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
RAW = {pooling: PoolingParams(pooling=pooling, normalize=False) for pooling in ("mean", "last")}


@pytest.fixture(scope="module")
def reference(tiny_llama_folder: Path) -> TorchModel:
    return TorchModel.from_folder(tiny_llama_folder)


@pytest.fixture(scope="module")
def llm(tiny_llama_folder: Path, tiny_llm: dict[str, Any]) -> Iterator[LLM]:
    with LLM(str(tiny_llama_folder), **{**tiny_llm, **LIMITS}) as llm:
        yield llm


def random_prompts(*lens: int, seed: int = 0) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(2, 320, length).tolist() for length in lens]


def expected(reference: TorchModel, prompt: list[int], params: PoolingParams) -> np.ndarray:
    """[E] by transformers, in float64 from its hidden states [T, E]."""
    with torch.no_grad():
        states = reference.module.model(torch.tensor([prompt])).last_hidden_state[0]
    hidden = states.double().numpy()
    pooled = hidden.mean(axis=0) if params.pooling == "mean" else hidden[-1]
    pooled = pooled[: params.dimensions]
    if params.normalize:
        pooled = pooled / np.sqrt((pooled**2).sum())
    result: np.ndarray = pooled
    return result


def check(reference: TorchModel, prompt: list[int], params: PoolingParams, actual: Any) -> None:
    assert actual.prompt_token_ids == prompt
    assert actual.finished
    embedding = actual.outputs.embedding
    assert embedding.dtype == np.float32
    np.testing.assert_allclose(embedding, expected(reference, prompt, params), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_every_length_alone(reference: TorchModel, llm: LLM, pooling: str) -> None:
    for prompt in random_prompts(*PROMPT_LENS):
        (output,) = llm.embed(prompt, RAW[pooling], use_tqdm=False)
        check(reference, prompt, RAW[pooling], output)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_many_prompts_at_once(reference: TorchModel, llm: LLM, pooling: str) -> None:
    prompts = random_prompts(*PROMPT_LENS, *PROMPT_LENS, seed=1)
    outputs = llm.embed(prompts, RAW[pooling], use_tqdm=False)
    assert llm.engine.stats().num_running == 0
    for prompt, output in zip(prompts, outputs, strict=True):
        check(reference, prompt, RAW[pooling], output)


def test_a_prompt_seen_before_gives_the_same(reference: TorchModel, llm: LLM) -> None:
    (prompt,) = random_prompts(100, seed=2)
    llm.generate(prompt, GREEDY, use_tqdm=False)
    for pooling, num_cached_tokens in (("mean", 0), ("last", 96)):
        (output,) = llm.embed(prompt, RAW[pooling], use_tqdm=False)
        check(reference, prompt, RAW[pooling], output)
        assert output.num_cached_tokens == num_cached_tokens


def test_batched_with_generation(
    reference: TorchModel, tiny_llama_folder: Path, tiny_llm: dict[str, Any]
) -> None:
    async def all_at_once(engine: AsyncEngine) -> list[Any]:
        async def generate(prompt: list[int]) -> list[int]:
            async for output in engine.generate(prompt, GREEDY):
                tokens = output.outputs[0].token_ids
            return tokens

        generating = [generate(prompt) for prompt in texts]
        embedding = [
            engine.embed(prompt, RAW[pooling])
            for prompt, pooling in zip(prompts, ("mean", "last") * 3, strict=True)
        ]
        return await asyncio.gather(*generating, *embedding)

    texts = random_prompts(5, 40, seed=3)
    prompts = random_prompts(1, 9, 33, 64, 100, 128, seed=4)
    with LLM(str(tiny_llama_folder), **{**tiny_llm, **LIMITS}) as llm:
        wanted = [llm.generate(text, GREEDY, use_tqdm=False)[0].outputs[0] for text in texts]
    engine = AsyncEngine(str(tiny_llama_folder), **{**tiny_llm, **LIMITS})
    try:
        results = asyncio.run(all_at_once(engine))
    finally:
        engine.close()
    assert results[:2] == [answer.token_ids for answer in wanted]
    for prompt, pooling, output in zip(prompts, ("mean", "last") * 3, results[2:], strict=True):
        check(reference, prompt, RAW[pooling], output)


def test_preempted_embeddings_begin_anew(reference: TorchModel, llm: LLM) -> None:
    engine, pool = llm.engine, llm.engine.scheduler.pool
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    *old, prompt = random_prompts(8, 8, 8, 120, seed=5)
    for number, tokens in enumerate(old):
        engine.add_request(Request(f"old-{number}", tokens, params))
    for _ in range(6):  # soon each needs its second block
        engine.step()
    # Enough for the prompt and the spare block, so that it is admitted and then runs out.
    held = pool.allocate(pool.num_free_blocks - 9)
    (output,) = llm.embed(prompt, RAW["mean"], use_tqdm=False)
    pool.free(held)
    assert output.metrics is not None
    assert output.metrics.num_preemptions > 0
    check(reference, prompt, RAW["mean"], output)
    while engine.has_unfinished_requests():
        engine.step()
    pool.check_integrity([])


@pytest.mark.parametrize("dimensions", [None, 1, 10, HIDDEN_SIZE])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_dimensions_and_norm(
    reference: TorchModel, llm: LLM, dimensions: int | None, pooling: str
) -> None:
    (prompt,) = random_prompts(40, seed=6)
    for normalize in (True, False):
        params = PoolingParams(pooling=pooling, normalize=normalize, dimensions=dimensions)
        (output,) = llm.embed(prompt, params, use_tqdm=False)
        assert output.outputs.hidden_size == dimensions or HIDDEN_SIZE
        check(reference, prompt, params, output)


def test_text_is_tokenized_and_the_default_is_the_normalized_mean(
    reference: TorchModel, llm: LLM
) -> None:
    text = "The quick brown fox"
    (output,) = llm.embed(text, use_tqdm=False)
    assert output.prompt == text
    check(reference, llm.get_tokenizer().encode(text), PoolingParams(), output)


def test_params_of_each_prompt(reference: TorchModel, llm: LLM) -> None:
    prompts = random_prompts(7, 8, seed=7)
    params = [PoolingParams(), PoolingParams(pooling="last", dimensions=5)]
    for prompt, each, output in zip(
        prompts, params, llm.embed(prompts, params, use_tqdm=False), strict=True
    ):
        check(reference, prompt, each, output)


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([1] * 129, None, "the prompt has 129 tokens, and there is room for 128"),
        ([1], PoolingParams(dimensions=65), "dimensions must be between 1 and 64"),
        ([1], SamplingParams(), "one PoolingParams for all"),
        ([1], [PoolingParams()] * 2, "one PoolingParams for all, or one for each of 1"),
        ([1], ["mean"], "pooling_params must be PoolingParams, got str"),
    ],
)
def test_what_cannot_be_served_is_refused(
    llm: LLM, prompt: list[int], params: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        llm.embed(prompt, params, use_tqdm=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "cls"}, "pooling must be one of mean, last, got 'cls'"),
        ({"normalize": 1}, "normalize must be True or False, got 1"),
        ({"dimensions": 0}, "dimensions must be a positive integer, got 0"),
        ({"dimensions": True}, "dimensions must be a positive integer, got True"),
        ({"dimensions": 2.0}, "dimensions must be a positive integer, got 2.0"),
    ],
)
def test_bad_params_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PoolingParams(**options)


def test_a_failed_step_raises_and_the_next_succeeds(
    reference: TorchModel, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(batch: Any) -> Any:
        raise RuntimeError("the device is on fire")

    (prompt,) = random_prompts(12, seed=8)
    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.runner, "execute", fail)
        with pytest.raises(RequestFailedError, match="ended by 'error'"):
            llm.embed(prompt, use_tqdm=False)
    (output,) = llm.embed(prompt, use_tqdm=False)
    check(reference, prompt, PoolingParams(), output)


def test_async_embed_is_cancelled_aborted_and_refused(
    tiny_llama_folder: Path, tiny_llm: dict[str, Any]
) -> None:
    prompt = random_prompts(128, seed=9)[0]

    async def scenario(engine: AsyncEngine) -> None:
        with pytest.raises(ValueError, match="dimensions must be between 1 and 64"):
            await engine.embed(prompt, PoolingParams(dimensions=65))
        with pytest.raises(ValueError, match="max_model_len is 128"):
            await engine.embed([*prompt, 1])
        busy = [asyncio.create_task(engine.embed(prompt)) for _ in range(4)]
        cancelled = asyncio.create_task(engine.embed(prompt))
        aborted = asyncio.create_task(engine.embed(prompt, request_id="mine"))
        await asyncio.sleep(0)
        cancelled.cancel()
        await engine.abort("mine")
        with pytest.raises(RequestFailedError, match="'abort'"):
            await aborted
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        first = (await asyncio.gather(*busy))[0]
        assert np.linalg.norm(first.outputs.embedding) == pytest.approx(1, abs=1e-5)
        while (stats := await engine.stats()).num_running + stats.num_waiting:
            await asyncio.sleep(0.01)
        assert stats.kv_usage == 0

    engine = AsyncEngine(str(tiny_llama_folder), **{**tiny_llm, **LIMITS})
    try:
        asyncio.run(asyncio.wait_for(scenario(engine), 60))
    finally:
        engine.close()
