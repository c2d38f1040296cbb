"""config.json and generation_config.json to ModelConfig, against transformers' own reading."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jaxllm.config import ModelError, RopeConfig
from jaxllm.loading.config_json import NEUTRAL_VALUES, generation_defaults, model_config_from_hf


def write(folder: Path, values: Any, name: str = "config.json") -> Path:
    (folder / name).write_text(values if isinstance(values, str) else json.dumps(values))
    return folder


def hf_values(config: Any, family: str) -> dict[str, Any]:
    return {**config.to_dict(), "architectures": [f"{family}ForCausalLM"]}


@pytest.mark.parametrize(
    ("family", "options", "expected"),
    [
        ("Llama", {}, {"head_dim": 8}),
        ("Llama", {"head_dim": 16, "num_key_value_heads": None}, {"head_dim": 16}),
        (
            "Llama",
            {"attention_bias": True, "mlp_bias": True},
            {"qkv_bias": True, "attention_output_bias": True, "mlp_bias": True},
        ),
        ("Mistral", {"sliding_window": 7}, {"sliding_windows": (7, 7, 7)}),
        ("Mistral", {"sliding_window": None}, {"sliding_windows": ()}),
        ("Qwen2", {"tie_word_embeddings": True}, {"qkv_bias": True, "tie_word_embeddings": True}),
        ("Qwen2", {"sliding_window": 5, "max_window_layers": 1}, {"sliding_windows": ()}),
        (
            "Qwen2",
            {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
            {"sliding_windows": (0, 5, 5)},
        ),
        (
            "Qwen3",
            {
                "use_sliding_window": True,
                "sliding_window": 9,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            {"qk_norm": True, "qkv_bias": False, "sliding_windows": (9, 0, 9), "head_dim": 128},
        ),
        ("Qwen3", {"attention_bias": True}, {"qkv_bias": True, "attention_output_bias": True}),
    ],
)
def test_families_as_transformers_reads_them(
    tmp_path: Path,
    tiny_config: Callable[..., Any],
    family: str,
    options: dict[str, Any],
    expected: dict[str, Any],
) -> None:
    reference = tiny_config(family, **options)
    config = model_config_from_hf(write(tmp_path, hf_values(reference, family)))
    assert config.architecture == f"{family}ForCausalLM"
    assert config.num_heads == reference.num_attention_heads
    assert config.num_kv_heads == reference.num_key_value_heads
    assert config.num_layers == reference.num_hidden_layers
    assert config.rms_norm_eps == reference.rms_norm_eps
    assert config.max_position_embeddings == reference.max_position_embeddings
    for name, value in expected.items():
        assert getattr(config, name) == value, name
    if hasattr(reference, "layer_types"):
        slides = tuple(kind == "sliding_attention" for kind in reference.layer_types)
        assert tuple(map(bool, config.sliding_windows or (0, 0, 0))) == slides


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_absent_keys_have_the_defaults_of_transformers(tmp_path: Path, family: str) -> None:
    import transformers

    sizes = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 32,
    }
    reference = getattr(transformers, f"{family}Config")(**sizes)
    config = model_config_from_hf(
        write(tmp_path, {**sizes, "architectures": [f"{family}ForCausalLM"]})
    )
    assert config.num_kv_heads == reference.num_key_value_heads
    assert config.head_dim == (getattr(reference, "head_dim", None) or 2)
    assert config.max_position_embeddings == reference.max_position_embeddings
    assert config.rms_norm_eps == reference.rms_norm_eps
    assert config.tie_word_embeddings == reference.tie_word_embeddings
    assert config.eos_token_ids == ((2,) if reference.eos_token_id == 2 else ())
    assert config.rope == RopeConfig("default", reference.rope_parameters["rope_theta"])
    window = reference.sliding_window if family == "Mistral" else 0
    assert config.sliding_windows == ((window,) * 2 if window else ())


ROPES = [
    ({"rope_type": "default"}, RopeConfig("default", 5e5)),
    ({"rope_type": "linear", "factor": 2.0}, RopeConfig("linear", 5e5, 2.0)),
    ({"rope_type": "dynamic", "factor": 4.0}, RopeConfig("dynamic", 5e5, 4.0, 256)),
    (
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        RopeConfig("llama3", 5e5, 8.0, 64, 1.0, 4.0),
    ),
    ({"rope_type": "yarn", "factor": 4.0}, RopeConfig("yarn", 5e5, 4.0, 256)),
    (
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 16,
            "beta_slow": 2,
            "attention_factor": 1.5,
            "mscale": 0.7,
            "mscale_all_dim": 0.9,
            "truncate": False,
        },
        RopeConfig(
            "yarn", 5e5, 4.0, 64,
            beta_fast=16.0, beta_slow=2.0, attention_factor=1.5, mscale=0.7, mscale_all_dim=0.9,
            truncate=False,
        ),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("rope", "expected"), ROPES)
@pytest.mark.parametrize("form", ["rope_parameters", "rope_scaling", "type"])
def test_rope_in_old_and_new_form(
    tmp_path: Path,
    tiny_config: Callable[..., Any],
    rope: dict[str, Any],
    expected: RopeConfig,
    form: str,
) -> None:
    values = hf_values(tiny_config("Llama"), "Llama")
    del values["rope_parameters"]
    if form == "rope_parameters":
        values["rope_parameters"] = {**rope, "rope_theta": 5e5}
    else:
        old = {("type" if form == "type" and k == "rope_type" else k): v for k, v in rope.items()}
        values |= {"rope_scaling": old, "rope_theta": 5e5}
    config = model_config_from_hf(write(tmp_path, values))
    assert config.rope == expected

    from transformers import AutoConfig

    reference = AutoConfig.from_pretrained(tmp_path).rope_parameters
    assert reference["rope_type"] == config.rope.rope_type
    assert reference["rope_theta"] == config.rope.theta
    assert reference.get("factor", 1.0) == config.rope.factor
    if "original_max_position_embeddings" in reference:
        original = reference["original_max_position_embeddings"]
        assert original == config.rope.original_max_position_embeddings


def test_yarn_without_a_factor_takes_the_ratio_of_the_lengths(
    tmp_path: Path, tiny_config: Callable[..., Any]
) -> None:
    values = hf_values(tiny_config("Llama"), "Llama")
    values["rope_parameters"] = {
        "rope_type": "yarn", "factor": None, "original_max_position_embeddings": 32,
    }  # fmt: skip
    assert model_config_from_hf(write(tmp_path, values)).rope.factor == 8.0


def test_every_end_token_is_taken_config_first(
    tmp_path: Path, tiny_config: Callable[..., Any]
) -> None:
    values = hf_values(tiny_config("Llama", eos_token_id=[5, 3]), "Llama")
    write(tmp_path, {"eos_token_id": [3, 9]}, "generation_config.json")
    config = model_config_from_hf(write(tmp_path, values))
    assert config.eos_token_ids == (5, 3, 9)


def test_checkpoint_dtype_by_both_names(tmp_path: Path, tiny_config: Callable[..., Any]) -> None:
    values = hf_values(tiny_config("Llama"), "Llama")
    for key in ("dtype", "torch_dtype"):
        found = model_config_from_hf(write(tmp_path, {**values, "dtype": None, key: "float16"}))
        assert found.checkpoint_dtype == "float16"


BAD = [
    ({"architectures": ["GPT2LMHeadModel"]}, "'GPT2LMHeadModel' is not supported; supported: Llam"),
    ({"architectures": None}, "'architectures'"),
    ({"architectures": [["x"]]}, "'architectures'"),
    ({"hidden_size": "32"}, "'hidden_size' must be an integer, got '32'"),
    ({"hidden_size": True}, "'hidden_size'"),
    ({"num_hidden_layers": 0}, "'num_hidden_layers' must be a positive integer"),
    ({"hidden_size": 33, "head_dim": None}, "multiple of 'num_attention_heads'"),
    ({"num_attention_heads": 0}, "'num_attention_heads'"),
    ({"num_key_value_heads": 3}, "multiple of num_kv_heads"),
    ({"head_dim": 7}, "head_dim must be even"),
    ({"rms_norm_eps": None}, "'rms_norm_eps' must be a number"),
    ({"rms_norm_eps": 2}, "rms_norm_eps must be in"),
    ({"rms_norm_eps": float("nan")}, "'rms_norm_eps' must be a finite number"),
    ({"num_key_value_heads": 0}, "num_kv_heads must be a positive integer"),
    ({"tie_word_embeddings": "yes"}, "'tie_word_embeddings' must be true or false"),
    ({"eos_token_id": 4000}, "eos_token_id 4000 is outside the vocabulary"),
    ({"eos_token_id": "2"}, "'eos_token_id'"),
    ({"hidden_act": "gelu"}, "'hidden_act' must be 'silu'"),
    ({"is_causal": False}, "'is_causal' must be True"),
    ({"attn_logit_softcapping": 50.0}, "'attn_logit_softcapping' must be 0.*, got 50.0"),
    ({"final_logit_softcapping": 30.0}, "'final_logit_softcapping'"),
    ({"logit_scale": 0.0625}, "'logit_scale' must be 1"),
    ({"residual_multiplier": 0.2}, "'residual_multiplier' must be 1"),
    ({"embedding_multiplier": 12}, "'embedding_multiplier' must be 1"),
    ({"attention_multiplier": 0.015625}, r"'attention_multiplier' must be 0\.3535"),
    ({"query_pre_attn_scalar": 256}, "'query_pre_attn_scalar' must be 8"),
    ({"clip_qkv": 8.0}, "'clip_qkv' must be null"),
    ({"no_rope_layers": [1, 1, 0]}, "'no_rope_layers' must be 1 for each layer"),
    ({"use_qk_norm": True}, "'use_qk_norm' must be False"),
    ({"rope_interleaved": True}, "'rope_interleaved' must be False"),
    ({"max_position_embeddings": 1 << 63}, "'max_position_embeddings' must be an integer of 64"),
    ({"num_hidden_layers": 10**9}, "'num_hidden_layers' must be at most 4096"),
    ({"head_dim": 10**10}, "head_dim must be at most 4096, got 10{10}"),
    ({"partial_rotary_factor": 0.5}, "'partial_rotary_factor'"),
    ({"quantization_config": {"quant_method": "awq"}}, r"'quantization_config' \(awq\)"),
    ({"dtype": "float8"}, "'dtype' must be one of"),
    ({"dtype": ["float32"]}, "'dtype' must be one of"),
    ({"layer_types": ["sliding_attention"] * 3}, "'sliding_window'"),
    ({"layer_types": ["full_attention"]}, "'layer_types' must be a list of 3"),
    ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type 'longrope' is not supported; sup"),
    ({"rope_parameters": {"rope_type": ["yarn"]}}, "rope_type"),
    ({"rope_parameters": {"rope_type": "linear"}}, "'factor' is missing"),
    ({"rope_parameters": {"rope_type": "linear", "factor": -1}}, "factor must be positive"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 8}}, "'low_freq_factor' is missing"),
    (
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "'partial_rotary_factor'",
    ),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differs between layers"),
    ({"rope_parameters": [1]}, "'rope_parameters' must be an object"),
    ({"rope_parameters": {"rope_theta": "x"}}, "'rope_theta' must be a number"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_values_are_refused_by_name(
    tmp_path: Path, tiny_config: Callable[..., Any], change: dict[str, Any], message: str
) -> None:
    values = hf_values(tiny_config("Llama"), "Llama") | change
    with pytest.raises(ModelError, match=message) as error:
        model_config_from_hf(write(tmp_path, values))
    assert str(error.value).startswith(str(tmp_path / "config.json"))
    assert "\n" not in str(error.value)


def test_keys_of_other_architectures_that_change_nothing_are_no_matter(
    tmp_path: Path, tiny_config: Callable[..., Any]
) -> None:
    values = hf_values(tiny_config("Llama"), "Llama")
    plain = model_config_from_hf(write(tmp_path, values))
    neutral: dict[str, Any] = {name: known[0] for name, known in NEUTRAL_VALUES.items() if known}
    neutral |= {"attention_multiplier": 8**-0.5, "query_pre_attn_scalar": 8, "rotary_dim": 8}
    neutral |= {"no_rope_layers": [1, 1, 1], "use_qk_norm": False}
    for change in (neutral, dict.fromkeys(neutral | NEUTRAL_VALUES), {"unknown": 5}):
        assert model_config_from_hf(write(tmp_path, values | change)) == plain
    qwen3 = hf_values(tiny_config("Qwen3"), "Qwen3")
    assert model_config_from_hf(write(tmp_path, qwen3 | {"use_qk_norm": True})).qk_norm


@pytest.mark.parametrize(
    "key",
    [
        "architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads",
    ],
)  # fmt: skip
def test_a_missing_key_is_named(tmp_path: Path, tiny_config: Callable[..., Any], key: str) -> None:
    values = hf_values(tiny_config("Llama"), "Llama")
    del values[key]
    with pytest.raises(ModelError, match=f"config.json: .*'{key}'"):
        model_config_from_hf(write(tmp_path, values))


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 100000, "\udcff"])
def test_what_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ModelError, match=r"config\.json"):
        model_config_from_hf(tmp_path)


def test_a_missing_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json: cannot be read"):
        model_config_from_hf(tmp_path)


def test_mistral_with_layers_of_both_kinds_is_ambiguous(
    tmp_path: Path, tiny_config: Callable[..., Any]
) -> None:
    values = hf_values(tiny_config("Mistral", sliding_window=8), "Mistral")
    values["layer_types"] = ["full_attention", "sliding_attention", "sliding_attention"]
    with pytest.raises(ModelError, match="'layer_types'"):
        model_config_from_hf(write(tmp_path, values))


def test_generation_defaults(tmp_path: Path) -> None:
    assert generation_defaults(tmp_path) == {}
    write(
        tmp_path,
        {"temperature": 0.6, "top_k": 20, "top_p": None, "do_sample": True, "eos_token_id": 1},
        "generation_config.json",
    )
    assert generation_defaults(tmp_path) == {"temperature": 0.6, "top_k": 20}
    write(tmp_path, {"temperature": "hot"}, "generation_config.json")
    with pytest.raises(ModelError, match="'temperature' must be a number"):
        generation_defaults(tmp_path)
