"""Workloads: lengths, common beginnings, arrivals by their formula, and files, good and bad."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxllm.bench.vocabulary import WORDS, Vocabulary, load_tokenizer, of_size, of_tokenizer
from jaxllm.bench.workloads import (
    Conversation,
    WorkloadOptions,
    arrival_times,
    gamma_gaps,
    make_workload,
)
from jaxllm.config import ModelError

IDS = of_size(1000)


def prompts(work: list[Conversation]) -> list[Any]:
    return [conversation.turns[0].prompt for conversation in work]


def make(vocabulary: Vocabulary = IDS, **options: Any) -> list[Conversation]:
    return make_workload(WorkloadOptions(**options), vocabulary)


def test_random_prompts_have_their_lengths_and_prefix() -> None:
    options: dict[str, Any] = {
        "num_prompts": 300, "random_input_len": 20, "random_output_len": 10,
        "random_range_ratio": 0.5, "random_prefix_len": 4, "seed": 3,
    }  # fmt: skip
    work = make(**options)
    lens = [len(prompt) for prompt in prompts(work)]
    assert lens == [conversation.turns[0].prompt_len for conversation in work]
    assert (min(lens), max(lens)) == (14, 34)  # 4 + 10 ... 4 + 30
    output_lens = {conversation.turns[0].output_len for conversation in work}
    assert output_lens == set(range(5, 16))
    assert len({tuple(prompt[:4]) for prompt in prompts(work)}) == 1
    assert len({tuple(prompt[4:8]) for prompt in prompts(work)}) == 300
    assert max(max(prompt) for prompt in prompts(work)) < 1000
    assert work == make(**options)
    assert work != make(**{**options, "seed": 4})


def test_without_ids_prompts_are_words() -> None:
    [conversation] = make(Vocabulary(), num_prompts=1, random_input_len=5)
    words = conversation.turns[0].prompt
    assert isinstance(words, str)
    assert len(words.split()) == 5
    assert set(words.split()) <= set(WORDS)


def test_with_a_tokenizer_prompts_are_its_tokens_and_none_is_special(
    tiny_llama_folder: Path,
) -> None:
    tokenizer = load_tokenizer(str(tiny_llama_folder))
    ids = prompts(make(of_tokenizer(tokenizer), num_prompts=20, random_input_len=30))
    assert {len(prompt) for prompt in ids} == {30}
    assert not tokenizer.special_token_ids & {token for prompt in ids for token in prompt}
    as_text = of_tokenizer(tokenizer, as_text=True)
    for text in prompts(make(as_text, num_prompts=20, random_input_len=30)):
        assert 0 < len(tokenizer.encode(text)) <= 32  # a cut character may take more


def test_tokenizers_are_found_by_every_kind_of_name(
    smollm2_path: Path, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    assert load_tokenizer(str(smollm2_path)).vocab_size == 49152
    assert load_tokenizer("smollm2-135m-instruct").vocab_size == 49152
    file = tmp_path / "tokenizer.json"  # a folder needs no weights
    file.write_bytes((tiny_llama_folder / file.name).read_bytes())
    assert (
        load_tokenizer(str(tmp_path)).vocab_size
        == load_tokenizer(str(tiny_llama_folder)).vocab_size
    )
    with pytest.raises(ModelError, match="no model 'nosuch'"):
        load_tokenizer("nosuch")


def test_prefix_repetition_shares_its_prefixes_evenly() -> None:
    work = make(
        dataset_name="prefix-repetition", num_prompts=12, prefix_repetition_prefix_len=8,
        prefix_repetition_suffix_len=5, prefix_repetition_num_prefixes=3,
        prefix_repetition_output_len=7,
    )  # fmt: skip
    prefixes = [tuple(prompt[:8]) for prompt in prompts(work)]
    assert sorted(prefixes.count(prefix) for prefix in set(prefixes)) == [4, 4, 4]
    assert {len(prompt) for prompt in prompts(work)} == {13}
    assert {conversation.turns[0].output_len for conversation in work} == {7}


def test_multi_turn_has_conversations_of_texts() -> None:
    work = make(
        dataset_name="multi-turn", num_prompts=3, multi_turn_num_turns=4, multi_turn_input_len=6
    )
    assert [len(conversation.turns) for conversation in work] == [4, 4, 4]
    assert all(len(turn.prompt.split()) == 6 for c in work for turn in c.turns)  # type: ignore[union-attr]


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_are_of_a_gamma_distribution(burstiness: float) -> None:
    """Mean 1 / rate, variance 1 / (shape * rate^2), as the distribution's formulas say; skewness
    2 / sqrt(shape)."""
    rate = 8.0
    gaps = gamma_gaps(200_000, rate, burstiness, np.random.default_rng(0))
    assert gaps.mean() == pytest.approx(1 / rate, rel=0.02)
    assert gaps.var() == pytest.approx(1 / (burstiness * rate**2), rel=0.05)
    skewness = ((gaps - gaps.mean()) ** 3).mean() / gaps.std() ** 3
    assert skewness == pytest.approx(2 / burstiness**0.5, rel=0.1)


def test_poisson_gaps_pass_a_test_against_the_exponential_distribution() -> None:
    from scipy.stats import kstest

    gaps = np.diff(arrival_times(5000, 3.0, 1.0, seed=1))
    assert kstest(gaps, "expon", args=(0, 1 / 3)).pvalue > 0.01


def test_arrivals_end_at_count_over_rate() -> None:
    times = arrival_times(100, 5.0, 0.5, seed=0)
    assert times == sorted(times)
    assert times[-1] == pytest.approx(20)
    assert times == arrival_times(100, 5.0, 0.5, seed=0)
    assert arrival_times(3, float("inf"), 1.0, seed=0) == [0, 0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset_name": "nosuch"}, "--dataset-name must be one of random"),
        ({"num_prompts": 0}, "--num-prompts must be at least 1, got 0"),
        ({"random_range_ratio": 1.0}, "--random-range-ratio must be in [0, 1), got 1.0"),
        ({"dataset_name": "trace"}, "--dataset-name trace needs --dataset-path FILE"),
        ({"dataset_path": "x"}, "--dataset-name random takes no --dataset-path"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        WorkloadOptions(**options)


# ---- files


def sharegpt(*exchanges: tuple[str, str]) -> str:
    return json.dumps(
        [
            {"conversations": [{"from": "human", "value": a}, {"from": "gpt", "value": b}]}
            for a, b in exchanges
        ]
    )


def test_sharegpt_takes_first_exchanges_of_a_fit_length(tmp_path: Path) -> None:
    """A token is four characters here. They come again when there are too few."""
    file = tmp_path / "chats.json"
    good = [("a" * 40, "b" * 80), ("c" * 16, "d" * 400)]
    bad = [("a" * 8, "b" * 80), ("a" * 40, "b"), ("a" * 5000, "b" * 40), ("a" * 4000, "b" * 8000)]
    content = json.loads(sharegpt(*good, *bad))
    content += [{"conversations": [{"from": "human", "value": "alone, without an answer"}]}]
    file.write_text(json.dumps(content))
    options = {"dataset_name": "sharegpt", "dataset_path": str(file), "num_prompts": 5}
    turns = [conversation.turns[0] for conversation in make(**options)]
    lens = {(turn.prompt, turn.prompt_len, turn.output_len) for turn in turns}
    assert lens == {("a" * 40, 10, 20), ("c" * 16, 4, 100)}
    assert len(turns) == 5
    turns = [c.turns[0] for c in make(**options, sharegpt_output_len=9)]
    assert {turn.output_len for turn in turns} == {9}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{not json", "is not valid JSON"),
        ("{}", "must be a JSON list of conversations"),
        ('[{"conversations": 3}]', "must be a list of"),
        ('[{"turns": []}]', "must be a list of"),
        ('[{"conversations": [{"value": 1}, {"value": "a"}]}]', "value must be a string"),
        ("[]", "has no exchange of 4 to 1024 prompt tokens"),
    ],
)
def test_bad_sharegpt_files(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "bad.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        make(dataset_name="sharegpt", dataset_path=str(file))
    assert str(error.value).startswith(f"{file}: ")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "none"
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        make(dataset_name="trace", dataset_path=str(file))


def trace(tmp_path: Path, *lines: Any) -> Path:
    file = tmp_path / "trace.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    file.write_text("\n".join(texts) + "\n")
    return file


def test_a_trace_has_its_times_and_lengths(tmp_path: Path) -> None:
    file = trace(
        tmp_path,
        {"timestamp": 5000, "input_length": 600, "output_length": 3, "hash_ids": [1, 2]},
        {"timestamp": 5000, "input_length": 700, "output_length": 4, "hash_ids": [1, 3]},
        "",
        {"timestamp": 6500, "prompt": "x" * 40, "output_length": 5},
        {"timestamp": 7000, "input_length": 8, "output_length": 6},
    )
    options = {"dataset_name": "trace", "dataset_path": str(file), "trace_time_unit": "ms"}
    work = make(**options)
    assert [conversation.at for conversation in work] == [0, 0, 1.5, 2.0]
    turns = [conversation.turns[0] for conversation in work]
    assert [turn.prompt_len for turn in turns] == [600, 700, 10, 8]
    assert [turn.output_len for turn in turns] == [3, 4, 5, 6]
    one, other = turns[0].prompt, turns[1].prompt
    assert (len(one), len(other)) == (600, 700)
    assert one[:512] == other[:512]
    assert one[512:] != other[512:600]
    assert turns[2].prompt == "x" * 40
    assert len(make(**options, num_prompts=2)) == 2


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            [{"timestamp": 2, "input_length": 1, "output_length": 1},
             {"timestamp": 1, "input_length": 1, "output_length": 1}],
            "line 2: timestamps must not decrease, got 1 after 2",
        ),
        (["{x"], "line 1: is not valid JSON"),
        (["[]"], "line 1: must be a JSON object, got list"),
        ([{"timestamp": -1}], "line 1: timestamp must be a number of at least 0, got -1"),
        ([{"timestamp": 1e999}], "timestamp must be a number"),
        ([{"timestamp": True}], "timestamp must be a number"),
        ([{"timestamp": 0, "input_length": 0, "output_length": 1}], "input_length must be an int"),
        ([{"timestamp": 0, "input_length": 1.5, "output_length": 1}], "input_length must be an"),
        ([{"timestamp": 0, "input_length": 1}], "output_length must be an integer of at least 1"),
        ([{"timestamp": 0, "output_length": 1}], "needs either prompt or input_length"),
        ([{"timestamp": 0, "prompt": "", "output_length": 1}], "prompt must be a text"),
        ([{"timestamp": 0, "input_length": 1, "hash_ids": ["a"]}], "hash_ids must be a list of"),
        ([{"time": 0}], "unknown key 'time'; known: timestamp"),
        ([], "the trace is empty"),
    ],
)  # fmt: skip
def test_bad_traces(tmp_path: Path, lines: list[Any], message: str) -> None:
    file = trace(tmp_path, *lines)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        make(dataset_name="trace", dataset_path=str(file))
    assert str(error.value).startswith(f"{file}: ")
