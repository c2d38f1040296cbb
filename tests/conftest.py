"""What tests of the whole engine share: the real model, and a tiny random one as a folder."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

# Before jax is imported, here and in the processes that tests start. libtpu, which the tests of
# kernels compile with, would else be asked first for a TPU that is not there: 13 s a process.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from jaxllm.loading.hub import find_model

# Processes of pytest-xdist ignore Ctrl-C, and those that their tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

CORPUS = [
    "The quick brown fox jumps over the lazy dog. The dog sleeps; the fox doesn't.",
    "Once upon a time there was a small model that answered every question in the house.",
    "<|user|>What is the capital of France?<|end|><|assistant|>Paris.<|end|>",
]
SPECIAL_TOKENS = ["<|bos|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
VOCAB_SIZE = 320  # special tokens, 256 bytes, and what was merged


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The real model's GGUF file, fetched once into the user's cache folder."""
    path = find_model("smollm2-135m-instruct").gguf
    assert path is not None
    return path


@pytest.fixture(scope="session")
def tiny_llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LlamaForCausalLM in float32 with a byte-level tokenizer and a chat template, as
    transformers saves it: 2 layers, 4 heads, 2 KV heads, 512 positions."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    _save_model(folder)
    _save_tokenizer(folder)
    defaults = {"do_sample": True, "temperature": 0.5, "top_k": 20, "eos_token_id": 1}
    (folder / "generation_config.json").write_text(json.dumps(defaults))
    return folder


@pytest.fixture(scope="session")
def program_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for compiled programs that all processes of pytest-xdist share."""
    own = tmp_path_factory.getbasetemp()
    return (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "program-cache"


@pytest.fixture(scope="session")
def tiny_llm(program_cache: Path) -> dict[str, Any]:
    """Options that keep an engine of the tiny model small, and strict about late compilation. Its
    programs are compiled once a session."""
    return {
        "max_model_len": 256,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "forbid_compile": True,
        "cache_dir": program_cache,
    }


def _save_model(folder: Path) -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)  # so that the most likely tokens are far apart
    model.save_pretrained(folder)


def _save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|end|>",
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
