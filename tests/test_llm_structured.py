"""Answers of a given form from a whole engine, against transformers with the same tokens masked."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from masks import allowed
from torch_reference import TorchModel

from jaxllm import LLM, SamplingParams, StructuredOutputsParams
from jaxllm.structured_outputs import FormError

CITY = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 10},
        "size": {"type": "integer", "minimum": 0, "maximum": 999},
    },
    "required": ["city", "size"],
    "additionalProperties": False,
}
PROMPT = [5, 90, 200, 17]


@pytest.fixture(scope="module")
def llm(tiny_llama_folder: Path, tiny_llm: dict[str, Any]) -> Iterator[LLM]:
    with LLM(str(tiny_llama_folder), **tiny_llm) as one:
        yield one


def params(
    max_tokens: int = 120, temperature: float = 0, n: int = 1, **form: Any
) -> SamplingParams:
    return SamplingParams(
        temperature=temperature,
        n=n,
        max_tokens=max_tokens,
        seed=3,
        structured_outputs=StructuredOutputsParams(**form),
    )


FORMS: list[dict[str, Any]] = [
    {"json": CITY}, {"regex": "([a-f]{3}-){2}[0-9]{4}"}, {"choice": ["the fox", "the dog", "no"]},
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_the_most_likely_of_the_allowed_tokens_as_transformers(
    llm: LLM, tiny_llama_folder: Path, form: dict[str, Any]
) -> None:
    constraint = llm._running.constraints.constraint(StructuredOutputsParams(**form), None)
    reference, expected = TorchModel.from_folder(tiny_llama_folder), list[int]()
    while len(expected) < 40 and not constraint.is_complete:
        logits = reference.logits([*PROMPT, *expected])[-1]
        is_allowed = allowed(constraint.mask, len(logits))
        expected.append(int(np.argmax(np.where(is_allowed, logits, -np.inf))))
        if expected[-1] == 1:  # the end of the answer
            break
        constraint.accept(expected[-1])
        for token_id in constraint.forced():
            expected.append(token_id)
            constraint.accept(token_id)
    [output] = llm.generate([PROMPT], params(40, **form), use_tqdm=False)
    assert output.outputs[0].token_ids == expected[:40]


def test_every_drawn_answer_has_its_form(llm: LLM) -> None:
    drawn = llm.generate([PROMPT], params(n=6, temperature=1.5, json=CITY), use_tqdm=False)
    texts = [answer.text for answer in drawn[0].outputs]
    assert {answer.finish_reason for answer in drawn[0].outputs} == {"stop"}
    for text in texts:
        jsonschema.validate(json.loads(text), CITY)
    assert len(set(texts)) > 1


def test_in_a_mixed_batch_each_is_as_alone(llm: LLM) -> None:
    free = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    several = [params(**FORMS[0]), free, params(**FORMS[1]), free, params(**FORMS[2])]
    prompts = [[*PROMPT, i] for i in range(5, 10)]
    alone = [
        llm.generate([prompt], one, use_tqdm=False)[0].outputs[0].token_ids
        for prompt, one in zip(prompts, several, strict=True)
    ]
    together = llm.generate(prompts, several, use_tqdm=False)
    assert [output.outputs[0].token_ids for output in together] == alone


def test_a_preempted_sequence_keeps_its_form(
    tiny_llama_folder: Path, tiny_llm: dict[str, Any]
) -> None:
    """Nine blocks for four sequences of up to six."""
    few = {"kv_cache_memory_bytes": 9 * 16 * 2 * 2 * 2 * 16 * 4, "max_model_len": 96}
    form = {"regex": "[a-z]{70}"}
    with LLM(str(tiny_llama_folder), **{**tiny_llm, **few}) as llm:
        [alone] = llm.generate([PROMPT], params(**form), use_tqdm=False)
        outputs = llm.generate([PROMPT] * 4, params(**form), use_tqdm=False)
        assert llm.engine.stats().num_preemptions > 0
    assert re.fullmatch(form["regex"], alone.outputs[0].text)
    assert {output.outputs[0].text for output in outputs} == {alone.outputs[0].text}


def test_penalties_and_logprobs_go_with_a_form(llm: LLM) -> None:
    one = SamplingParams(
        temperature=0,
        max_tokens=20,
        repetition_penalty=1.3,
        logit_bias={77: 5.0},
        logprobs=2,
        structured_outputs=StructuredOutputsParams(choice=["the dog"]),
    )
    [answer] = llm.generate([PROMPT], one, use_tqdm=False)[0].outputs
    assert answer.text == "the dog"
    assert answer.logprobs is not None
    assert len(answer.logprobs) == len(answer.token_ids)


def test_tokens_that_the_form_forces_take_no_step_of_their_own(llm: LLM) -> None:
    form = {"regex": "0123456789abcdefghij[kl]"}
    steps = llm._running.runner.stats
    before = steps.num_steps
    [answer] = llm.generate([PROMPT], params(60, **form), use_tqdm=False)[0].outputs
    assert re.fullmatch(form["regex"], answer.text)
    assert steps.num_steps - before <= 4 < len(answer.token_ids)
    ended = llm.generate([PROMPT], params(5, **form), use_tqdm=False)[0].outputs[0]
    assert (ended.finish_reason, ended.token_ids) == ("length", answer.token_ids[:5])
    # Where log-probabilities are wanted, each token has its own.
    wanting = dataclasses.replace(params(60, **form), logprobs=0)
    [slow] = llm.generate([PROMPT], wanting, use_tqdm=False)[0].outputs
    assert slow.logprobs is not None
    assert len(slow.logprobs) == len(slow.token_ids)
    assert re.fullmatch(form["regex"], slow.text)


def test_max_tokens_may_end_it_in_the_middle(llm: LLM) -> None:
    [answer] = llm.generate([PROMPT], params(2, json=CITY), use_tqdm=False)[0].outputs
    assert (answer.finish_reason, len(answer.token_ids)) == ("length", 2)


def test_a_form_that_cannot_be_harms_nobody(llm: LLM) -> None:
    with pytest.raises(FormError, match=r"structured_outputs: .*invalid regex"):
        llm.generate([PROMPT], params(regex="("), use_tqdm=False)
    # This one is found out on the way: the automaton grows too large.
    growing = params(regex="(a?){1000}a{1000}")
    bad, good = llm.generate([PROMPT, PROMPT], [growing, params(choice=["ok"])], use_tqdm=False)
    assert bad.outputs[0].finish_reason == "error"
    assert (good.outputs[0].text, good.outputs[0].finish_reason) == ("ok", "stop")


def test_the_next_sequence_in_the_slot_is_free_again(llm: LLM) -> None:
    free = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    before = llm.generate([PROMPT], free, use_tqdm=False)[0].outputs[0].token_ids
    llm.generate([PROMPT], params(choice=["no"]), use_tqdm=False)
    assert llm.generate([PROMPT], free, use_tqdm=False)[0].outputs[0].token_ids == before
