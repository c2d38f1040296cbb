"""Tokenizers of Hugging Face folders, against transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from small_vocabularies import TEXTS, gguf_sentencepiece, train_byte_level
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from jaxllm.config import ModelError
from jaxllm.text.tokenizer import load_tokenizer_from_folder, load_tokenizer_from_gguf


def write_folder(folder: Path, bos_in_file: bool = False, **config: Any) -> Path:
    """A byte-level tokenizer.json, and a tokenizer_config.json with these entries."""
    backend = train_byte_level()
    if bos_in_file:
        backend.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
        )
    backend.enable_truncation(4)  # left over from training, as in some published files
    backend.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<|begin|>", "eos_token": "<|end|>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def reference(folder: Path) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.backend_tokenizer.no_truncation()
    return tokenizer


def assert_equal(folder: Path) -> None:
    ours, theirs = load_tokenizer_from_folder(folder), reference(folder)
    for text in [*TEXTS, "the fox<|tool|>fox<a<x>b<pad>"]:
        for add in (True, False):
            expected = theirs.encode(text, add_special_tokens=add)
            assert ours.encode(text, add_special_tokens=add) == expected
            for skip in (True, False):
                assert ours.decode(expected, skip) == theirs.decode(
                    expected, skip_special_tokens=skip
                )
    assert ours.vocab_size == len(theirs)
    assert ours.special_tokens == theirs.special_tokens_map
    assert ours.bos_token_id == theirs.bos_token_id
    assert ours.eos_token_id == theirs.eos_token_id
    assert ours.special_token_ids >= set(theirs.all_special_ids)


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"unk_token": "<unk>"},
    "no flags, BOS in tokenizer.json": {"bos_in_file": True, "unk_token": "<unk>"},
    "BOS": {"add_bos_token": True, "unk_token": "<unk>"},
    "EOS": {"add_eos_token": True, "unk_token": "<unk>"},
    "both": {"add_bos_token": True, "add_eos_token": True, "unk_token": "<unk>"},
    "flags against tokenizer.json": {
        "bos_in_file": True, "add_bos_token": False, "unk_token": "<unk>",
    },
    "no BOS token": {"bos_token": None, "add_bos_token": True, "unk_token": "<unk>"},
    "tokens as objects": {
        "bos_token": {"content": "<|begin|>", "special": True, "__type": "AddedToken"},
        "unk_token": {"content": "<unk>", "special": True, "__type": "AddedToken"},
    },
    "a special token that tokenizer.json lacks": {
        "unk_token": "<unk>", "pad_token": "<pad>", "additional_special_tokens": ["<x>", "<y>"],
    },
    "added tokens of the configuration": {
        "unk_token": "<unk>",
        "added_tokens_decoder": {
            str(500 + i): {
                "content": name, "special": special, "lstrip": False, "rstrip": False,
                "normalized": False, "single_word": False,
            }
            for i, (name, special) in enumerate([("fox<", False), ("<|tool|>", True)])
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_ids_and_texts_equal_transformers(name: str, tmp_path: Path) -> None:
    assert_equal(write_folder(tmp_path, **CONFIGS[name]))


def test_sentencepiece_folder_equals_the_gguf_tokenizer(tmp_path: Path) -> None:
    gguf = load_tokenizer_from_gguf(gguf_sentencepiece())
    gguf.backend.save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer_from_folder(tmp_path)
    for text in TEXTS:
        assert tokenizer.encode(text) == gguf.encode(text) == reference(tmp_path).encode(text)
    assert tokenizer.special_tokens == config


def test_vocab_and_merges_without_tokenizer_json(tmp_path: Path) -> None:
    train_byte_level().model.save(str(tmp_path))
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|end|>", "bos_token": "<|begin|>"}
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({**config, "unk_token": "<unk>", "chat_template": "{{ bos_token }}"})
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    ours, theirs = load_tokenizer_from_folder(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)
    assert (ours.bos_token_id, ours.eos_token_id) == (0, 1)
    assert ours.chat_template == "{{ bos_token }}"


def test_where_the_chat_template_comes_from(tmp_path: Path) -> None:
    write_folder(tmp_path)
    assert load_tokenizer_from_folder(tmp_path).chat_template is None
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    write_folder(tmp_path, chat_template=named)
    assert load_tokenizer_from_folder(tmp_path).chat_template == "D"
    write_folder(tmp_path, chat_template="S")
    assert load_tokenizer_from_folder(tmp_path).chat_template == "S"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "J"}))
    assert load_tokenizer_from_folder(tmp_path).chat_template == "J"
    (tmp_path / "chat_template.jinja").write_text("F é", encoding="utf-8")
    assert load_tokenizer_from_folder(tmp_path).chat_template == "F é"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", "{", "tokenizer.json is not a usable tokenizer"),
        ("tokenizer.json", "{}", "tokenizer.json is not a usable tokenizer"),
        ("tokenizer.json", '{"model": {"type": "Foo"}}', "is not a usable tokenizer"),
        ("tokenizer_config.json", "{", "tokenizer_config.json is not valid JSON"),
        ("tokenizer_config.json", "[]", "must hold a JSON object, got list"),
        ("tokenizer_config.json", '{"bos_token": 1}', "bos_token must be a string, got 1"),
        ("tokenizer_config.json", '{"chat_template": 1}', "chat template must be a string"),
        ("tokenizer_config.json", '{"chat_template": {"a": 1}}', "chat template must be a string"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"a": 1}}', "malformed token"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"1": 1}}', "malformed token"),
        ("tokenizer_config.json", '{"additional_special_tokens": [1]}', "malformed token"),
        ("chat_template.jinja", b"\xff\xfe\xff", "chat_template.jinja is not UTF-8"),
        ("tokenizer_config.json", b"\xff\xfe\xff", "tokenizer_config.json is not valid JSON"),
    ],
)
def test_corrupt_files_are_one_line_model_errors(
    file: str, content: str | bytes, message: str, tmp_path: Path
) -> None:
    write_folder(tmp_path)
    (tmp_path / file).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ModelError) as error:
        load_tokenizer_from_folder(tmp_path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no tokenizer\.json"):
        load_tokenizer_from_folder(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not a SentencePiece model")
    with pytest.raises(ModelError, match="cannot convert its tokenizer"):
        load_tokenizer_from_folder(tmp_path)


def test_loading_imports_neither_transformers_nor_jax(tmp_path: Path) -> None:
    write_folder(tmp_path)
    code = (
        "import sys; from pathlib import Path;"
        "from jaxllm.text.tokenizer import load_tokenizer_from_folder as load;"
        "import jaxllm.text.detokenizer, jaxllm.text.chat_template;"
        f"load(Path({str(tmp_path)!r})).encode('a');"
        "print([m for m in ('jax', 'transformers', 'torch') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
