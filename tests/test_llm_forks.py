"""Several answers to one prompt, on a real step: each is what a request of its own would get."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxllm import LLM, SamplingParams
from jaxllm.outputs import CompletionOutput
from jaxllm.structured_outputs import StructuredOutputsParams

PROMPT = [7 * i % 300 + 10 for i in range(75)]  # four blocks and a part; more than a step's budget
DRAWN = SamplingParams(temperature=1, seed=3, max_tokens=20, ignore_eos=True)
OPTIONS: dict[str, dict[str, Any]] = {
    "drawn": {},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.5, "logit_bias": {9: 3.0}},
    "logprobs": {"logprobs": 3, "prompt_logprobs": 1},
    "stop strings": {"stop": ["a", "e"], "ignore_eos": False},
    "structured": {
        "structured_outputs": StructuredOutputsParams(regex="[a-z]{5,9}"), "ignore_eos": False,
    },
}  # fmt: skip
MODES: list[dict[str, Any]] = [
    {"overlap": False, "enable_prefix_caching": False},
    {"overlap": True},
    {"overlap": True, "max_steps_per_dispatch": 4, "kv_cache_memory_bytes": 24 * 8192},
]


@pytest.fixture(scope="module", params=MODES, ids=str)
def llm(
    request: pytest.FixtureRequest, tiny_llama_folder: Path, tiny_llm: dict[str, Any]
) -> Iterator[LLM]:
    with LLM(str(tiny_llama_folder), **{**tiny_llm, **request.param}) as llm:
        yield llm


def content(answer: CompletionOutput) -> tuple[Any, ...]:
    return answer.token_ids, answer.text, answer.finish_reason, answer.stop_reason


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("prompt_len", [64, 75])
def test_each_answer_is_that_of_its_seed_alone(llm: LLM, name: str, prompt_len: int) -> None:
    prompt, params = PROMPT[:prompt_len], dataclasses.replace(DRAWN, **OPTIONS[name])
    expected = [
        llm.generate(
            [prompt], dataclasses.replace(params, seed=3 + index), use_tqdm=False
        )[0].outputs[0]
        for index in range(5)
    ]  # fmt: skip
    llm.reset_prefix_cache()
    before = llm.engine.stats().num_computed_tokens
    [output] = llm.generate([prompt], dataclasses.replace(params, n=5), use_tqdm=False)
    assert [content(answer) for answer in output.outputs] == [content(one) for one in expected]
    if name == "logprobs":
        assert output.prompt_logprobs is not None
        assert len(output.prompt_logprobs) == prompt_len
    if name == "drawn":
        computed = llm.engine.stats().num_computed_tokens - before
        assert computed == prompt_len + 5 * (20 - 1)
    llm.engine.scheduler.pool.check_integrity([])
