"""All options crossed at random, in an engine with a small pool, overlap and speculation: every
answer is that of its request alone, and what cannot be combined is refused by name."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_llm_speculation import OftenRight

from jaxllm import LLM, BeamSearchParams, SamplingParams
from jaxllm.engine.engine import Engine, Request
from jaxllm.engine.speculation import PromptLookup, Speculator
from jaxllm.outputs import RequestOutput, TokenLogprobs
from jaxllm.request_error import RequestError
from jaxllm.sampling_params import RequestOutputKind

NUM_BLOCKS, MAX_MODEL_LEN = 11, 96  # a search wants up to 10, two answers 8
PROMPTS = [[7 * i % 300 + 10 for i in range(n)] for n in (4, 20)] + [[11, 12, 13, 14] * 8]
FORMS: list[dict[str, Any]] = [
    {"json": {"type": "array", "items": {"type": "string", "minLength": 2}, "minItems": 3}},
    {"regex": "([a-f]{2} the dog (yes|no) )+"},
    {"choice": ["red", "green", "blue"]},
]
VALUES: dict[str, list[Any]] = {
    "n": [2, 3], "best_of": [3], "temperature": [0, 0.7], "top_k": [5, 40], "top_p": [0.8],
    "presence_penalty": [0.6], "repetition_penalty": [1.2], "logit_bias": [{9: 3.0}],
    "banned_token_ids": [[20, 70, 77]], "min_tokens": [6], "stop": [["a", "e"]],
    "stop_token_ids": [[100, 101, 102]], "ignore_eos": [True], "logprobs": [0, 2],
    "prompt_logprobs": [1], "length_penalty": [0.0, 2.0], "early_stopping": [True, "never"],
}  # fmt: skip
OF_A_SEARCH = {"length_penalty", "early_stopping"}
OF_BOTH = {"n", "temperature", "logprobs", "stop_token_ids", "ignore_eos", "structured_outputs"}
Params = SamplingParams | BeamSearchParams


@st.composite
def requests(draw: st.DrawFn) -> tuple[list[int], bool, dict[str, Any]]:
    """A prompt, whether its answers are searched for, and options that may not go together."""
    is_search = draw(st.integers(0, 3)) == 0
    foreign = is_search and draw(st.integers(0, 3)) == 0  # also what a search has no use for
    known = OF_A_SEARCH | OF_BOTH if is_search else VALUES.keys() - OF_A_SEARCH
    known = VALUES.keys() if foreign else known
    names = draw(st.sets(st.sampled_from(sorted(known)), max_size=3))
    options = {
        name: draw(st.sampled_from(VALUES[name])) for name in sorted(names) if name in VALUES
    }
    if draw(st.booleans()):
        options["structured_outputs"] = draw(st.sampled_from(FORMS))
    options["max_tokens"] = draw(st.sampled_from([3, 16, 28]))
    return draw(st.sampled_from(PROMPTS)), is_search, options


def conflicts(is_search: bool, options: dict[str, Any]) -> list[tuple[str, str]]:
    """What cannot be combined, by the names that the message must have."""
    if is_search:
        known = OF_A_SEARCH | OF_BOTH | {"max_tokens"}
        return [("beam search", name) for name in options.keys() - known]
    pairs = []
    if "structured_outputs" in options:
        bans = {"min_tokens", "banned_token_ids"} & options.keys()
        pairs += [("structured_outputs", name) for name in bans]
    if options.get("temperature") == 0:
        pairs += [("temperature", name) for name in ("n", "best_of") if name in options]
    if options.get("min_tokens", 0) > options["max_tokens"]:
        pairs.append(("min_tokens", "max_tokens"))
    return pairs


def params_of(is_search: bool, options: dict[str, Any], seed: int) -> Params:
    if is_search:
        return BeamSearchParams.from_dict({"beam_width": 4, **options})
    params = SamplingParams.from_dict({"temperature": 1.0, "seed": seed, **options})
    return dataclasses.replace(params, output_kind=RequestOutputKind.FINAL_ONLY)


def make_request(llm: LLM, name: str, prompt: list[int], params: Params) -> Request:
    tokenized = llm._tokenize([prompt])[0]
    if isinstance(params, SamplingParams):
        return llm._running.request(name, tokenized, params)
    sampling = params.sampling_params()
    return llm._running.request(name, tokenized, sampling, beam_search=params)


def run(llm: LLM, wanted: dict[str, tuple[list[int], Params]]) -> dict[str, RequestOutput]:
    for name, (prompt, params) in wanted.items():
        llm.engine.add_request(make_request(llm, name, prompt, params))
    found = {}
    while llm.engine.has_unfinished_requests():
        found.update({output.request_id: output for output in llm.engine.step()})
    pool = llm.engine.scheduler.pool
    pool.check_integrity([])
    assert pool.num_free_blocks == pool.num_blocks
    return found


def same_logprobs(
    found: list[TokenLogprobs | None] | None, expected: list[TokenLogprobs | None] | None
) -> bool:
    if found is None or expected is None:
        return found is expected
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one or {}).keys() == (other or {}).keys()
        for token_id, logprob in (one or {}).items():
            assert logprob.logprob == pytest.approx((other or {})[token_id].logprob, abs=1e-3)
    return True


def check_same(found: RequestOutput, expected: RequestOutput) -> None:
    assert same_logprobs(found.prompt_logprobs, expected.prompt_logprobs)
    for one, other in zip(found.outputs, expected.outputs, strict=True):
        assert (one.token_ids, one.text) == (other.token_ids, other.text)
        assert (one.finish_reason, one.stop_reason) == (other.finish_reason, other.stop_reason)
        assert one.finish_reason in ("stop", "length")
        assert one.cumulative_logprob == pytest.approx(other.cumulative_logprob, abs=1e-2)
        assert same_logprobs(one.logprobs, other.logprobs)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def plain(tiny_llama_folder: Path, tiny_llm: dict[str, Any]) -> Iterator[LLM]:
    options = {**tiny_llm, "overlap": False, "enable_prefix_caching": False}
    with LLM(str(tiny_llama_folder), **options) as llm:
        yield llm


@pytest.fixture(scope="module")
def crowded(tiny_llama_folder: Path, tiny_llm: dict[str, Any]) -> Iterator[LLM]:
    """Its scheduler knows only some of the pool's blocks, so that its programs are those of other
    tests."""
    with LLM(str(tiny_llama_folder), **tiny_llm, speculative="ngram") as llm:
        whole = llm.engine
        llm.engine = Engine(
            dataclasses.replace(whole.config, num_blocks=NUM_BLOCKS, max_model_len=MAX_MODEL_LEN),
            whole.runner,
            vocab_size=whole.vocab_size,
            tokenizer=whole.tokenizer,
            eos_token_ids=whole.eos_token_ids,
        )
        yield llm


def test_each_answer_is_that_of_its_request_alone(plain: LLM, crowded: LLM) -> None:
    seen: Counter[str] = Counter()

    @settings(max_examples=40, derandomize=True, database=None, deadline=None)
    @given(st.lists(requests(), min_size=2, max_size=6), st.booleans())
    def crossed(drawn: list[tuple[list[int], bool, dict[str, Any]]], knows_answers: bool) -> None:
        wanted: dict[str, tuple[list[int], Params]] = {}
        for number, (prompt, is_search, options) in enumerate(drawn):
            pairs = conflicts(is_search, options)
            if pairs:
                with pytest.raises(RequestError) as refused:
                    params_of(is_search, options, number)
                message = str(refused.value)
                assert any(a in message and b in message for a, b in pairs)
                seen["refused"] += 1
                continue
            params = params_of(is_search, options, number)
            wanted[str(number)] = ([*prompt, 50 + number], params)
            form = "structured_outputs" in options
            seen["searches of a form" if is_search and form else "others"] += 1
        alone: dict[str, RequestOutput] = {}
        for name, request in wanted.items():
            alone |= run(plain, {name: request})
        answers = {
            (tuple(output.prompt_token_ids), answer.index): answer.token_ids
            for output in alone.values()
            for answer in output.outputs
        }
        proposer = OftenRight(answers) if knows_answers else PromptLookup()
        crowded.engine.speculator = Speculator(
            proposer, crowded.engine.config.num_speculative_tokens, row_cost=0.001
        )
        found = run(crowded, wanted)
        for name in wanted:
            check_same(found[name], alone[name])
            metrics = found[name].metrics
            params = wanted[name][1]
            assert metrics is not None
            seen["preempted"] += metrics.num_preemptions
            seen["accepted"] += metrics.num_accepted_tokens
            if params.structured_outputs is not None:
                seen["accepted under a form"] += metrics.num_accepted_tokens
                seen["preempted under a form"] += metrics.num_preemptions
            if isinstance(params, BeamSearchParams):
                seen["searches preempted"] += metrics.num_preemptions

    crossed()
    for event in (
        "refused", "preempted", "accepted", "accepted under a form", "searches of a form",
        "preempted under a form", "searches preempted",
    ):  # fmt: skip
        assert seen[event] > 5, seen
