"""Every sampling option through the Python API, in mixed batches, against formulas on the logits
of transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats  # type: ignore[import-untyped]
from torch_reference import TorchModel, assert_greedy, log_softmax

from jaxllm import LLM, SamplingParams
from jaxllm.outputs import CompletionOutput, RequestOutput

EOS = 1
PROMPT = [40, 41, 42, 40, 41, 43]
PROMPT_TEXT = "The lazy dog"
ASCII = range(5, 99)  # tokens of one printable character each
LONG = 48  # tokens: eight such sequences do not fit in the smallest pool
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
DRAWN = SamplingParams(temperature=1, max_tokens=20, ignore_eos=True, seed=1)
SMALLEST_POOL = 16 * 8192  # bytes: 16 blocks, of 2 layers x 16 tokens x 2 x 2 heads x 16 floats
Change = Callable[[np.ndarray, list[int]], Any]


@pytest.fixture(scope="module")
def llm(tiny_llama_folder: Path, tiny_llm: dict[str, Any]) -> Iterator[LLM]:
    with LLM(str(tiny_llama_folder), **tiny_llm) as llm:
        yield llm
        llm.engine.scheduler.pool.check_integrity([])


@pytest.fixture(scope="module")
def reference(tiny_llama_folder: Path) -> TorchModel:
    return TorchModel.from_folder(tiny_llama_folder)


def option(**changes: Any) -> SamplingParams:
    return dataclasses.replace(GREEDY, **changes)


def run(llm: LLM, prompts: Any, params: Any) -> list[CompletionOutput]:
    outputs: list[RequestOutput] = llm.generate(prompts, params, use_tqdm=False)
    return [output.outputs[0] for output in outputs]


# ---- greedy with changed logits: each option and what it does to the logits, by its formula


def repeated(penalty: float) -> Change:
    """Keskar et al. 2019: logits of tokens in prompt or output, divided or multiplied."""

    def change(logits: np.ndarray, output: list[int]) -> np.ndarray:
        seen = np.isin(np.arange(len(logits)), [*PROMPT, *output])
        return np.where(seen, np.where(logits > 0, logits / penalty, logits * penalty), logits)

    return change


def counted(frequency: float, presence: float) -> Change:
    """OpenAI: frequency times count in the output, and presence once."""

    def change(logits: np.ndarray, output: list[int]) -> np.ndarray:
        count = np.bincount(output, minlength=len(logits))
        return logits - frequency * count - presence * (count > 0)

    return change


def only(allowed: Any) -> Change:
    return lambda logits, _: np.where(np.isin(np.arange(len(logits)), allowed), logits, -np.inf)


def without(banned: Any) -> Change:
    return lambda logits, _: np.where(np.isin(np.arange(len(logits)), banned), -np.inf, logits)


def biased(bias: dict[int, float]) -> Change:
    return lambda logits, _: logits + np.array([bias.get(i, 0.0) for i in range(len(logits))])


def in_turn(*changes: Change) -> Change:
    def change(logits: np.ndarray, output: list[int]) -> np.ndarray:
        for each in changes:
            logits = each(logits, output)
        return logits

    return change


EVEN = list(range(0, 320, 2))
BIAS = {7: 4.0, 9: 4.0, 300: -100.0}
OPTIONS: dict[str, tuple[dict[str, Any], Change]] = {
    "plain": ({}, in_turn()),
    "top_k 1": ({"temperature": 1, "top_k": 1}, in_turn()),
    "top_p near 0": ({"temperature": 1, "top_p": 1e-6}, in_turn()),
    "min_p 1": ({"temperature": 1, "min_p": 1.0}, in_turn()),
    "repetition": ({"repetition_penalty": 1.8}, repeated(1.8)),
    "repetition wanted": ({"repetition_penalty": 0.6}, repeated(0.6)),
    "frequency": ({"frequency_penalty": 1.5}, counted(1.5, 0)),
    "presence": ({"presence_penalty": 2.0}, counted(0, 2.0)),
    "presence wanted": ({"presence_penalty": -2.0}, counted(0, -2.0)),
    "allowed": ({"allowed_token_ids": EVEN}, only(EVEN)),
    "banned": ({"banned_token_ids": EVEN}, without(EVEN)),
    "bias": ({"logit_bias": BIAS}, biased(BIAS)),
    "all at once": (
        {
            "allowed_token_ids": EVEN, "banned_token_ids": [8, 300], "logit_bias": {44: 2.0},
            "repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": 0.7,
            "temperature": 0.7, "top_k": 1,
        },
        in_turn(only(EVEN), without([8, 300]), biased({44: 2.0}), repeated(1.3), counted(0.5, 0.7)),
    ),
}  # fmt: skip


def changed_logits(name: str) -> SamplingParams:
    return option(**OPTIONS[name][0], max_tokens=LONG)


@pytest.fixture(scope="module")
def expected(reference: TorchModel) -> dict[str, list[int]]:
    return {
        name: reference.greedy_changed(PROMPT, LONG, change)
        for name, (_, change) in OPTIONS.items()
    }


def test_each_option_in_a_mixed_batch_is_its_formula(
    llm: LLM, expected: dict[str, list[int]]
) -> None:
    names = [*OPTIONS, *reversed(OPTIONS)]
    answers = run(llm, [PROMPT] * len(names), [changed_logits(name) for name in names])
    for name, answer in zip(names, answers, strict=True):
        assert answer.token_ids == expected[name], name
    without_effect = {"plain", "top_k 1", "top_p near 0", "min_p 1"}
    for name, tokens in expected.items():
        assert (tokens == expected["plain"]) == (name in without_effect), name


def test_what_a_slot_was_used_for_before_does_not_matter(
    llm: LLM,
    tiny_llama_folder: Path,
    tiny_llm: dict[str, Any],
    expected: dict[str, list[int]],
) -> None:
    """One after the other takes the same slot; then many more than slots, with preemption."""
    random = np.random.default_rng(0)
    names = [str(name) for name in random.choice(list(OPTIONS), 40)]
    for name in names:
        (answer,) = run(llm, PROMPT, changed_logits(name))
        assert answer.token_ids == expected[name], name
    params = [changed_logits(name) for name in names]
    options = {**tiny_llm, "kv_cache_memory_bytes": SMALLEST_POOL, "enable_prefix_caching": False}
    with LLM(str(tiny_llama_folder), **options) as crowded:
        answers = run(crowded, [PROMPT] * 40, params)
        assert crowded.engine.stats().num_preemptions > 5
    for name, answer in zip(names, answers, strict=True):
        assert answer.token_ids == expected[name], name


# ---- drawing


def test_filters_keep_what_their_formula_keeps(llm: LLM, reference: TorchModel) -> None:
    """Of each drawn token: its place in the distribution after temperature."""
    params = [
        dataclasses.replace(DRAWN, seed=seed, temperature=1.5, **filters)
        for seed in range(10)
        for filters in ({"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.2}, {})
    ]
    broken = {"top_k": 0, "top_p": 0, "min_p": 0}
    for each, answer in zip(params, run(llm, [PROMPT] * 40, params), strict=True):
        rows = reference.logits([*PROMPT, *answer.token_ids])[len(PROMPT) - 1 : -1]
        probabilities = np.exp(log_softmax(rows / 1.5))
        chosen = np.take_along_axis(probabilities, np.array(answer.token_ids)[:, None], 1)[:, 0]
        likelier = np.where(probabilities > chosen[:, None], probabilities, 0)
        kept = {
            "top_k": (likelier > 0).sum(axis=1) < 5,
            "top_p": likelier.sum(axis=1) < 0.6,
            "min_p": chosen >= 0.2 * probabilities.max(axis=1) - 1e-6,
        }
        for name, is_kept in kept.items():
            if getattr(each, name) != getattr(SamplingParams(), name):
                assert is_kept.all(), name
            if each == dataclasses.replace(DRAWN, seed=each.seed, temperature=1.5):
                broken[name] += int((~is_kept).sum())
    assert min(broken.values()) > 0  # without the filters other tokens are drawn


def test_tokens_are_drawn_from_the_distribution(llm: LLM, reference: TorchModel) -> None:
    """The first token of 2,000 answers, chi-squared at 0.001 with a fixed seed."""
    params = SamplingParams(n=2000, seed=11, temperature=0.8, max_tokens=1, detokenize=False)
    (output,) = llm.generate(PROMPT, params, use_tqdm=False)
    drawn = np.bincount([answer.token_ids[0] for answer in output.outputs], minlength=320)
    expected = 2000 * np.exp(log_softmax(reference.logits(PROMPT)[-1] / 0.8))
    rare = expected < 5
    observed = [*drawn[~rare], drawn[rare].sum()]
    wanted = [*expected[~rare], expected[rare].sum()]
    assert len(wanted) > 5
    assert scipy.stats.chisquare(observed, wanted).pvalue > 0.001


def test_drawn_tokens_obey_bans_and_allowance(llm: LLM) -> None:
    params = [
        dataclasses.replace(DRAWN, temperature=2, allowed_token_ids=[3, 5, 319]),
        dataclasses.replace(DRAWN, temperature=2, banned_token_ids=EVEN, seed=2),
        dataclasses.replace(DRAWN, temperature=2, logit_bias={17: 100.0}, seed=3),
        dataclasses.replace(DRAWN, temperature=2, seed=4),
    ]
    allowed, banned, biased_, free = run(llm, [PROMPT] * 4, params)
    assert set(allowed.token_ids) == {3, 5, 319}
    assert not set(banned.token_ids) & set(EVEN)
    assert set(biased_.token_ids) == {17}
    assert set(free.token_ids) & set(EVEN)


# ---- ends


def test_the_end_of_sequence_min_tokens_and_ignore_eos(llm: LLM) -> None:
    likely = {"logit_bias": {EOS: 100.0}, "ignore_eos": False}
    params = [
        option(**likely),
        option(**likely, min_tokens=6),
        option(**(likely | {"ignore_eos": True}), min_tokens=6),
        option(**likely, include_stop_str_in_output=True, skip_special_tokens=False),
    ]
    at_once, later, ignored, included = run(llm, [PROMPT] * 4, params)
    assert at_once.token_ids == [EOS]
    assert (at_once.text, at_once.finish_reason, at_once.stop_reason) == ("", "stop", None)
    assert len(later.token_ids) == 7
    assert later.token_ids.index(EOS) == 6
    assert (later.finish_reason, later.stop_reason) == ("stop", None)
    assert ignored.token_ids == [EOS] * 20
    assert (ignored.finish_reason, ignored.stop_reason) == ("length", None)
    assert (included.text, included.finish_reason) == ("<|end|>", "stop")


def test_stop_token_ids(llm: LLM) -> None:
    (plain,) = run(llm, PROMPT_TEXT, option(allowed_token_ids=ASCII))
    stop = plain.token_ids[4]
    first = plain.token_ids.index(stop)
    params = [
        option(allowed_token_ids=ASCII, stop_token_ids=[4, stop]),
        option(allowed_token_ids=ASCII, stop_token_ids=[stop], include_stop_str_in_output=True),
        option(allowed_token_ids=ASCII, stop_token_ids=[stop], min_tokens=first + 2),
        option(allowed_token_ids=ASCII, stop_token_ids=[4]),
    ]
    answers = run(llm, [PROMPT_TEXT] * 4, params)
    for answer, length in zip(answers[:2], (first, first + 1), strict=True):
        assert answer.token_ids == plain.token_ids[: first + 1]
        assert answer.text == plain.text[:length]
        assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)
    assert stop not in answers[2].token_ids[: first + 2]
    assert answers[2].token_ids[:first] == plain.token_ids[:first]
    assert answers[3] == plain


@pytest.mark.parametrize("include", [False, True])
def test_stop_strings_across_token_borders(llm: LLM, include: bool) -> None:
    """Each token is one character here, so a string of three ends in the third's token."""
    base = {"allowed_token_ids": ASCII, "frequency_penalty": 2.0}
    (plain,) = run(llm, PROMPT_TEXT, option(**base))
    assert len(plain.text) == 20
    string = plain.text[6:9]
    start = plain.text.index(string)
    params = [
        option(**base, stop=["never to be", string], include_stop_str_in_output=include),
        option(**base, stop=string + "~never"),
        option(**base),
    ]
    stopped, *others = run(llm, [PROMPT_TEXT] * 3, params)
    assert stopped.text == plain.text[: start + 3 if include else start]
    assert stopped.token_ids == plain.token_ids[: start + 3]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", string)
    assert others == [plain, plain]
    pieces = list(llm.stream(PROMPT_TEXT, params[0]))
    assert "".join(piece.text for piece in pieces) == stopped.text
    assert pieces[-1].stop_reason == string


def test_max_tokens_and_text_options(llm: LLM, reference: TorchModel) -> None:
    params = [
        option(max_tokens=1),
        option(max_tokens=7),
        option(detokenize=False),
        option(logit_bias={EOS: 100.0}, max_tokens=2, skip_special_tokens=False),
        option(logit_bias={EOS: 100.0}, max_tokens=2),
    ]
    answers = run(llm, [PROMPT] * 5, params)
    tokens = reference.greedy(PROMPT, 20)
    for answer, length in zip(answers[:3], (1, 7, 20), strict=True):
        assert_greedy(reference, PROMPT, answer.token_ids, tokens[:length])
        assert answer.finish_reason == "length"
    assert answers[2].text == ""
    assert [answer.text for answer in answers[3:]] == ["<|end|><|end|>", ""]
