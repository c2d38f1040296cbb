"""Speculation on a real step: whatever the drafts are, answers are those without them."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxllm import LLM, SamplingParams
from jaxllm.engine.sequence import Sequence
from jaxllm.engine.speculation import Speculator
from jaxllm.outputs import RequestOutput
from jaxllm.structured_outputs import StructuredOutputsParams

NUM_TOKENS = 40
PROMPTS = [[7 * i % 300 + 10 for i in range(n)] for n in (5, 33)] + [[11, 12, 13, 14] * 8]
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
DRAWN = SamplingParams(temperature=1.0, seed=3, max_tokens=NUM_TOKENS, ignore_eos=True)
CASES: dict[str, SamplingParams] = {
    "greedy": GREEDY,
    "drawn": dataclasses.replace(DRAWN, n=2),
    "filters": dataclasses.replace(DRAWN, top_p=0.9, top_k=40, min_p=0.02),
    "penalties": dataclasses.replace(
        DRAWN, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.4
    ),
    "greedy with penalties": dataclasses.replace(GREEDY, repetition_penalty=1.2),
    "bias": dataclasses.replace(DRAWN, logit_bias={9: 3.0}, banned_token_ids=[20, 30]),
    "min_tokens": dataclasses.replace(
        DRAWN, min_tokens=20, stop_token_ids=list(range(100, 200)), ignore_eos=False
    ),
    "stop strings": dataclasses.replace(DRAWN, stop=["a", "e", "o"]),
    "JSON": dataclasses.replace(
        DRAWN,
        structured_outputs=StructuredOutputsParams(
            json={"type": "array", "items": {"type": "string", "minLength": 3}, "minItems": 9}
        ),
    ),
    "a form with text that is forced, greedy": dataclasses.replace(
        GREEDY, structured_outputs=StructuredOutputsParams(regex="([a-f]{3} the dog (yes|no) ){9}")
    ),
    "a form and penalties": dataclasses.replace(
        DRAWN,
        n=2,
        presence_penalty=0.7,
        structured_outputs=StructuredOutputsParams(regex="([a-f]{3} the dog )+[0-9]"),
    ),
}
NO_DRAFTS: dict[str, SamplingParams] = {
    "logprobs": dataclasses.replace(GREEDY, logprobs=2),
    "prompt_logprobs": dataclasses.replace(GREEDY, prompt_logprobs=1),
    "best_of": dataclasses.replace(DRAWN, best_of=2),
}
MODES: list[dict[str, Any]] = [
    {"overlap": False},
    {"overlap": True, "max_steps_per_dispatch": 4, "num_speculative_tokens": 3},
]


class OftenRight:
    """Guesses what a request is known to answer, with mistakes."""

    def __init__(self, expected: dict[tuple[tuple[int, ...], int], list[int]]) -> None:
        self.expected = expected
        self.random = random.Random(0)

    def propose(self, sequences: list[Sequence], count: int) -> list[list[int]]:
        return [self.guess(sequence, count) for sequence in sequences]

    def guess(self, sequence: Sequence, count: int) -> list[int]:
        prompt = tuple(sequence.token_ids[: sequence.num_prompt_tokens])
        answer = self.expected.get((prompt, sequence.index), [])
        following = answer[len(sequence.output_token_ids) :][:count]
        return [t if self.random.random() < 0.8 else self.random.randrange(300) for t in following]


@pytest.fixture(scope="module")
def plain(tiny_llama_folder: Path, tiny_llm: dict[str, Any]) -> Iterator[LLM]:
    with LLM(str(tiny_llama_folder), **tiny_llm) as llm:
        yield llm


@pytest.fixture(scope="module", params=MODES, ids=str)
def speculating(
    request: pytest.FixtureRequest, tiny_llama_folder: Path, tiny_llm: dict[str, Any]
) -> Iterator[LLM]:
    options = {**tiny_llm, "speculative": "ngram", **request.param}
    with LLM(str(tiny_llama_folder), **options) as llm:
        yield llm


def answers(llm: LLM, params: SamplingParams) -> list[RequestOutput]:
    return llm.generate(PROMPTS, params, use_tqdm=False)


def contents(outputs: list[RequestOutput]) -> list[tuple[Any, ...]]:
    return [
        (answer.token_ids, answer.text, answer.finish_reason, answer.stop_reason)
        for output in outputs
        for answer in output.outputs
    ]


@pytest.mark.parametrize("name", CASES)
def test_answers_are_those_without_speculation(plain: LLM, speculating: LLM, name: str) -> None:
    """The last prompt alone too: by itself a sequence has more drafts than among others."""
    expected = answers(plain, CASES[name])
    proposer = OftenRight(
        {
            (tuple(output.prompt_token_ids), answer.index): answer.token_ids
            for output in expected
            for answer in output.outputs
        }
    )
    most = speculating.engine.config.num_speculative_tokens
    speculator = speculating.engine.speculator = Speculator(proposer, most, row_cost=0.001)
    got = answers(speculating, CASES[name])
    assert contents(got) == contents(expected)
    alone = speculating.generate([PROMPTS[-1]], CASES[name], use_tqdm=False)
    assert contents(alone) == contents(expected[-1:])
    stats = speculator.stats()
    assert stats.num_accepted_tokens > 0
    is_wrong = stats.num_draft_tokens > stats.num_accepted_tokens
    assert is_wrong or CASES[name].structured_outputs  # which excludes most wrong guesses
    of_requests = [output.metrics for output in got + alone]
    assert sum(m.num_accepted_tokens for m in of_requests if m) == stats.num_accepted_tokens
    speculating.engine.scheduler.pool.check_integrity([])


@pytest.mark.parametrize("name", NO_DRAFTS)
def test_what_needs_every_step_has_no_drafts(plain: LLM, speculating: LLM, name: str) -> None:
    expected = answers(plain, NO_DRAFTS[name])
    proposer = OftenRight(
        {(tuple(o.prompt_token_ids), 0): o.outputs[0].token_ids for o in expected}
    )
    speculator = speculating.engine.speculator = Speculator(proposer, 3, row_cost=0.001)
    assert contents(answers(speculating, NO_DRAFTS[name])) == contents(expected)
    assert speculator.stats().num_drafts == 0


def test_streams_come_in_pieces_of_several_tokens(plain: LLM, speculating: LLM) -> None:
    prompt = PROMPTS[0]
    [expected] = plain.generate([prompt], GREEDY, use_tqdm=False)
    answer = expected.outputs[0].token_ids
    proposer = OftenRight({(tuple(prompt), 0): answer})
    speculating.engine.speculator = Speculator(proposer, 3, row_cost=0.001)
    pieces = [piece.token_ids for piece in speculating.stream(prompt, GREEDY)]
    assert [token for piece in pieces for token in piece] == answer
    assert max(len(piece) for piece in pieces) > 1


def test_an_answer_that_repeats_itself_takes_fewer_steps(
    plain: LLM, tiny_llama_folder: Path, tiny_llm: dict[str, Any]
) -> None:
    """With one slot, whose drafts have rows all the same."""
    params = dataclasses.replace(GREEDY, logit_bias={50: 100.0}, max_tokens=100)
    options = {**tiny_llm, "max_num_seqs": 1, "max_num_batched_tokens": 32}
    [expected] = plain.generate([PROMPTS[0]], params, use_tqdm=False)
    with LLM(str(tiny_llama_folder), **options, speculative="ngram") as llm:
        [output] = llm.generate([PROMPTS[0]], params, use_tqdm=False)
        assert output.outputs[0].token_ids == expected.outputs[0].token_ids
        assert llm.engine.meter.num_steps < 30


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speculative": "medusa"}, "speculative must be one of ngram, or None, got 'medusa'"),
        ({"speculative": 3}, "speculative must be one of ngram"),
        ({"speculative": "draft:small"}, "from a smaller model are not supported yet; use 'ngram'"),
        ({"num_speculative_tokens": 3}, "has no effect without speculation; set speculative="),
        ({"speculative": "ngram", "num_speculative_tokens": 0}, "must be a positive integer"),
        ({"speculative": "ngram", "num_speculative_tokens": True}, "must be a positive integer"),
        ({"speculative": "ngram", "num_speculative_tokens": 32}, "must be at most 31, got 32"),
        (
            {"speculative": "ngram", "max_num_seqs": 1, "max_num_batched_tokens": 7},
            "must be more than num_speculative_tokens",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(
    tiny_llama_folder: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        LLM(str(tiny_llama_folder), **options)
