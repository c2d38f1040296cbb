"""Tokenizers from GGUF metadata, against transformers and against SentencePiece's own algorithm."""

from __future__ import annotations

import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from small_vocabularies import TEXTS, gguf_byte_level, gguf_sentencepiece
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer
from transformers.integrations.gguf import gguf_tokenizer_mapping

from jaxllm.config import ModelError
from jaxllm.text.tokenizer import Tokenizer, load_tokenizer_from_gguf


def without(metadata: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in metadata.items() if k != f"tokenizer.ggml.{key}"}


def changed(metadata: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    return {**metadata, f"tokenizer.ggml.{key}": value}


def transformers_backend(metadata: dict[str, Any]) -> Any:
    names = gguf_tokenizer_mapping.GGUF_TOKENIZER_MAPPING["tokenizer"]
    values = {
        name: metadata[f"tokenizer.{key}"]
        for key, name in names.items()
        if f"tokenizer.{key}" in metadata
    }
    return gguf_tokenizer_mapping.convert_gguf_tokenizer("llama", values)[0]


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2", "tekken", "gpt-4o", "dbrx"])
def test_byte_level_ids_equal_transformers(pre: str) -> None:
    metadata = gguf_byte_level(pre)
    ours, reference = load_tokenizer_from_gguf(metadata), transformers_backend(metadata)
    for text in TEXTS:
        if pre == "qwen2" and "e\u0301" in text:
            continue  # transformers' GGUF reader loses Qwen's NFC; the test below has it
        expected = reference.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, add_special_tokens=False) == expected
        assert ours.decode(expected) == reference.decode(expected)


def test_qwen2_composes_accents_and_gpt2_does_not() -> None:
    qwen = load_tokenizer_from_gguf(gguf_byte_level("qwen2"))
    gpt2 = load_tokenizer_from_gguf(gguf_byte_level("gpt-2"))
    assert qwen.decode(qwen.encode("e\u0301")) == "\u00e9"
    assert gpt2.decode(gpt2.encode("e\u0301")) == "e\u0301"


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["in", "Ġ2024", ",", "ĠX"]),
        ("smollm", ["in", "Ġ", "2", "0", "2", "4", ",", "ĠX"]),
        ("llama-bpe", ["in", "Ġ", "202", "4", ",", "ĠX"]),
        ("qwen2", ["in", "Ġ", "2", "0", "2", "4", ",", "ĠX"]),
    ],
)
def test_text_is_split_as_the_models_were_trained(pre: str, pieces: list[str]) -> None:
    backend = load_tokenizer_from_gguf(gguf_byte_level(pre)).backend
    split = backend.pre_tokenizer.pre_tokenize_str("in 2024, X")
    assert [piece for piece, _ in split] == pieces


def sentencepiece_reference(metadata: dict[str, Any], text: str) -> list[int]:
    """SentencePiece's BPE: while there is one, join the neighbours whose union scores highest."""
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    normal = {t: i for i, t in enumerate(tokens) if metadata["tokenizer.ggml.token_type"][i] == 1}
    symbols = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        joins = [
            (-scores[normal[a + b]], i)
            for i, (a, b) in enumerate(pairwise(symbols))
            if a + b in normal
        ]
        if not joins:
            break
        _, i = min(joins)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    ids: list[int] = []
    for symbol in symbols:
        known = symbol in normal
        ids += (
            [normal[symbol]] if known else [tokens.index(f"<0x{b:02X}>") for b in symbol.encode()]
        )
    return ids


def test_sentencepiece_ids_equal_its_algorithm_and_text_survives() -> None:
    metadata = gguf_sentencepiece()
    tokenizer = load_tokenizer_from_gguf(metadata)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == [1, *sentencepiece_reference(metadata, text)]  # BOS unless told otherwise
        assert tokenizer.decode(ids) == text


def test_sentencepiece_ids_equal_transformers() -> None:
    metadata = gguf_sentencepiece()
    tokenizer, reference = load_tokenizer_from_gguf(metadata), transformers_backend(metadata)
    for text in TEXTS:
        if not text.startswith(" "):  # transformers adds no prefix space there, SentencePiece does
            expected = reference.encode(text, add_special_tokens=False).ids
            assert tokenizer.encode(text, add_special_tokens=False) == expected


def test_sentencepiece_without_space_prefix() -> None:
    metadata = changed(gguf_sentencepiece(), "add_space_prefix", False)
    tokenizer = load_tokenizer_from_gguf(metadata)
    assert tokenizer.token_string(tokenizer.encode("The dog")[1])[0] == "T"
    assert tokenizer.decode(tokenizer.encode(" The dog")) == " The dog"


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("add_eos", [True, False])
def test_bos_and_eos_are_added_as_the_file_says(add_bos: bool, add_eos: bool) -> None:
    metadata = changed(gguf_sentencepiece(), "add_bos_token", add_bos)
    tokenizer = load_tokenizer_from_gguf(changed(metadata, "add_eos_token", add_eos))
    plain = tokenizer.encode("the dog", add_special_tokens=False)
    assert tokenizer.encode("the dog") == [1] * add_bos + plain + [2] * add_eos


def test_bos_where_the_file_does_not_say() -> None:
    for pre, has_bos in {"llama-bpe": True, "tekken": True, "qwen2": False, "gpt-2": False}.items():
        tokenizer = load_tokenizer_from_gguf(gguf_byte_level(pre))
        assert (tokenizer.encode("a")[0] == tokenizer.bos_token_id) == has_bos


def test_control_tokens_are_special_and_user_defined_ones_are_whole() -> None:
    metadata = gguf_byte_level("gpt-2")
    metadata["tokenizer.ggml.tokens"].append("<think hard>")
    metadata["tokenizer.ggml.token_type"].append(4)
    tokenizer = load_tokenizer_from_gguf(metadata)
    think, end = len(metadata["tokenizer.ggml.tokens"]) - 1, tokenizer.eos_token_id
    ids = tokenizer.encode("a<think hard>b<|end|>")
    assert ids[1] == think
    assert ids[-1] == end
    assert tokenizer.decode(ids) == "a<think hard>b"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "a<think hard>b<|end|>"
    assert think not in tokenizer.special_token_ids
    assert end in tokenizer.special_token_ids
    assert tokenizer.special_tokens == {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
    assert tokenizer.vocab_size == think + 1


def test_an_ordinary_token_that_pads_stays_ordinary() -> None:
    metadata = gguf_byte_level("gpt-2")
    padding = metadata["tokenizer.ggml.tokens"].index("!")
    tokenizer = load_tokenizer_from_gguf(changed(metadata, "padding_token_id", padding))
    assert tokenizer.decode(tokenizer.encode("the dog!")) == "the dog!"


BAD = {
    "model 'bert' is not supported": changed(gguf_byte_level("gpt-2"), "model", "bert"),
    "pre 'x' is not supported; supported: default, gpt-2": gguf_byte_level("x"),
    "ggml.tokens is missing": without(gguf_byte_level("gpt-2"), "tokens"),
    "ggml.merges is missing": without(gguf_byte_level("gpt-2"), "merges"),
    "ggml.scores is missing": without(gguf_sentencepiece(), "scores"),
    "scores has 1 entries": changed(gguf_sentencepiece(), "scores", [0.0]),
    "token_type has 2 entries": changed(gguf_sentencepiece(), "token_type", [1, 1]),
    "bos_token_id is 99999": changed(gguf_sentencepiece(), "bos_token_id", 99999),
    "'ab', which is no pair": changed(gguf_byte_level("gpt-2"), "merges", ["ab"]),
    "out of vocabulary": changed(gguf_byte_level("gpt-2"), "merges", ["zz qq"]),
    "'a' more than once": changed(gguf_byte_level("gpt-2"), "tokens", ["a", "b", "a"]),
    "not a list of strings": changed(gguf_byte_level("gpt-2"), "tokens", [1, 2]),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_metadata_is_a_one_line_model_error(message: str) -> None:
    metadata = BAD[message]
    if message.startswith("'a' more"):
        metadata = without(metadata, "token_type")
    with pytest.raises(ModelError) as error:
        load_tokenizer_from_gguf(metadata)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_text_that_is_no_unicode_or_no_string_is_refused(byte_level: Tokenizer) -> None:
    with pytest.raises(ValueError, match="not valid Unicode"):
        byte_level.encode("a\ud800b")
    with pytest.raises(ValueError, match="must be a string, got NoneType"):
        byte_level.encode(None)  # type: ignore[arg-type]


def test_token_strings(byte_level: Tokenizer, sentencepiece: Tokenizer) -> None:
    for tokenizer in (byte_level, sentencepiece):
        ids = tokenizer.encode("the dog", add_special_tokens=False)
        assert "".join(map(tokenizer.token_string, ids)).strip() == "the dog"
        assert tokenizer.token_string(tokenizer.eos_token_id or 0) in ("<|end|>", "</s>")
        assert tokenizer.token_string(10**6) == ""
    half = byte_level.encode("😀")[0]
    assert byte_level.token_string(half) == "\ufffd"
    assert sentencepiece.token_string(3 + 0xF0) == "\ufffd"


def test_smollm2_equals_transformers_with_its_digits_mended(
    smollm2: Tokenizer, smollm2_path: Path
) -> None:
    reference = AutoTokenizer.from_pretrained(smollm2_path.parent, gguf_file=smollm2_path.name)
    reference.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    messages = [{"role": "user", "content": "What is 12 x 12? 日本"}]
    text = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    for sample in [*TEXTS, text]:
        expected = reference.encode(sample)
        assert smollm2.encode(sample) == expected
        assert smollm2.decode(expected) == reference.decode(expected, skip_special_tokens=True)
        assert smollm2.decode(expected, skip_special_tokens=False) == reference.decode(expected)
    assert smollm2.vocab_size == len(reference) == 49152
    assert smollm2.special_token_ids == set(range(17))
    assert (smollm2.bos_token_id, smollm2.eos_token_id) == (1, 2)


def test_smollm2_known_ids(smollm2: Tokenizer) -> None:
    pieces = [smollm2.token_string(i) for i in smollm2.encode("<|im_start|>In 2024, 😀")]
    assert pieces[:8] == ["<|im_start|>", "In", " ", "2", "0", "2", "4", ","]


@pytest.mark.alone
def test_smollm2_loads_quickly(smollm2_metadata: Mapping[str, Any]) -> None:
    metadata = dict(smollm2_metadata)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        load_tokenizer_from_gguf(metadata)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.4
