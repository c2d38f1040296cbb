"""The vocabulary in a GGUF file's metadata, made into a tokenizer of the ``tokenizers`` library.

Keys and token types: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. A GGUF file names
its pre-tokenizer instead of describing it; the table here holds what the original tokenizer.json of
those models says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from jaxllm.config import ModelError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # tokenizer.ggml.token_type
SPECIAL_TOKEN_KEYS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}

_WORD_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _WORD_ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_QWEN2 = _WORD_ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
_LOWER_WORD = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_UPPER_WORD = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_REST_SLASH = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = rf"{_LOWER_WORD}|{_UPPER_WORD}|\p{{N}}{_REST_SLASH}"
_GPT4O = rf"{_LOWER_WORD}{_WORD_ENDINGS}?|{_UPPER_WORD}{_WORD_ENDINGS}?|\p{{N}}{{1,3}}{_REST_SLASH}"


@dataclass(frozen=True)
class PreTokenizer:
    """One entry of tokenizer.ggml.pre. regex: how text is split, None for GPT-2's own."""

    regex: str | None = None
    single_digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False  # a word that is a token is taken whole
    add_bos: bool = False  # when the file does not say


_GPT2 = PreTokenizer()
_DIGITS_GPT2 = PreTokenizer(single_digits=True)
_LLAMA_BPE = PreTokenizer(_LLAMA3, ignore_merges=True, add_bos=True)
PRE_TOKENIZERS = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "olmo": _GPT2,
    "smollm": _DIGITS_GPT2,
    "starcoder": _DIGITS_GPT2,
    "llama-bpe": _LLAMA_BPE,
    "llama3": _LLAMA_BPE,
    "llama-v3": _LLAMA_BPE,
    "dbrx": PreTokenizer(_LLAMA3),
    "smaug-bpe": PreTokenizer(_LLAMA3),
    "qwen2": PreTokenizer(_QWEN2, nfc=True),
    "deepseek-r1-qwen": PreTokenizer(_QWEN2),
    "stablelm2": PreTokenizer(_QWEN2),
    "tekken": PreTokenizer(_TEKKEN, ignore_merges=True, add_bos=True),
    "gpt-4o": PreTokenizer(_GPT4O),
}


@dataclass(frozen=True)
class GgufVocabulary:
    """What the metadata says of a tokenizer. special_tokens maps "bos_token", ... to tokens."""

    backend: Tokenizer
    special_tokens: dict[str, str]
    add_bos: bool
    add_eos: bool


def build_gguf_vocabulary(metadata: Mapping[str, Any]) -> GgufVocabulary:
    """Raises ModelError if a key is missing, contradicts another or is not supported."""
    kind = metadata.get("tokenizer.ggml.model")
    tokens = _string_list(metadata, "tokenizer.ggml.tokens")
    token_types = _numbers(metadata, "tokenizer.ggml.token_type", len(tokens), default=NORMAL)
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        twice = next(token for i, token in enumerate(tokens) if vocab[token] != i)
        raise ModelError(f"GGUF: tokenizer.ggml.tokens has {twice!r} more than once")
    special = _special_tokens(metadata, tokens)
    if kind == "gpt2":
        backend, add_bos = _byte_level_bpe(metadata, vocab)
    elif kind == "llama":
        backend, add_bos = _sentencepiece_bpe(metadata, vocab, token_types, special), True
    else:
        raise ModelError(
            f"GGUF: tokenizer.ggml.model {kind!r} is not supported; supported: gpt2, llama"
        )
    _add_whole_tokens(backend, tokens, token_types, special)
    add_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", add_bos))
    add_eos = bool(metadata.get("tokenizer.ggml.add_eos_token", False))
    return GgufVocabulary(backend, special, add_bos, add_eos)


def _byte_level_bpe(metadata: Mapping[str, Any], vocab: dict[str, int]) -> tuple[Tokenizer, bool]:
    name = metadata.get("tokenizer.ggml.pre", "default")
    pre = PRE_TOKENIZERS.get(name)
    if pre is None:
        raise ModelError(
            f"GGUF: tokenizer.ggml.pre {name!r} is not supported; supported: "
            f"{', '.join(PRE_TOKENIZERS)}"
        )
    merges = _merge_pairs(metadata)
    backend = _bpe_tokenizer(vocab, merges, ignore_merges=pre.ignore_merges)
    steps: list[pre_tokenizers.PreTokenizer] = []
    if pre.single_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if pre.regex is not None:
        steps.append(pre_tokenizers.Split(Regex(pre.regex), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre.regex is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if pre.nfc:
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend, pre.add_bos


def _sentencepiece_bpe(
    metadata: Mapping[str, Any],
    vocab: dict[str, int],
    token_types: Sequence[int],
    special: Mapping[str, str],
) -> Tokenizer:
    """SentencePiece's BPE merges the pair whose result scores highest; as ranked merges that is
    every split of every token, sorted by score."""
    scores = _numbers(metadata, "tokenizer.ggml.scores", len(vocab))
    mergeable = {t: i for t, i in vocab.items() if token_types[i] == NORMAL}
    backend = _bpe_tokenizer(
        vocab,
        _merges_by_score(mergeable, scores),
        byte_fallback=True,
        fuse_unk=True,
        unk_token=special.get("unk_token"),
    )
    spaces = [normalizers.Replace(" ", "▁")]
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *spaces])
        parts.append(decoders.Strip(" ", 1, 0))
    else:
        backend.normalizer = normalizers.Sequence(spaces)
    backend.decoder = decoders.Sequence(parts)
    return backend


def _merges_by_score(mergeable: dict[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    ranked = []
    for token, token_id in mergeable.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in mergeable and right in mergeable:
                ranked.append((-scores[token_id], mergeable[left], mergeable[right], left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]


def _bpe_tokenizer(
    vocab: dict[str, int], merges: list[tuple[str, str]], **options: Any
) -> Tokenizer:
    try:
        return Tokenizer(models.BPE(vocab=vocab, merges=merges, **options))
    except Exception as error:  # the library raises plain Exception
        raise ModelError(f"GGUF: the vocabulary cannot be used: {error}") from error


def _add_whole_tokens(
    backend: Tokenizer, tokens: list[str], token_types: Sequence[int], special: Mapping[str, str]
) -> None:
    """Control and user-defined tokens are found in a text before anything else; only control
    tokens are left out of decoded text. A pad token may be an ordinary one: it does not count."""
    ends = {special.get("bos_token"), special.get("eos_token")}
    added = []
    for token, token_type in zip(tokens, token_types, strict=True):
        is_special = token_type in (CONTROL, UNKNOWN) or token in ends
        if token and (is_special or token_type == USER_DEFINED):
            added.append(AddedToken(token, normalized=False, special=is_special))
    backend.add_tokens(added)


def _special_tokens(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, str]:
    special = {}
    for name, key in SPECIAL_TOKEN_KEYS.items():
        token_id = metadata.get(f"tokenizer.ggml.{key}")
        if token_id is None:
            continue
        if not 0 <= int(token_id) < len(tokens):
            raise ModelError(
                f"GGUF: tokenizer.ggml.{key} is {token_id}, outside the vocabulary of {len(tokens)}"
            )
        special[name] = tokens[int(token_id)]
    return special


def _merge_pairs(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    pairs = []
    for merge in _string_list(metadata, "tokenizer.ggml.merges"):
        left, space, right = merge.partition(" ")
        if not (left and space and right):
            raise ModelError(f"GGUF: tokenizer.ggml.merges has {merge!r}, which is no pair")
        pairs.append((left, right))
    return pairs


def _string_list(metadata: Mapping[str, Any], key: str) -> list[str]:
    values = metadata.get(key)
    if not isinstance(values, (list, tuple)) or not all(isinstance(v, str) for v in values):
        what = "is missing" if values is None else "is not a list of strings"
        raise ModelError(f"GGUF: {key} {what}, so the file has no usable tokenizer")
    return list(values)


def _numbers(
    metadata: Mapping[str, Any], key: str, length: int, default: int | None = None
) -> Sequence[Any]:
    values = metadata.get(key)
    if values is None and default is not None:
        return [default] * length
    if values is None or len(values) != length:
        what = "is missing" if values is None else f"has {len(values)} entries for {length} tokens"
        raise ModelError(f"GGUF: {key} {what}, so the file has no usable tokenizer")
    return values
