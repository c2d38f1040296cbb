"""Small vocabularies trained on a few sentences, as GGUF metadata."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog. The dog sleeps; the fox doesn't.",
    "In 2024 there were 12345 tokens, and they're all different: 3.14, 42, 1000000.",
    "Füße, naïve, 日本語のテキスト, русский текст, 😀😃👩‍👩‍👧 and\n\n  indented\tlines.",
    "def f(x):\n    return [x**2 for x in range(10)]  # the squares",
]
TEXTS = [
    *CORPUS,
    "",
    " ",
    "  two spaces first and last  ",
    "The fox<|end|>the dog",
    "1234567 1,234 x2y3",
    "\r\n\r\n \t the\u00a0dog é e\u0301 ﬁ ① ½",
    "👨‍👩‍👧‍👦🏳️‍🌈 زبان हिन्दी",
]
SPECIAL = ["<|begin|>", "<|end|>", "<unk>"]


def train_byte_level(vocab_size: int = 500) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS * 3, trainer)
    return backend


def vocabulary(backend: Tokenizer) -> list[str]:
    tokens = [backend.id_to_token(i) for i in range(backend.get_vocab_size())]
    assert None not in tokens
    return tokens


def gguf_byte_level(pre: str) -> dict[str, Any]:
    """Metadata as a converter would write it for a GPT-2 style vocabulary."""
    backend = train_byte_level()
    model = backend.model.__getstate__()
    merges = [" ".join(merge) for merge in json.loads(model)["merges"]]
    tokens = vocabulary(backend)
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if t in SPECIAL else 1 for t in tokens],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": tokens.index("<|begin|>"),
        "tokenizer.ggml.eos_token_id": tokens.index("<|end|>"),
        "tokenizer.chat_template": "{{ messages[0]['content'] }}",
    }


def gguf_sentencepiece() -> dict[str, Any]:
    """Metadata of a SentencePiece BPE vocabulary: merges as scores, byte fallback."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False)
    backend.train_from_iterator([text for text in CORPUS if text.isascii()] * 3, trainer)
    pieces = vocabulary(backend)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    types = [2, 3, 3, *[6] * 256, *[1] * len(pieces)]
    scores = [0.0] * 259 + [-float(i) for i in range(len(pieces))]
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
