"""Where float32 is kept inside: norms and products."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax import lax
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from jaxllm.config import ModelConfig, RopeConfig
from jaxllm.models.decoder import Model
from jaxllm.models.layers import RMSNorm


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])  # at the first, epsilon counts
def test_bfloat16_norm_rounds_where_transformers_does(scale: float) -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(scale * rng.standard_normal((16, 256)), jnp.bfloat16)
    weight = jnp.asarray(rng.uniform(0.5, 2, 256), jnp.bfloat16)
    reference = LlamaRMSNorm(256, eps=1e-5).bfloat16()
    with torch.no_grad():
        reference.weight.copy_(torch.from_numpy(np.array(weight, np.float32)))
        expected = reference(torch.from_numpy(np.array(x, np.float32)).bfloat16()).float().numpy()
    norm = RMSNorm(256, 1e-5, jnp.bfloat16)
    norm.scale.set_value(weight)
    actual = norm(x)
    assert actual.dtype == jnp.bfloat16
    # The order of the sum may turn a tie; rounding the squares would change a third of the values.
    assert np.mean(np.asarray(actual, np.float32) == expected) > 0.99


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(jnp.float32, lax.Precision.HIGHEST), (jnp.bfloat16, lax.Precision.DEFAULT)],
)
@pytest.mark.parametrize("tied", [True, False])
def test_every_product_sums_in_float32(dtype: Any, precision: Any, tied: bool) -> None:
    """A CPU multiplies float32 exactly at any precision; GPUs and TPUs only at the highest."""
    config = ModelConfig(
        "LlamaForCausalLM", 96, 32, 40, 1, 4, 2, 8, 64, 1e-5, RopeConfig(), tie_word_embeddings=tied
    )
    model = Model(config, layer_loop="switch", dtype=dtype)

    def step(params: Any, ids: jax.Array) -> jax.Array:
        hidden, _ = model.forward(params, ids, ids, ids + 1, None, lambda q, k, v, *_: (q, None))
        assert hidden.dtype == dtype
        return model.logits(params, hidden)

    ids = jax.ShapeDtypeStruct((8,), jnp.int32)
    jaxpr = jax.make_jaxpr(step)(model.stored_parameters(), ids).jaxpr
    products = list(_equations(jaxpr, lax.dot_general_p))
    assert len(products) == 6  # qkv, TPU's rotation, out, gate and up, down, head
    for product in products:
        assert {operand.aval.dtype for operand in product.invars} == {jnp.dtype(dtype)}
        assert product.outvars[0].aval.dtype == jnp.float32
        assert product.params["precision"] == (precision, precision)


def _equations(jaxpr: Any, primitive: Any) -> Iterator[Any]:
    """Those of a primitive, in loops and branches too."""
    for equation in jaxpr.eqns:
        if equation.primitive is primitive:
            yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple) else (value,):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    yield from _equations(getattr(inner, "jaxpr", inner), primitive)
