"""Kernels of 8 bits against the formula and against a model with the rounded weights."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxllm.config import ModelConfig, RopeConfig
from jaxllm.models.decoder import LayerLoop, Model
from jaxllm.quantization import int8
from jaxllm.quantization.int8 import Int8Kernel, quantized, quantized_shape
from jaxllm.runtime.cost import product_flops
from pallas_kernels.quantized_matmul import api, tpu
from pallas_kernels.quantized_matmul.layout import quantize_int8

CONFIG = ModelConfig("LlamaForCausalLM", 96, 64, 128, 3, 8, 2, 8, 128, 1e-5, RopeConfig(),
                     qkv_bias=True, attention_output_bias=True, mlp_bias=True)  # fmt: skip


@pytest.mark.parametrize("shape", [(3, 24, 40), (3, 2, 24, 32), (24, 50)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_kernels_follow_the_formula(
    shape: tuple[int, ...], dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks of a few columns, with a channel of zeros."""
    monkeypatch.setattr(int8, "CHUNK_ELEMENTS", 100)
    kernel = np.random.default_rng(0).normal(size=shape).astype(np.dtype(dtype))
    kernel[..., 5] = 0
    found = quantized(kernel)
    expected = quantize_int8(jnp.asarray(kernel))
    apart = found.weights.astype(int) - expected.weights
    assert np.abs(apart).max() <= 1  # XLA multiplies with the inverse of 127, and ties fall anyhow
    assert np.count_nonzero(apart) < 0.01 * apart.size
    np.testing.assert_allclose(found.scales, expected.scales, rtol=2e-7)
    assert np.abs(found.weights).max() == 127
    shapes = quantized_shape(jax.ShapeDtypeStruct(shape, dtype))
    assert [(x.shape, x.dtype) for x in shapes] == [(x.shape, x.dtype) for x in found]


@pytest.mark.parametrize(
    ("layer_loop", "num_devices"), [("switch", 1), ("scan", 1), ("scan", 2), ("scan", 4)]
)
def test_logits_are_those_of_the_rounded_weights(layer_loop: LayerLoop, num_devices: int) -> None:
    tokens = jnp.arange(6)
    model = Model(CONFIG, layer_loop, jnp.float32, num_devices, quantization="int8")
    plain = Model(CONFIG, layer_loop, jnp.float32, num_devices)
    params = model.init_parameters(jax.random.key(0))
    kernels = 5 * 3 - 2 if layer_loop == "switch" else 5
    is_kernel = [isinstance(x, Int8Kernel) for x in _leaves(params)]
    assert sum(is_kernel) == kernels
    rounded = jax.tree.map(
        lambda x: x.weights * x.scales if isinstance(x, Int8Kernel) else x, params,
        is_leaf=lambda x: isinstance(x, Int8Kernel),
    )  # fmt: skip

    found = logits(model, params, tokens)
    np.testing.assert_allclose(found, logits(plain, rounded, tokens), atol=2e-5)
    original = logits(plain, plain.init_parameters(jax.random.key(0)), tokens)
    assert 1e-3 < float(jnp.abs(found - original).max()) < 0.5


def logits(model: Model, params: Any, tokens: jax.Array) -> jax.Array:
    def attend(q: Any, k: Any, v: Any, pool: Any, layer: Any, window: Any) -> Any:
        mixed = jax.nn.dot_product_attention(q[None], k[None], v[None], is_causal=True)
        return mixed[0], pool

    hidden, _ = model.forward(params, tokens, tokens, tokens + 1, None, attend)
    return model.logits(params, hidden)


@pytest.mark.parametrize("on_tpu", [False, True])
def test_stacked_kernels_of_one_device_are_read_in_place(
    on_tpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By quantized_matmul: on TPU a Pallas kernel, here in its interpreter."""
    tokens = jnp.arange(32)
    stacked = Model(CONFIG, "scan", jnp.bfloat16, quantization="int8")
    apart = Model(CONFIG, "switch", jnp.bfloat16, quantization="int8")
    params = stacked.init_parameters(jax.random.key(0))
    expected = logits(apart, apart.init_parameters(jax.random.key(0)), tokens)
    with pltpu.force_tpu_interpret_mode():
        if on_tpu:
            for module in (api, tpu):
                monkeypatch.setattr(module, "device_kind", lambda: "TPU v6 lite")
        traced = jax.jit(partial(logits, stacked)).trace(params, tokens)
        found = logits(stacked, params, tokens)
    assert str(traced.jaxpr).count("pallas_call[") == 5 * on_tpu
    plain = jax.jit(partial(logits, apart)).trace(apart.stored_parameters(), tokens)
    assert product_flops(traced.jaxpr.jaxpr) == product_flops(plain.jaxpr.jaxpr)
    np.testing.assert_allclose(found, expected, atol=0.04)  # the residual stream is bfloat16
    assert float(jnp.abs(found - expected).mean()) < 0.005


def _leaves(params: Any) -> list[Any]:
    return jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Int8Kernel))


def test_what_a_model_cannot_have() -> None:
    with pytest.raises(ValueError, match="quantization must be 'int8' or None, got 'int3'"):
        Model(CONFIG, "scan", jnp.float32, quantization="int3")
    config = ModelConfig("LlamaForCausalLM", 96, 64, 128, 3, 8, 2, 8, 128, 1e-5, RopeConfig())
    with pytest.raises(ValueError, match="'packed' has no quantized kernels"):
        Model(config, "packed", jnp.bfloat16, quantization="int8")
