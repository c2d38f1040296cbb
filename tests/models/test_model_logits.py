"""Logits of each family and variation against transformers on torch, in float32 and bfloat16."""

from __future__ import annotations

from typing import Any

import hf_reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config import ModelConfig
from jaxllm.models.decoder import Model

NUM_PROMPT, NUM_TOKENS = 24, 30  # the step computes NUM_PROMPT rows; a decode pads to that many
CAPACITY = NUM_TOKENS + 1  # padded rows are written to the last place, which no mask lets through

VARIATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, tied, head size 64": ("Llama", {"head_dim": 64, "tie_word_embeddings": True}),
    "llama, multi-head, all biases, head size 96, linear rope": (
        "Llama",
        {
            "head_dim": 96,
            "num_key_value_heads": 4,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        },
    ),
    "llama, multi-query, head size 128, llama3 rope past its context": (
        "Llama",
        {
            "head_dim": 128,
            "num_key_value_heads": 1,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "llama, dynamic rope, prompt longer than the context": (
        "Llama",
        {
            "max_position_embeddings": 16,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        },
    ),
    "llama, dynamic rope, answer grows past the context": (
        "Llama",
        {
            "max_position_embeddings": 26,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0},
        },
    ),
    "mistral, window shorter than the prompt": ("Mistral", {"sliding_window": 7, "head_dim": 16}),
    "qwen2, biases, tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2, layers with and without a window": (
        "Qwen2",
        {
            "num_hidden_layers": 3,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
        },
    ),
    "qwen3, head norms, yarn rope past its context": (
        "Qwen3",
        {
            "head_dim": 32,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
}


def dense_attend(positions: jax.Array, scale: float) -> Any:
    """Softmax attention of one sequence, whose keys and values are kept in [L, 2, C, K, D]."""

    def attend(q, k, v, kv_pool, layer, window):  # type: ignore[no-untyped-def]
        kv_pool = kv_pool.at[layer, 0, positions].set(k.astype(jnp.float32))
        kv_pool = kv_pool.at[layer, 1, positions].set(v.astype(jnp.float32))
        keys, values = kv_pool[layer]  # [C, K, D]
        group = q.shape[1] // k.shape[1]
        scores = jnp.einsum("thd,chd->htc", q, keys.repeat(group, axis=1)) * scale
        distance = positions[:, None] - jnp.arange(keys.shape[0])[None, :]  # [T, C]
        seen = (distance >= 0) & ((distance < window) | (jnp.asarray(window) == 0))
        weights = jax.nn.softmax(jnp.where(seen, scores, -1e30), axis=-1)
        return jnp.einsum("htc,chd->thd", weights, values.repeat(group, axis=1)), kv_pool

    return attend


def model_logits(
    config: ModelConfig, params: dict[str, Any], layer_loop: Any, dtype: Any, tokens: np.ndarray
) -> np.ndarray:
    """Logits of every token: the prompt in one step, then a step a token."""
    model = Model(config, layer_loop=layer_loop, dtype=dtype)
    params = jax.tree.map_with_path(
        lambda path, leaf: model.stored(np.asarray(leaf), tuple(key.key for key in path)), params
    )

    @jax.jit
    def step(params, token_ids, positions, kv_pool):  # type: ignore[no-untyped-def]
        rope_lens = jnp.maximum(NUM_PROMPT, positions + 1)
        attend = dense_attend(positions, config.head_dim**-0.5)
        hidden, kv_pool = model.forward(params, token_ids, positions, rope_lens, kv_pool, attend)
        return model.logits(params, hidden), kv_pool

    pool_shape = (config.num_layers, 2, CAPACITY, config.num_kv_heads, config.head_dim)
    kv_pool = jnp.zeros(pool_shape, jnp.float32)
    rows, start = [], 0
    for num_new in [NUM_PROMPT] + [1] * (NUM_TOKENS - NUM_PROMPT):
        token_ids = np.full(NUM_PROMPT, 3, np.int32)
        positions = np.full(NUM_PROMPT, CAPACITY - 1, np.int32)
        token_ids[:num_new] = tokens[start : start + num_new]
        positions[:num_new] = np.arange(start, start + num_new)
        logits, kv_pool = step(params, token_ids, positions, kv_pool)
        assert logits.dtype == jnp.float32
        rows.append(np.asarray(logits)[:num_new])
        start += num_new
    return np.concatenate(rows)


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 128, NUM_TOKENS).astype(np.int32)


@pytest.mark.parametrize("variation", VARIATIONS)
def test_float32_logits_equal_transformers(variation: str, tokens: np.ndarray) -> None:
    family, options = VARIATIONS[variation]
    reference = hf_reference.build(family, **options)
    config = hf_reference.model_config(reference)
    expected = hf_reference.logits(reference, tokens, NUM_PROMPT)
    for layer_loop in ("switch", "scan"):
        params = hf_reference.parameters(reference, config, layer_loop, jnp.float32)
        actual = model_logits(config, params, layer_loop, jnp.float32, tokens)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4, err_msg=layer_loop)


def test_bfloat16_logits_are_as_near_float32_as_those_of_transformers(tokens: np.ndarray) -> None:
    reference = hf_reference.build("Qwen3", head_dim=32, tie_word_embeddings=True)
    config = hf_reference.model_config(reference)
    reference.bfloat16()
    params = hf_reference.parameters(reference, config, "switch", jnp.bfloat16)
    actual = model_logits(config, params, "switch", jnp.bfloat16, tokens)
    bfloat16 = hf_reference.logits(reference, tokens, NUM_PROMPT)
    exact = hf_reference.logits(reference.float(), tokens, NUM_PROMPT)  # the rounded weights
    assert 0 < np.abs(actual - exact).mean() < 1.2 * np.abs(bfloat16 - exact).mean()
