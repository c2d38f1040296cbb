"""config.json and generation_config.json, as transformers writes them, to a ModelConfig."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxllm.config import LARGEST, ROPE_TYPES, ModelConfig, ModelError, RopeConfig

DTYPES = ("float32", "float16", "bfloat16")
DEFAULT_THETA = 10000.0
# Keys of other architectures, which would change the result, and where they do nothing; so does a
# null. Two of them change these architectures too in transformers: is_causal and hidden_act.
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "hidden_activation": ("silu", "swish"),
    "is_causal": (True,),
    "use_bidirectional_attention": (False,),
    "partial_rotary_factor": (1,),
    "rotary_pct": (1,),
    "rope_interleave": (False,),
    "rope_interleaved": (False,),
    "rope_local_base_freq": (),
    "layer_rope_theta": (),
    "no_rope_layer_interval": (0,),
    "alibi": (False,),
    "attention_chunk_size": (0,),
    "attn_temperature_tuning": (False,),
    "attn_logit_softcapping": (0,),
    "attention_logit_cap": (0,),
    "final_logit_softcapping": (0,),
    "logits_soft_cap": (0,),
    "output_logit_soft_cap": (0,),
    "clip_qkv": (),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "output_multiplier": (1,),
    "lm_head_multiplier": (1,),
    "embedding_multiplier": (1,),
    "embedding_scale": (1,),
    "scale_embedding": (False,),
    "scale_emb": (1,),
    "scale_depth": (),
    "mup_enabled": (False,),
    "residual_multiplier": (1,),
    "residual_scale": (1,),
    "key_multiplier": (1,),
    "qk_scale_factor": (1,),
    "attention_value_scale": (1,),
    "attention_in_multiplier": (1,),
    "attention_out_multiplier": (1,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "scale_attn_weights": (True,),
    "parallel_attn": (False,),
    "use_parallel_residual": (False,),
    "use_post_norm": (False,),
}
GENERATION_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class Family:
    """What differs between architectures. defaults: transformers' own for keys that a config.json
    may leave out. windows: how sliding windows are chosen: "none", "all" or "by_layer"."""

    defaults: dict[str, Any]
    windows: str = "none"
    qkv_bias: bool = False
    bias_option: bool = False  # has "attention_bias", for all four projections
    mlp_bias_option: bool = False
    qk_norm: bool = False


_QWEN = {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096}
FAMILIES = {
    "LlamaForCausalLM": Family(
        {"max_position_embeddings": 2048, "eos_token_id": 2},
        bias_option=True,
        mlp_bias_option=True,
    ),
    "MistralForCausalLM": Family(
        {
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
            "eos_token_id": 2,
        },
        windows="all",
    ),
    "Qwen2ForCausalLM": Family(
        {**_QWEN, "max_window_layers": 28}, windows="by_layer", qkv_bias=True
    ),
    "Qwen3ForCausalLM": Family(
        {**_QWEN, "max_window_layers": 28, "head_dim": 128},
        windows="by_layer",
        bias_option=True,
        qk_norm=True,
    ),
}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises ModelError naming the file."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: must hold a JSON object, got {type(value).__name__}")
    return value


class Fields:
    """Typed access to a JSON object. A key that is absent has the family's default, and without
    one it is missing; a null is None. Raises ModelError naming file and key."""

    def __init__(self, path: Path, values: dict[str, Any], defaults: dict[str, Any]) -> None:
        self.path = path
        self.values = {**defaults, **values}

    def error(self, key: str, expected: str) -> ModelError:
        if key not in self.values:
            return ModelError(f"{self.path}: key {key!r} is missing; it must be {expected}")
        return ModelError(f"{self.path}: {key!r} must be {expected}, got {self.values[key]!r}")

    def integer(self, key: str) -> int:
        value = self.values.get(key)
        if type(value) is not int:
            raise self.error(key, "an integer")
        if not -(1 << 63) <= value < 1 << 63:  # so that no quotient of two is beyond any float
            raise self.error(key, "an integer of 64 bits")
        return value

    def optional_integer(self, key: str) -> int | None:
        return None if self.values.get(key) is None else self.integer(key)

    def number(self, key: str) -> float:
        value: Any = self.values.get(key)
        if type(value) not in (int, float):
            raise self.error(key, "a number")
        if not abs(value) <= sys.float_info.max:  # NaN, infinity, or an integer beyond any float
            raise self.error(key, "a finite number")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        return None if self.values.get(key) is None else self.number(key)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value


def model_config_from_hf(folder: Path) -> ModelConfig:
    """The model in a Hugging Face folder, or of a config.json itself. Raises ModelError naming file
    and key for what is missing, of the wrong type, or would change the result and is not
    supported."""
    path = folder if folder.is_file() else folder / "config.json"
    values = read_json(path)
    architecture = _architecture(path, values)
    family = FAMILIES[architecture]
    fields = Fields(path, values, family.defaults)
    num_heads = _positive(fields, "num_attention_heads")
    head_dim = _head_dim(fields, num_heads)
    _refuse_unsupported(fields, family, head_dim)
    rope = _rope(fields)
    attention_bias = family.bias_option and fields.flag("attention_bias")
    num_kv_heads = fields.optional_integer("num_key_value_heads")
    num_layers = _positive(fields, "num_hidden_layers")
    if num_layers > LARGEST["num_layers"]:  # checked before a list of as many windows is made
        raise fields.error("num_hidden_layers", f"at most {LARGEST['num_layers']}")
    try:
        return ModelConfig(
            architecture=architecture,
            vocab_size=_positive(fields, "vocab_size"),
            hidden_size=_positive(fields, "hidden_size"),
            intermediate_size=_positive(fields, "intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_heads if num_kv_heads is None else num_kv_heads,
            head_dim=head_dim,
            max_position_embeddings=_positive(fields, "max_position_embeddings"),
            rms_norm_eps=fields.number("rms_norm_eps") if "rms_norm_eps" in values else 1e-6,
            rope=rope,
            tie_word_embeddings=fields.flag("tie_word_embeddings"),
            qkv_bias=family.qkv_bias or attention_bias,
            attention_output_bias=attention_bias,
            mlp_bias=family.mlp_bias_option and fields.flag("mlp_bias"),
            qk_norm=family.qk_norm,
            sliding_windows=_sliding_windows(fields, family, num_layers),
            eos_token_ids=_end_tokens(fields, path.parent),
            checkpoint_dtype=_checkpoint_dtype(fields),
        )
    except ModelError as error:
        raise _with_path(path, error) from error


def _with_path(path: Path, error: ModelError) -> ModelError:
    text = str(error)
    return error if text.startswith(str(path)) else ModelError(f"{path}: {text}")


def _architecture(path: Path, values: dict[str, Any]) -> str:
    names = values.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise ModelError(f"{path}: 'architectures' must be a list with one name, got {names!r}")
    if names[0] not in FAMILIES:
        raise ModelError(
            f"{path}: architecture {names[0]!r} is not supported; supported: {', '.join(FAMILIES)}"
        )
    return names[0]


def _positive(fields: Fields, key: str) -> int:
    value = fields.integer(key)
    if value < 1:
        raise fields.error(key, "a positive integer")
    return value


def _refuse_unsupported(fields: Fields, family: Family, head_dim: int) -> None:
    """What is not computed here and would change the model's output."""
    values = fields.values
    for key, neutral in NEUTRAL_VALUES.items():
        _check_neutral(fields, key, *neutral)
    for key in ("use_qk_norm", "qk_layernorm"):
        _check_neutral(fields, key, family.qk_norm)
    _check_neutral(fields, "rotary_dim", head_dim)
    _check_neutral(fields, "query_pre_attn_scalar", head_dim)
    _check_neutral(fields, "attention_multiplier", max(head_dim, 1) ** -0.5)
    rotated = values.get("no_rope_layers")  # one truth value a layer
    if rotated and not (isinstance(rotated, list) and all(rotated)):
        raise fields.error("no_rope_layers", "1 for each layer, others are not supported")
    if values.get("quantization_config"):
        method = values["quantization_config"]
        method = method.get("quant_method") if isinstance(method, dict) else method
        raise ModelError(
            f"{fields.path}: 'quantization_config' ({method}) is not supported; use the "
            f"unquantised checkpoint or a GGUF file"
        )


def _check_neutral(fields: Fields, key: str, *neutral: Any) -> None:
    value = fields.values.get(key)
    if value is not None and value not in neutral:
        supported = " or ".join(map(repr, neutral)) or "null"
        raise fields.error(key, f"{supported}, others are not supported")


def _head_dim(fields: Fields, num_heads: int) -> int:
    head_dim = fields.optional_integer("head_dim")
    if head_dim is not None:
        return head_dim
    hidden_size = fields.integer("hidden_size")
    if hidden_size % num_heads:
        raise ModelError(
            f"{fields.path}: 'hidden_size' ({hidden_size}) must be a multiple of "
            f"'num_attention_heads' ({num_heads}) where no 'head_dim' is given"
        )
    return hidden_size // num_heads


def _sliding_windows(fields: Fields, family: Family, num_layers: int) -> tuple[int, ...]:
    """One window a layer; () when no layer has one."""
    layer_types = _layer_types(fields, num_layers)
    window = fields.optional_integer("sliding_window") if family.windows != "none" else None
    if family.windows == "by_layer" and not fields.flag("use_sliding_window"):
        window = None
    if window is not None and window < 1:
        raise fields.error("sliding_window", "a positive integer or null")
    if layer_types is None:
        first = fields.integer("max_window_layers") if family.windows == "by_layer" else 0
        slides = [layer >= first for layer in range(num_layers)]
        slides = slides if window is not None else [False] * num_layers
    else:
        slides = [layer_type == "sliding_attention" for layer_type in layer_types]
    if any(slides) and window is None:
        raise fields.error("sliding_window", "set and in use where 'layer_types' has sliding ones")
    if family.windows == "all" and window is not None and not all(slides):
        # transformers ignores layer_types here, others do not: the checkpoint is ambiguous
        raise fields.error("layer_types", "'sliding_attention' for each layer of this architecture")
    return tuple(window or 0 if slide else 0 for slide in slides) if any(slides) else ()


def _layer_types(fields: Fields, num_layers: int) -> list[str] | None:
    types = fields.values.get("layer_types")
    if types is None:
        return None
    known = ("full_attention", "sliding_attention")
    if (
        not isinstance(types, list)
        or len(types) != num_layers
        or any(layer_type not in known for layer_type in types)
    ):
        raise fields.error("layer_types", f"a list of {num_layers} of {' and '.join(known)}")
    return types


def _end_tokens(fields: Fields, folder: Path) -> tuple[int, ...]:
    """Every token that ends an answer: of config.json, then of generation_config.json."""
    eos = _token_ids(fields)
    path = folder / "generation_config.json"
    if path.exists():
        eos = eos + _token_ids(Fields(path, read_json(path), {}))
    return tuple(dict.fromkeys(eos))


def _token_ids(fields: Fields) -> list[int]:
    value = fields.values.get("eos_token_id")
    values = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(token_id) is not int for token_id in values):
        raise fields.error("eos_token_id", "an integer, a list of integers or null")
    return values


def _checkpoint_dtype(fields: Fields) -> str:
    key = "dtype" if fields.values.get("dtype") is not None else "torch_dtype"
    dtype = fields.values.get(key)
    if dtype is None:
        return "bfloat16"
    if dtype not in DTYPES:
        raise fields.error(key, f"one of {', '.join(DTYPES)}")
    return dtype


def _rope(fields: Fields) -> RopeConfig:
    """From "rope_parameters" (transformers 5), or "rope_scaling" and "rope_theta" (before)."""
    key = "rope_scaling" if fields.values.get("rope_scaling") else "rope_parameters"
    values = fields.values.get(key) or {}
    if not isinstance(values, dict):
        raise fields.error(key, "an object or null")
    if any(isinstance(value, dict) for value in values.values()):
        raise ModelError(f"{fields.path}: {key!r} differs between layers, which is not supported")
    rope = Fields(fields.path, values, {})
    rope_type = values.get("rope_type", values.get("type", "default"))
    if rope_type not in ROPE_TYPES:
        raise ModelError(
            f"{fields.path}: rope_type {rope_type!r} is not supported; supported: "
            f"{', '.join(ROPE_TYPES)}"
        )
    _check_neutral(rope, "partial_rotary_factor", 1)
    theta = rope.optional_number("rope_theta") or fields.optional_number("rope_theta")
    try:
        return RopeConfig(
            rope_type, theta or DEFAULT_THETA, **_rope_options(rope_type, rope, fields)
        )
    except ModelError as error:
        raise _with_path(fields.path, error) from error


def _rope_options(rope_type: str, rope: Fields, fields: Fields) -> dict[str, Any]:
    """The parameters of one type with transformers' defaults."""
    if rope_type == "default":
        return {}
    max_position = _positive(fields, "max_position_embeddings")
    if rope_type == "linear":
        return {"factor": rope.number("factor")}
    if rope_type == "dynamic":  # stretches from the length that the model states
        return {"factor": rope.number("factor"), "original_max_position_embeddings": max_position}
    original = _original_length(rope, fields, max_position)
    if rope_type == "llama3":
        numbers = ("factor", "low_freq_factor", "high_freq_factor")
        options = {name: rope.number(name) for name in numbers}
        if not 0 < options["low_freq_factor"] < options["high_freq_factor"]:
            raise rope.error("high_freq_factor", "greater than 'low_freq_factor', both positive")
        return {**options, "original_max_position_embeddings": original}
    return {"original_max_position_embeddings": original, **_yarn(rope, max_position / original)}


def _original_length(rope: Fields, fields: Fields, max_position: int) -> int:
    """The key beside the rope parameters wins over the one among them, as in transformers."""
    key = "original_max_position_embeddings"
    source = fields if fields.values.get(key) is not None else rope
    return max_position if source.optional_integer(key) is None else _positive(source, key)


def _yarn(rope: Fields, implied_factor: float) -> dict[str, Any]:
    if "factor" not in rope.values:
        raise rope.error("factor", "a number")
    factor = rope.optional_number("factor")
    return {
        "factor": implied_factor if factor is None else factor,
        "beta_fast": rope.optional_number("beta_fast") or 32.0,
        "beta_slow": rope.optional_number("beta_slow") or 1.0,
        "attention_factor": rope.optional_number("attention_factor"),
        "mscale": rope.optional_number("mscale"),
        "mscale_all_dim": rope.optional_number("mscale_all_dim"),
        "truncate": rope.flag("truncate", True),
    }


def generation_defaults(folder: Path) -> dict[str, Any]:
    """Sampling options that generation_config.json recommends; {} without that file."""
    path = folder / "generation_config.json"
    if not path.exists():
        return {}
    fields = Fields(path, read_json(path), {})
    defaults: dict[str, Any] = {}
    for name in GENERATION_DEFAULTS:
        if fields.values.get(name) is not None:
            integer = name == "top_k"
            defaults[name] = fields.integer(name) if integer else fields.number(name)
    return defaults
