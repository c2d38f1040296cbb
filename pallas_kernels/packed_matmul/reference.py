"""The products from their formula, in XLA operations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.packed_matmul.layout import GATES, PANEL, unpack


def matmul(
    x: jax.Array,  # [T, K]
    kernels: jax.Array,  # [L, panels, K / 2, 32]
    layer: jax.Array | int,
    num_rows: jax.Array | int,
    *,
    num_columns: int,
    gated: bool,
    dtype: DTypeLike,
) -> jax.Array:
    """Every case that api.py describes."""
    kernel = kernels[layer]
    if gated:
        both = _product(x, unpack(kernel, kernel.shape[0] * PANEL))
        both = both.reshape(x.shape[0], -1, 2, GATES)
        gate, value = (both[:, :, i].reshape(x.shape[0], -1)[:, :num_columns] for i in (0, 1))
        product = jax.nn.silu(gate) * value
    else:
        product = _product(x, unpack(kernel, num_columns))
    is_real = jnp.arange(x.shape[0])[:, None] < num_rows
    return jnp.where(is_real, product, 0).astype(dtype)


def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.dot(x, kernel, preferred_element_type=jnp.float32)
