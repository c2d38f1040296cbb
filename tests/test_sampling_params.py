"""SamplingParams: the defaults that vLLM's users know, ranges, normalisation."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from jaxllm.sampling_params import RequestOutputKind, SamplingParams
from jaxllm.structured_outputs import StructuredOutputsParams

DEFAULTS = {
    "n": 1,
    "best_of": None,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "seed": None,
    "stop": (),
    "stop_token_ids": None,
    "include_stop_str_in_output": False,
    "ignore_eos": False,
    "max_tokens": 16,
    "min_tokens": 0,
    "logprobs": None,
    "prompt_logprobs": None,
    "detokenize": True,
    "skip_special_tokens": True,
    "logit_bias": None,
    "allowed_token_ids": None,
    "banned_token_ids": None,
    "structured_outputs": None,
    "output_kind": RequestOutputKind.CUMULATIVE,
}
FLOATS = (
    "presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p", "min_p",
)  # fmt: skip
INTEGERS = (
    "n", "best_of", "top_k", "seed", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs",
)  # fmt: skip
FLAGS = ("include_stop_str_in_output", "ignore_eos", "detokenize", "skip_special_tokens")


def test_defaults() -> None:
    assert dataclasses.asdict(SamplingParams()) == DEFAULTS


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("n", [1, 16384]),
        ("best_of", [1, 16384]),
        ("presence_penalty", [-2, 2, 0.5]),
        ("frequency_penalty", [-2, 2, 0.5]),
        ("repetition_penalty", [1e-30, 0.5, 1e30]),
        ("temperature", [0, 1e-6, 1e-5, 2]),
        ("top_p", [1e-9, 1]),
        ("top_k", [1, 2**31 - 1]),
        ("min_p", [0, 1]),
        ("seed", [-(2**63), 0, 2**63 - 1]),
        ("max_tokens", [1, 2**31 - 1, None]),
        ("min_tokens", [0, 16]),
        ("logprobs", [0, 20, None]),
        ("prompt_logprobs", [0, 20, None]),
        ("output_kind", list(RequestOutputKind)),
    ],
)
def test_values_at_the_ends_of_a_range_are_taken(name: str, values: list[Any]) -> None:
    for value in values:
        assert getattr(SamplingParams(**{name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 0), ("n", 16385), ("best_of", 0), ("best_of", 16385),
        ("presence_penalty", -2.1), ("presence_penalty", 2.1), ("frequency_penalty", -2.1),
        ("frequency_penalty", 2.1), ("repetition_penalty", 0),
        ("repetition_penalty", -1), ("repetition_penalty", 1e-50), ("repetition_penalty", 1e300),
        ("temperature", -0.1), ("temperature", 2.1), ("top_p", 0), ("top_p", 1.1), ("top_k", -2),
        ("top_k", 2**31), ("min_p", -0.1), ("min_p", 1.1), ("seed", 2**63),
        ("seed", -(2**63) - 1), ("max_tokens", 0), ("min_tokens", -1), ("logprobs", -1),
        ("logprobs", 21), ("prompt_logprobs", -1), ("prompt_logprobs", 21), ("stop", ""),
        ("stop", ["a", ""]), ("stop", [1]), ("stop", 1), ("stop", {"a": 1}), ("stop", b"a"),
        ("stop_token_ids", [-1]), ("stop_token_ids", "12"), ("stop_token_ids", 3),
        ("stop_token_ids", [1.0]), ("stop_token_ids", [True]), ("stop_token_ids", {1: 2}),
        ("allowed_token_ids", []), ("allowed_token_ids", [2**31]), ("banned_token_ids", ["a"]),
        ("logit_bias", {1: 101}), ("logit_bias", {1: math.nan}), ("logit_bias", {-1: 1}),
        ("logit_bias", {"a": 1}), ("logit_bias", {1.5: 1}), ("logit_bias", [1]),
        ("logit_bias", {"9" * 5000: 1}), ("output_kind", "DELTA"),
    ],
)  # fmt: skip
def test_values_outside_a_range_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name) as caught:
        SamplingParams(**{name: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, True, "1", None, [1], 10**400])
def test_no_number_for_a_number(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("value", [math.nan, math.inf, True, "1", 1.0, [1], 10**400])
def test_no_integer_for_an_integer(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("value", [0, 1, None, "true"])
def test_no_flag_for_a_flag(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        SamplingParams(**{name: value})


def test_every_field_is_covered_here() -> None:
    lists = ("stop", "stop_token_ids", "allowed_token_ids", "banned_token_ids", "logit_bias")
    others = ("structured_outputs", "output_kind")
    assert {*FLOATS, *INTEGERS, *FLAGS, *lists, *others} == set(DEFAULTS)


def test_structured_outputs_come_from_a_dict_too() -> None:
    params = SamplingParams.from_dict({"structured_outputs": {"regex": "a+"}})
    assert params.structured_outputs == StructuredOutputsParams(regex="a+")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"structured_outputs": "json"}, "structured_outputs must be StructuredOutputsParams"),
        ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs needs one of"),
        ({"structured_outputs": {"xml": "a"}}, "structured_outputs has no 'xml'"),
        ({"structured_outputs": {"regex": "a"}, "min_tokens": 2}, "min_tokens cannot be combined"),
        ({"structured_outputs": {"regex": "a"}, "allowed_token_ids": [1]}, "allowed_token_ids can"),
        ({"structured_outputs": {"regex": "a"}, "banned_token_ids": [1]}, "banned_token_ids can"),
    ],
)
def test_a_form_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams.from_dict(options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens .5. must not exceed max_tokens .4."),
        ({"n": 2, "temperature": 0}, "n must be 1 with temperature 0"),
        ({"best_of": 2, "temperature": 0}, "best_of must be 1 with temperature 0"),
        ({"n": 3, "best_of": 2}, "best_of must be an integer in \\[3, 16384\\]"),
        ({"stop": "x", "detokenize": False}, "stop strings need detokenize"),
        ({"allowed_token_ids": [1, 2], "banned_token_ids": [2, 1, 3]}, "leaves nothing"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**options)


def test_unknown_names() -> None:
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(temprature=1.0)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r"unknown sampling option 'temprature'.*temperature"):
        SamplingParams.from_dict({"temprature": 1.0})
    with pytest.raises(ValueError, match="output_kind"):  # the front decides it, no user
        SamplingParams.from_dict({"output_kind": 1})


def test_from_dict_is_the_constructor() -> None:
    options = {"temperature": 0.5, "stop": ["a"], "logit_bias": {"3": 1}}
    assert SamplingParams.from_dict(options) == SamplingParams(
        temperature=0.5, stop="a", logit_bias={3: 1.0}
    )


def test_values_are_normalised() -> None:
    params = SamplingParams(
        top_k=-1,
        temperature=Fraction(1, 2),  # type: ignore[arg-type]
        seed=np.int64(2**63 - 1),  # type: ignore[arg-type]
        stop=["a", "b"],
        stop_token_ids=np.array([1, 2]),  # type: ignore[arg-type]
        logit_bias={"7": 1, 8: np.float32(2)},  # type: ignore[dict-item]
    )
    assert (params.top_k, params.temperature, params.stop) == (0, 0.5, ("a", "b"))
    assert params.seed is not None
    assert params.seed + 1 == 2**63  # numpy's would overflow
    assert params.stop_token_ids == (1, 2)
    assert type(params.stop_token_ids[0]) is int
    assert params.logit_bias == {7: 1.0, 8: 2.0}


@pytest.mark.parametrize(("temperature", "greedy"), [(0, True), (9e-6, True), (1e-5, False)])
def test_greedy(temperature: float, greedy: bool) -> None:
    assert SamplingParams(temperature=temperature).greedy is greedy


@pytest.mark.parametrize(
    "options",
    [
        {"stop_token_ids": [100]}, {"allowed_token_ids": [5, 100]}, {"banned_token_ids": [100]},
        {"logit_bias": {100: 1}},
    ],
)  # fmt: skip
def test_token_ids_outside_the_vocabulary(options: dict[str, Any]) -> None:
    params = SamplingParams(**options)
    params.check_vocabulary(101)
    name = next(iter(options))
    with pytest.raises(ValueError, match=f"{name} has token id 100, outside the vocabulary of 100"):
        params.check_vocabulary(100)
