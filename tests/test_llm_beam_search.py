"""Beam search through LLM against transformers' generate(num_beams=...), in float32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch_reference import TorchModel

from jaxllm import LLM, BeamSearchParams, SamplingParams
from jaxllm.outputs import RequestOutput

EOS = 1
NEAR = 2e-4  # scores that two float32 engines may order differently
PROMPTS = [[40, 41, 42, 40, 41, 43], [7 * i % 300 + 10 for i in range(33)], [200]]


@pytest.fixture(scope="module")
def llm(tiny_llama_folder: Path, tiny_llm: dict[str, Any]) -> Iterator[LLM]:
    with LLM(str(tiny_llama_folder), **{**tiny_llm, "max_num_seqs": 16}) as llm:
        yield llm
        pool = llm.engine.scheduler.pool
        pool.check_integrity([])
        assert pool.num_free_blocks == pool.num_blocks


@pytest.fixture(scope="module")
def reference(tiny_llama_folder: Path) -> TorchModel:
    return TorchModel.from_folder(tiny_llama_folder)


def check(output: RequestOutput, expected: list[tuple[list[int], float]], penalty: float) -> None:
    """The same answers with the same scores; those whose scores are nearly equal in any order."""
    found = [
        (answer.token_ids, (answer.cumulative_logprob or 0.0) / len(answer.token_ids) ** penalty)
        for answer in output.outputs
    ]
    assert len(found) == len(expected)
    np.testing.assert_allclose(
        [score for _, score in found], [score for _, score in expected], rtol=2e-4, atol=NEAR
    )
    for tokens, score in found:
        near = [other for other, value in expected if abs(value - score) < NEAR * (1 + abs(score))]
        assert tokens in near


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0, 2.0])
def test_the_answers_are_those_of_transformers(
    llm: LLM, reference: TorchModel, length_penalty: float, early_stopping: bool | str
) -> None:
    params = [
        BeamSearchParams(
            beam_width=width,
            max_tokens=num_tokens,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            stop_token_ids=stops,
        )
        for width, num_tokens, stops in ((4, 20, []), (7, 12, [300, 17, 90]), (2, 9, []))
    ]
    outputs = llm.beam_search(PROMPTS, params, use_tqdm=False)
    for prompt, search, output in zip(PROMPTS, params, outputs, strict=True):
        assert search.max_tokens is not None
        expected = reference.beam_search(
            prompt,
            search.max_tokens,
            [EOS, *(search.stop_token_ids or ())],
            num_beams=search.beam_width,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
        )
        check(output, expected, length_penalty)


def test_a_wide_search_and_one_without_an_end(llm: LLM, reference: TorchModel) -> None:
    params = BeamSearchParams(beam_width=16, max_tokens=25, ignore_eos=True)
    [output] = llm.beam_search([PROMPTS[1]], params, use_tqdm=False)
    check(output, reference.beam_search(PROMPTS[1], 25, [], num_beams=16), 1.0)


def test_beams_beside_sampling_and_the_best_few(llm: LLM) -> None:
    """What else is in the batch changes nothing; n cuts off."""
    params = BeamSearchParams(beam_width=5, n=2, max_tokens=15)
    sampled = SamplingParams(n=3, seed=4, max_tokens=15, ignore_eos=True, temperature=0.8)
    [alone] = llm.beam_search([PROMPTS[0]], params, use_tqdm=False)
    [drawn] = llm.generate([PROMPTS[1]], sampled, use_tqdm=False)
    running = llm._running
    for name, prompt, sampling, search in (
        ("beams", PROMPTS[0], params.sampling_params(), params),
        ("drawn", PROMPTS[1], sampled, None),
    ):
        tokenized = llm._tokenize([prompt])[0]
        llm.engine.add_request(running.request(name, tokenized, sampling, beam_search=search))
    found = {}
    while llm.engine.has_unfinished_requests():
        found.update({output.request_id: output for output in llm.engine.step()})
    assert [a.token_ids for a in found["beams"].outputs] == [a.token_ids for a in alone.outputs]
    assert [a.token_ids for a in found["drawn"].outputs] == [a.token_ids for a in drawn.outputs]
    assert len(alone.outputs) == 2


def test_temperature_flattens_the_log_probabilities(llm: LLM, reference: TorchModel) -> None:
    params = BeamSearchParams(beam_width=3, max_tokens=1, temperature=1.7, ignore_eos=True)
    [output] = llm.beam_search([PROMPTS[0]], params, use_tqdm=False)
    logits = reference.logits(PROMPTS[0])[-1] / 1.7
    logprobs = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
    best = np.argsort(-logprobs)[:3]
    assert [answer.token_ids for answer in output.outputs] == [[i] for i in best]
    for answer, token_id in zip(output.outputs, best, strict=True):
        assert answer.cumulative_logprob == pytest.approx(float(logprobs[token_id]), abs=1e-4)


def test_the_best_of_several_answers(llm: LLM) -> None:
    every = SamplingParams(n=6, seed=9, max_tokens=12, temperature=1, logprobs=0)
    best = SamplingParams(n=2, best_of=6, seed=9, max_tokens=12, temperature=1)
    [all_answers] = llm.generate([PROMPTS[0]], every, use_tqdm=False)
    [output] = llm.generate([PROMPTS[0]], best, use_tqdm=False)
    ranked = sorted(all_answers.outputs, key=lambda answer: -(answer.cumulative_logprob or 0))
    assert [answer.token_ids for answer in output.outputs] == [a.token_ids for a in ranked[:2]]
    assert [answer.index for answer in output.outputs] == [0, 1]
    for answer, expected in zip(output.outputs, ranked, strict=False):
        assert answer.logprobs is None
        assert answer.cumulative_logprob == pytest.approx(expected.cumulative_logprob, abs=1e-4)
