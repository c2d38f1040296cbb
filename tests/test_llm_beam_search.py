"""Beam search through LLM against transformers' generate(num_beams=...), in float32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from masks import allowed
from torch_reference import TorchModel, assert_beams, log_softmax

from jaxllm import LLM, BeamSearchParams, SamplingParams, StructuredOutputsParams
from jaxllm.outputs import CompletionOutput, RequestOutput

EOS = 1
PROMPTS = [[40, 41, 42, 40, 41, 43], [7 * i % 300 + 10 for i in range(33)], [200]]


@pytest.fixture(scope="module")
def llm(tiny_llama_folder: Path, tiny_llm: dict[str, Any]) -> Iterator[LLM]:
    with LLM(str(tiny_llama_folder), **tiny_llm) as llm:
        yield llm
        pool = llm.engine.scheduler.pool
        pool.check_integrity([])
        assert pool.num_free_blocks == pool.num_blocks


@pytest.fixture(scope="module")
def reference(tiny_llama_folder: Path) -> TorchModel:
    return TorchModel.from_folder(tiny_llama_folder)


def check(output: RequestOutput, expected: list[tuple[list[int], float]], penalty: float) -> None:
    found = [
        (answer.token_ids, (answer.cumulative_logprob or 0.0) / len(answer.token_ids) ** penalty)
        for answer in output.outputs
    ]
    assert_beams(found, expected)


def total_logprob(answer: CompletionOutput) -> float:
    chosen = zip(answer.token_ids, answer.logprobs or [], strict=True)
    return sum(found[token_id].logprob for token_id, found in chosen)


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
    params = BeamSearchParams(beam_width=8, max_tokens=25, ignore_eos=True)
    [output] = llm.beam_search([PROMPTS[1]], params, use_tqdm=False)
    check(output, reference.beam_search(PROMPTS[1], 25, [], num_beams=8), 1.0)


FORMS: list[tuple[dict[str, Any], int]] = [
    ({"json": {"type": "object", "properties": {"city": {"type": "string"}}}}, 14),
    ({"regex": "([a-f]{2}-){2}[0-9]{3}"}, 20),
    ({"choice": ["x", "yz", "no"]}, 12),  # fewer than there are beams
    ({"grammar": 'start: ("a" | "the" | " fox" | " quick")+ "."'}, 8),  # cut in the middle
]


@pytest.mark.parametrize("early_stopping", [False, "never"])
@pytest.mark.parametrize(("options", "num_tokens"), FORMS, ids=[str(form) for form, _ in FORMS])
def test_answers_of_a_form_are_those_of_transformers_with_the_same_tokens_excluded(
    llm: LLM,
    reference: TorchModel,
    options: dict[str, Any],
    num_tokens: int,
    early_stopping: bool | str,
) -> None:
    structured = StructuredOutputsParams(**options)
    start = llm._running.constraints.constraint(structured, None)

    def form(output: list[int]) -> tuple[np.ndarray, bool]:
        constraint = start.copy()
        for token_id in output:
            if constraint.is_complete or token_id == EOS:
                return np.ones(320, bool), True
            if not allowed(constraint.mask)[token_id]:  # which transformers keeps, at -infinity
                return np.ones(320, bool), False
            constraint.accept(token_id)
        return allowed(constraint.mask, 320), constraint.is_complete

    for prompt, width, penalty in ((PROMPTS[0], 4, 1.0), (PROMPTS[1], 7, 0.0)):
        search = BeamSearchParams(
            beam_width=width,
            max_tokens=num_tokens,
            length_penalty=penalty,
            early_stopping=early_stopping,
            structured_outputs=structured,
        )
        [output] = llm.beam_search([prompt], search, use_tqdm=False)
        expected = reference.beam_search(
            prompt, num_tokens, [EOS], form,
            num_beams=width, length_penalty=penalty, early_stopping=early_stopping,
        )  # fmt: skip
        check(output, expected, penalty)
        for answer in output.outputs:
            is_whole = form(answer.token_ids)[1]
            assert answer.finish_reason == ("stop" if is_whole else "length")
    if "choice" in options:
        assert {answer.text for answer in output.outputs} <= {*options["choice"]}
        assert 1 < len(output.outputs) < width


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


def test_log_probabilities_of_each_token(llm: LLM, reference: TorchModel) -> None:
    params = BeamSearchParams(beam_width=4, max_tokens=9, logprobs=3)
    [output] = llm.beam_search([PROMPTS[1]], params, use_tqdm=False)
    plain = BeamSearchParams(beam_width=4, max_tokens=9)
    [without] = llm.beam_search([PROMPTS[1]], plain, use_tqdm=False)
    assert [a.token_ids for a in output.outputs] == [a.token_ids for a in without.outputs]
    for answer in output.outputs:
        rows = log_softmax(reference.logits([*PROMPTS[1], *answer.token_ids]))
        assert answer.logprobs is not None
        assert len(answer.logprobs) == len(answer.token_ids)
        for row, token_id, found in zip(
            rows[len(PROMPTS[1]) - 1 :], answer.token_ids, answer.logprobs, strict=False
        ):
            order = np.argsort(-row)
            assert next(iter(found)) == token_id
            assert set(found) == {token_id, *order[:3].tolist()}
            for one, logprob in found.items():
                assert logprob.logprob == pytest.approx(row[one], abs=1e-4)
                assert order[logprob.rank - 1] == one
        assert answer.cumulative_logprob == pytest.approx(total_logprob(answer), abs=1e-4)


def test_log_probabilities_under_a_form_are_of_what_may_come(llm: LLM) -> None:
    form = StructuredOutputsParams(regex="[ab][cd]")
    params = BeamSearchParams(
        beam_width=4, max_tokens=3, logprobs=3, temperature=1.5, structured_outputs=form
    )
    [output] = llm.beam_search([PROMPTS[0]], params, use_tqdm=False)
    assert len(output.outputs) > 1
    for answer in output.outputs:
        assert answer.logprobs is not None
        first = sorted(answer.logprobs[0].values(), key=lambda one: one.rank)
        assert {one.decoded_token for one in first} == {"a", "b"}
        assert [one.rank for one in first] == [1, 2]
        assert answer.cumulative_logprob == pytest.approx(total_logprob(answer), abs=1e-4)


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
