"""Overlap and several tokens a dispatch, on a real step: the same tokens in every mode."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch_reference import TorchModel, assert_greedy

from jaxllm import LLM, SamplingParams
from jaxllm.outputs import CompletionOutput, RequestOutput
from jaxllm.structured_outputs import StructuredOutputsParams

SMALL_POOL = 24 * 8192  # bytes: 24 blocks of 16 tokens, so that sequences are preempted
MODES = [
    {"overlap": True, "max_steps_per_dispatch": 1},
    {"overlap": False, "max_steps_per_dispatch": 4},
    {"overlap": True, "max_steps_per_dispatch": 4},
]
OPTIONS: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 0, "ignore_eos": True},
    {"temperature": 1.0, "seed": 3, "ignore_eos": True},
    {"temperature": 0.8, "seed": 4, "top_k": 9, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 1.0, "seed": 5, "stop_token_ids": list(range(5, 60)), "min_tokens": 7},
    {"temperature": 1.0, "seed": 6, "stop_token_ids": list(range(60, 67)), "min_tokens": 3},
    {"temperature": 0.9, "seed": 7, "repetition_penalty": 1.4, "frequency_penalty": 0.5},
    {"temperature": 0.9, "seed": 8, "presence_penalty": 1.0, "logit_bias": {7: 4.0, 1: 3.0}},
)
HOST_BOUND: tuple[dict[str, Any], ...] = (
    {"temperature": 1.0, "seed": 9, "stop": ["a", "e"]},
    {"temperature": 1.0, "seed": 10, "logprobs": 2, "ignore_eos": True},
    {"temperature": 0, "structured_outputs": StructuredOutputsParams(regex="[a-z]{5,9}")},
)


@pytest.fixture(scope="module")
def serial(tiny_llama_folder: Path, tiny_llm: dict[str, Any]) -> Iterator[LLM]:
    with LLM(str(tiny_llama_folder), **tiny_llm, overlap=False, max_steps_per_dispatch=1) as llm:
        yield llm


@pytest.fixture(scope="module", params=MODES, ids=str)
def llm(
    request: pytest.FixtureRequest, tiny_llama_folder: Path, tiny_llm: dict[str, Any]
) -> Iterator[LLM]:
    options = {**tiny_llm, "kv_cache_memory_bytes": SMALL_POOL, **request.param}
    with LLM(str(tiny_llama_folder), **options) as llm:
        yield llm
        while llm.engine.has_unfinished_requests():  # what is still under way
            llm.engine.step()
        pool = llm.engine.scheduler.pool
        pool.check_integrity([])
        assert pool.num_free_blocks == pool.num_blocks


def load(options: tuple[dict[str, Any], ...], count: int) -> tuple[list[Any], list[SamplingParams]]:
    random = np.random.default_rng(0)
    prompts = [random.integers(5, 320, random.integers(1, 40)).tolist() for _ in range(count)]
    lens = random.integers(1, 60, count).tolist()
    params = [
        SamplingParams(**{"max_tokens": max(7, lens[n]), **options[n % len(options)]})
        for n in range(count)
    ]
    return prompts, params


def answers(outputs: list[RequestOutput]) -> list[tuple[Any, ...]]:
    def answer(completion: CompletionOutput) -> tuple[Any, ...]:
        return (
            completion.token_ids, completion.text, completion.finish_reason, completion.stop_reason,
        )  # fmt: skip

    return [answer(completion) for output in outputs for completion in output.outputs]


@pytest.mark.parametrize("options", [OPTIONS, OPTIONS + HOST_BOUND], ids=["alone", "with host"])
def test_the_tokens_are_those_of_one_step_after_the_other(
    llm: LLM, serial: LLM, options: tuple[dict[str, Any], ...]
) -> None:
    prompts, params = load(options, 33)
    expected = answers(serial.generate(prompts, params, use_tqdm=False))
    assert answers(llm.generate(prompts, params, use_tqdm=False)) == expected
    llm.reset_prefix_cache()
    again = llm.generate(prompts, params, use_tqdm=False)
    assert answers(again) == expected
    assert llm.engine.stats().num_preemptions > 0


def test_what_an_answer_left_in_the_cache_is_right(llm: LLM, serial: LLM) -> None:
    """Also where a row of a dispatch ended before the others did."""
    prompts, params = load(OPTIONS, 8)
    llm.reset_prefix_cache()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    turns = [
        [*prompt, *output.outputs[0].token_ids, 7]
        for prompt, output in zip(prompts, outputs, strict=True)
    ]
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    found = llm.generate(turns, greedy, use_tqdm=False)
    assert sum(output.num_cached_tokens for output in found) > 100
    serial.reset_prefix_cache()
    assert answers(found) == answers(serial.generate(turns, greedy, use_tqdm=False))


def test_greedy_tokens_are_those_of_transformers(llm: LLM, tiny_llama_folder: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    prompts, _ = load(OPTIONS, 6)
    model = TorchModel.from_folder(tiny_llama_folder)
    for prompt, output in zip(prompts, llm.generate(prompts, params, use_tqdm=False), strict=True):
        expected = model.greedy(prompt, 24)
        assert_greedy(model, prompt, output.outputs[0].token_ids, expected)


def test_several_tokens_come_a_dispatch_where_nothing_waits(llm: LLM) -> None:
    before = llm.engine.stats().num_steps
    params = SamplingParams(temperature=0, max_tokens=25, ignore_eos=True)
    llm.generate([[5, 6, 7], [8, 9]], params, use_tqdm=False)
    num_steps = llm.engine.stats().num_steps - before
    most = llm.engine.config.max_steps_per_dispatch
    assert num_steps == 25 if most == 1 else num_steps <= 2 + 24 // most


def test_a_profile_shows_the_steps(tiny_llama_folder: Path, tmp_path: Path) -> None:
    command = [
        "generate", str(tiny_llama_folder), "--prompt", "a", "--max-tokens", "9", "--profile",
        str(tmp_path / "trace"),
    ]  # fmt: skip
    # JAX cannot record in a process that described TPUs, as other tests do here.
    program = f"from jaxllm.cli import main; main({command!r})"
    subprocess.run([sys.executable, "-c", program], timeout=120, check=True)
    events = json.loads((tmp_path / "trace" / "timeline.json").read_text())["traceEvents"]
    names = {event["name"] for event in events if event["ph"] == "X"}
    assert names == {"schedule", "pack", "dispatch", "device", "wait", "postprocess"}
    assert list((tmp_path / "trace").rglob("*.xplane.pb")), "and JAX's own profile"
