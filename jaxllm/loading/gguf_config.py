"""GGUF metadata to a ModelConfig."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxllm.config import LARGEST, ModelConfig, ModelError, RopeConfig, check_size
from jaxllm.models.rope import llama3_frequencies, rope_frequencies

# GGUF's architecture -> Hugging Face's; Mistral's files say "llama"
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
END_TOKENS = ("eos_token_id", "eot_token_id", "eom_token_id")  # of tokenizer.ggml
SCALING_DEFAULTS = {  # what is not computed here, and the value at which it does nothing
    "attn_factor": 1.0,
    "yarn_attn_factor": 1.0,
    "yarn_ext_factor": 1.0,
    "yarn_log_multiplier": 0.1,
}
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {  # the same of other keys
    "expert_count": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "embedding_scale": (0, 1),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "use_parallel_residual": (False,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.temperature_scale": (0,),
    "attention.causal": (True,),
}
LLAMA3_LOW_FREQ, LLAMA3_HIGH_FREQ = 1.0, 4.0  # of every Llama 3 release
LLAMA3_CONTEXTS = tuple(1 << bits for bits in (13, 12, 11, 14, 15, 16, 17))  # 8192 in the releases


@dataclass(frozen=True)
class GGUFTensors:
    """What the configuration has to know of the tensors. rope_freqs: None, or reads the tensor
    of the same name."""

    names: Collection[str]
    vocab_size: int
    checkpoint_dtype: str
    rope_freqs: Callable[[], np.ndarray] | None = None


class _Keys:
    """Typed access to "<arch>.<key>"; raises ModelError naming the key."""

    def __init__(self, metadata: Mapping[str, Any], prefix: str) -> None:
        self.metadata = metadata
        self.prefix = prefix

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.metadata.get(f"{self.prefix}.{key}", default)
        if type(value) is not int:
            kind = "one integer for all layers" if isinstance(value, list) else "an integer"
            raise ModelError(f"GGUF key {self.prefix}.{key} must be {kind}, got {_short(value)}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.metadata.get(f"{self.prefix}.{key}", default)
        if type(value) not in (int, float):
            raise ModelError(f"GGUF key {self.prefix}.{key} must be a number, got {_short(value)}")
        with np.errstate(over="ignore"):  # infinity is refused by who asked
            return float(str(np.float32(value)))  # 9.999999747e-06 was written as 1e-05


def _short(value: Any) -> str:
    return "nothing" if value is None else repr(value)[:40]


def model_config_from_gguf(metadata: Mapping[str, Any], tensors: GGUFTensors) -> ModelConfig:
    """The model that a GGUF file describes. Raises ModelError naming the key."""
    keys = _Keys(metadata, _architecture(metadata))
    arch = keys.prefix
    num_heads = keys.integer("attention.head_count")
    hidden_size = keys.integer("embedding_length")
    head_dim = keys.integer("attention.key_length", hidden_size // max(num_heads, 1))
    max_position = keys.integer("context_length")
    num_layers = keys.integer("block_count")
    # checked here already, before a list of as many windows is made
    check_size(f"GGUF key {arch}.block_count", num_layers, LARGEST["num_layers"])
    _refuse_unsupported(keys, head_dim)
    _check_tokens(metadata, tensors.vocab_size)
    return ModelConfig(
        architecture=ARCHITECTURES[arch],
        vocab_size=tensors.vocab_size,
        hidden_size=hidden_size,
        intermediate_size=keys.integer("feed_forward_length"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=keys.integer("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        max_position_embeddings=max_position,
        rms_norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        rope=_rope(keys, tensors, head_dim, max_position),
        tie_word_embeddings="output.weight" not in tensors.names,
        qkv_bias=arch == "qwen2" or "blk.0.attn_q.bias" in tensors.names,
        attention_output_bias="blk.0.attn_output.bias" in tensors.names,
        mlp_bias="blk.0.ffn_gate.bias" in tensors.names,
        qk_norm=arch == "qwen3",
        sliding_windows=_sliding_windows(keys, num_layers, max_position),
        eos_token_ids=_end_tokens(metadata),
        checkpoint_dtype=tensors.checkpoint_dtype,
    )


def _architecture(metadata: Mapping[str, Any]) -> str:
    arch = metadata.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise ModelError(
            f"GGUF architecture {arch!r} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    if metadata.get("split.count", 1) not in (0, 1):
        raise ModelError(
            f"the file is one of {metadata['split.count']} parts; merge them with llama.cpp's "
            f"llama-gguf-split --merge"
        )
    return arch


def _refuse_unsupported(keys: _Keys, head_dim: int) -> None:
    """What is not computed here and would change the model's output."""
    for key, supported in (
        ("rope.dimension_count", head_dim),
        ("attention.value_length", head_dim),
    ):
        _check_neutral(keys, key, supported)
    for key, neutral in NEUTRAL_VALUES.items():
        _check_neutral(keys, key, *neutral)
    _check_neutral(keys, "attention.scale", 0, float(np.float32(max(head_dim, 1) ** -0.5)))


def _check_neutral(keys: _Keys, key: str, *neutral: Any) -> None:
    value = keys.metadata.get(f"{keys.prefix}.{key}", neutral[0])
    if value not in neutral:
        supported = " or ".join(map(str, neutral))
        raise ModelError(
            f"GGUF key {keys.prefix}.{key} is {_short(value)}; only {supported} is supported here"
        )


def _check_tokens(metadata: Mapping[str, Any], vocab_size: int) -> None:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if tokens is not None and len(tokens) > vocab_size:
        raise ModelError(
            f"the tokenizer has {len(tokens)} tokens, but token_embd.weight only {vocab_size} rows"
        )


def _end_tokens(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    ids = [metadata.get(f"tokenizer.ggml.{name}") for name in END_TOKENS]
    return tuple(dict.fromkeys(token_id for token_id in ids if type(token_id) is int))


def _sliding_windows(keys: _Keys, num_layers: int, max_position: int) -> tuple[int, ...]:
    window = keys.integer("attention.sliding_window", 0)
    if not 0 < window < max_position:
        return ()
    if keys.prefix != "llama":  # the format does not say which of Qwen's layers have one
        raise ModelError(f"GGUF key {keys.prefix}.attention.sliding_window is not supported")
    return (window,) * num_layers


def _rope(keys: _Keys, tensors: GGUFTensors, head_dim: int, max_position: int) -> RopeConfig:
    unscaled = RopeConfig("default", keys.number("rope.freq_base", 10000.0))
    kind, factor = _rope_scaling(keys)
    if tensors.rope_freqs is not None:
        if kind != "none":
            raise ModelError(f"GGUF has both rope_freqs.weight and rope scaling {kind!r}")
        return _llama3(unscaled, head_dim, tensors.rope_freqs())
    if kind == "none":
        return unscaled
    if kind == "linear":
        return RopeConfig("linear", unscaled.theta, factor)
    return RopeConfig(
        "yarn",
        unscaled.theta,
        factor,
        keys.integer("rope.scaling.original_context_length", max_position),
        beta_fast=keys.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=keys.number("rope.scaling.yarn_beta_slow", 1.0),
    )


def _rope_scaling(keys: _Keys) -> tuple[str, float]:
    """The type, which is "none" where nothing is scaled, and the factor. As llama.cpp reads them:
    no type is "linear", the older key holds where the newer is absent, a factor of 0 is 1."""
    kind = keys.metadata.get(f"{keys.prefix}.rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise ModelError(f"GGUF rope scaling {kind!r} is not supported; supported: linear, yarn")
    for key, default in SCALING_DEFAULTS.items():
        if keys.number(f"rope.scaling.{key}", default) != default:
            raise ModelError(f"GGUF key {keys.prefix}.rope.scaling.{key} is not supported")
    old_factor = keys.number("rope.scale_linear", 1.0)
    factor = keys.number("rope.scaling.factor", old_factor) or 1.0
    return ("none" if kind == "linear" and factor == 1.0 else kind), factor


def _llama3(unscaled: RopeConfig, head_dim: int, divisors: np.ndarray) -> RopeConfig:
    """rope_freqs.weight holds what each frequency is divided by, not the parameters it came from:
    those of the Llama 3 releases are tried, and taken only if they give the same numbers."""
    if divisors.shape != (head_dim // 2,):
        raise ModelError(f"rope_freqs.weight has shape {divisors.shape}, not ({head_dim // 2},)")
    if np.all(divisors == 1):
        return unscaled
    theta, factor = unscaled.theta, float(divisors.max())
    frequencies = rope_frequencies(theta, head_dim)
    for context in LLAMA3_CONTEXTS:
        rope = RopeConfig("llama3", theta, factor, context, LLAMA3_LOW_FREQ, LLAMA3_HIGH_FREQ)
        expected = frequencies / llama3_frequencies(rope, frequencies, context)
        if np.allclose(divisors, expected, rtol=1e-4):
            return rope
    raise ModelError("rope_freqs.weight does not hold a Llama 3 scaling; others are not supported")
