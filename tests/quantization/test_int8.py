"""Kernels of 8 bits against the formula and against a model with the rounded weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config import ModelConfig, RopeConfig
from jaxllm.models.decoder import LayerLoop, Model
from jaxllm.quantization import int8
from jaxllm.quantization.int8 import Int8Kernel, quantized, quantized_shape
from pallas_kernels.quantized_matmul.layout import quantize_int8

CONFIG = ModelConfig("LlamaForCausalLM", 96, 64, 128, 3, 8, 2, 8, 128, 1e-5, RopeConfig(),
                     qkv_bias=True, attention_output_bias=True, mlp_bias=True)  # fmt: skip
SHAPES = {
    "qkv_kernel": (3, 24, 40), "o_kernel": (3, 4, 6, 24), "gate_up_kernel": (3, 2, 24, 32),
    "down_kernel": (3, 16, 24), "kernel": (24, 50),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_kernels_follow_the_formula(name: str, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks of a few columns, with a channel of zeros."""
    monkeypatch.setattr(int8, "CHUNK_ELEMENTS", 100)
    shape = SHAPES[name]
    kernel = np.random.default_rng(0).normal(size=shape).astype(np.dtype(dtype))
    kernel[..., 5] = 0
    found = quantized(kernel, name)
    rows = 2 if name == "o_kernel" else 1
    matrices = kernel.reshape(*shape[: -1 - rows], -1, shape[-1])
    expected = quantize_int8(jnp.asarray(matrices))
    apart = found.weights.reshape(matrices.shape).astype(int) - expected.weights
    assert np.abs(apart).max() <= 1  # XLA multiplies with the inverse of 127, and ties fall anyhow
    assert np.count_nonzero(apart) < 0.01 * apart.size
    np.testing.assert_allclose(np.squeeze(found.scales), np.squeeze(expected.scales), rtol=2e-7)
    assert np.abs(found.weights).max() == 127
    shapes = quantized_shape(jax.ShapeDtypeStruct(shape, dtype), name)
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

    def attend(q: Any, k: Any, v: Any, pool: Any, layer: Any, window: Any) -> Any:
        mixed = jax.nn.dot_product_attention(q[None], k[None], v[None], is_causal=True)
        return mixed[0], pool

    def logits(of: Model, params: Any) -> jax.Array:
        return of.logits(params, of.forward(params, tokens, tokens, tokens + 1, None, attend)[0])

    found = logits(model, params)
    np.testing.assert_allclose(found, logits(plain, rounded), atol=2e-5)
    original = logits(plain, plain.init_parameters(jax.random.key(0)))
    assert 1e-3 < float(jnp.abs(found - original).max()) < 0.5


def _leaves(params: Any) -> list[Any]:
    return jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Int8Kernel))


def test_what_a_model_cannot_have() -> None:
    with pytest.raises(ValueError, match="quantization must be 'int8' or None, got 'int3'"):
        Model(CONFIG, "scan", jnp.float32, quantization="int3")
    config = ModelConfig("LlamaForCausalLM", 96, 64, 128, 3, 8, 2, 8, 128, 1e-5, RopeConfig())
    with pytest.raises(ValueError, match="'packed' has no quantized kernels"):
        Model(config, "packed", jnp.bfloat16, quantization="int8")
