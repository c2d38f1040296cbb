"""Rotary embeddings against transformers' own frequencies, tables and rotation."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from jaxllm.config import ModelConfig, ModelError, RopeConfig
from jaxllm.models.rope import (
    apply_rope,
    build_rope,
    rope_tables,
    rotated_heads,
    turned_at_once,
)

YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}
SCALED = {
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    "llama 3.1": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {**YARN, "original_max_position_embeddings": 32768},
    "yarn, context length from the model": YARN,
    "yarn, given attention factor": {**YARN, "attention_factor": 1.7},
    "yarn, both mscales": {**YARN, "mscale": 0.707, "mscale_all_dim": 1.0},
    "yarn, one mscale is not used": {**YARN, "mscale": 0.707},
    "yarn, own betas, not truncated": {**YARN, "beta_fast": 16, "beta_slow": 2, "truncate": False},
    "yarn, factor below 1": {**YARN, "factor": 0.5},
    "yarn, ramp without width": {**YARN, "beta_fast": 3.0, "beta_slow": 3.0, "truncate": False},
}


def configs(rope: dict[str, Any], **options: Any) -> tuple[LlamaConfig, ModelConfig]:
    """The same model to transformers and to jaxllm."""
    sizes = {"head_dim": 128, "max_position_embeddings": 4096, **options}
    hf = LlamaConfig(rope_parameters=dict(rope), **sizes)
    values = dict(rope)
    ours = RopeConfig(theta=values.pop("rope_theta"), **values)
    return hf, ModelConfig(
        "LlamaForCausalLM", 128, 64, 64, 2, 4, 2, rms_norm_eps=1e-5, rope=ours, **sizes
    )


@pytest.mark.parametrize("name", SCALED)
def test_frequencies_equal_transformers(name: str) -> None:
    hf, ours = configs(SCALED[name])
    expected, attention_factor = ROPE_INIT_FUNCTIONS[SCALED[name]["rope_type"]](hf)
    rope = build_rope(ours)
    assert rope.inv_freq.dtype == np.float32
    np.testing.assert_allclose(rope.inv_freq, expected.numpy(), rtol=1e-6)
    assert rope.attention_factor == pytest.approx(attention_factor, rel=1e-12)


@pytest.mark.parametrize("name", ["linear", "llama 3.1", "yarn"])
def test_tables_equal_transformers(name: str) -> None:
    hf, ours = configs(SCALED[name])
    positions = np.array([0, 1, 2, 17, 1000, 4095, 30000], np.int32)
    table = LlamaRotaryEmbedding(hf)(torch.zeros(1), torch.from_numpy(positions)[None])
    cos, sin = jax.jit(lambda p: rope_tables(build_rope(ours), p, p + 1))(positions)
    for actual, expected in zip((cos, sin), table, strict=True):
        # The last bit of an angle below 2 ** 15 is 2 ** -9; transformers rounds in another order.
        np.testing.assert_allclose(actual, expected[0, :, :64].numpy(), rtol=0, atol=2**-9)
        np.testing.assert_allclose(actual[:5], expected[0, :5, :64].numpy(), rtol=0, atol=2**-14)


def test_dynamic_frequencies_follow_each_sequence() -> None:
    """One step holds sequences of different lengths: each token is turned as in its own."""
    hf, ours = configs(SCALED["dynamic"], max_position_embeddings=64)
    rope = build_rope(ours)
    rope_lens = np.array([5, 64, 65, 200, 1000], np.int32)
    cos, sin = rope_tables(rope, jnp.full(5, 3), rope_lens)
    for row, length in enumerate(rope_lens):
        table = LlamaRotaryEmbedding(hf)(torch.zeros(1), torch.arange(length)[None])
        np.testing.assert_allclose(cos[row], table[0][0, 3, :64].numpy(), atol=1e-5)
        np.testing.assert_allclose(sin[row], table[1][0, 3, :64].numpy(), atol=1e-5)
    np.testing.assert_array_equal(cos[0], cos[1])  # no scaling within the trained context
    assert np.abs(cos[1] - cos[2]).max() > 1e-4


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rotation_equals_transformers(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((5, 3, 16)), dtype)
    angles = rng.uniform(0, 2 * math.pi, (5, 8)).astype(np.float32)
    turned = apply_rope(x, jnp.cos(angles), jnp.sin(angles))
    whole = torch.from_numpy(np.concatenate([angles, angles], axis=-1))
    heads = torch.from_numpy(np.array(x, np.float32))
    expected, _ = apply_rotary_pos_emb(heads, heads, whole.cos(), whole.sin())
    assert turned.dtype == dtype
    rounding = 2**-8 if dtype == jnp.bfloat16 else 1e-6  # once, at the end
    np.testing.assert_allclose(np.asarray(turned, np.float32), expected, rtol=rounding, atol=1e-6)


@pytest.mark.parametrize("rotate", [rotated_heads, turned_at_once])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_heads_of_groups_are_turned_but_for_the_values(rotate: Any, dtype: Any) -> None:
    rng = np.random.default_rng(1)
    qkv = jnp.asarray(rng.standard_normal((5, 2, 3 + 2, 16)), dtype)  # [T, K, G+2, D]
    angles = rng.uniform(0, 2 * math.pi, (5, 8)).astype(np.float32)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    q, k, v = rotate(qkv, cos, sin)
    heads = [qkv[:, group, i] for group in range(2) for i in range(3)]
    tolerance = {"rtol": 2**-8 if dtype == jnp.bfloat16 else 1e-6, "atol": 1e-6}
    for turned, expected in (
        (q, apply_rope(jnp.stack(heads, axis=1), cos, sin)),
        (k, apply_rope(qkv[:, :, 3], cos, sin)),
        (v, qkv[:, :, 4]),
    ):
        assert turned.dtype == dtype
        np.testing.assert_allclose(
            np.asarray(turned, np.float32), np.asarray(expected, np.float32), **tolerance
        )


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("rope", "options", "message"),
    [
        (SCALED["dynamic"], {"head_dim": 2}, "'dynamic' needs head_dim of at least 4, got 2"),
        ({**SCALED["llama 3.1"], "low_freq_factor": 4.0}, {}, "low_freq_factor < high_freq_factor"),
        ({**YARN, "rope_theta": 1.0}, {}, "needs rope_theta above 1, got 1.0"),
        ({**YARN, "beta_slow": 0.0}, {}, "needs positive beta_fast and beta_slow"),
        ({**YARN, "beta_fast": 1e308}, {}, "cannot use a beta_fast or beta_slow of 1e.308"),
        ({**YARN, "beta_slow": 5e-324}, {}, "cannot use a beta_fast or beta_slow of 5e-324"),
        ({**YARN, "attention_factor": -1.0}, {}, "attention_factor must be .*, got -1.0"),
        ({**YARN, "attention_factor": 1e300}, {}, "attention_factor must be .*, got 1e.300"),
        ({"rope_type": "default", "rope_theta": 1e300}, {}, "theta 1e.300 .*frequency of 0.0"),
        ({"rope_type": "default", "rope_theta": 1e-300}, {}, "theta 1e-300 .*frequency of inf"),
        ({**SCALED["linear"], "factor": 1e-300}, {}, "factor 1e-300 .*frequency of inf"),
        ({**SCALED["llama 3.1"], "factor": 1e-300}, {}, "factor 1e-300 .*frequency of (inf|nan)"),
        ({**YARN, "factor": 1e-300}, {}, "factor 1e-300 .*frequency of (inf|nan)"),
    ],
)
def test_values_that_describe_no_rotation(
    rope: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    values = dict(rope)
    config = RopeConfig(theta=values.pop("rope_theta"), **values)
    sizes = {"head_dim": 128, "max_position_embeddings": 4096, **options}
    model = ModelConfig(
        "LlamaForCausalLM", 128, 64, 64, 2, 4, 2, rms_norm_eps=1e-5, rope=config, **sizes
    )
    with pytest.raises(ModelError, match=message):
        build_rope(model)
