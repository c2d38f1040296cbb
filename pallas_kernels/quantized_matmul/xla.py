"""Quantized products in plain XLA operations, for any device that no Pallas kernel supports."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.quantized_matmul.layout import dequantize, quantize_rows


def matmul(
    x: jax.Array,  # [T, K]
    weights: jax.Array,  # [L, K, N]
    scales: jax.Array,  # [L, 1, N] or [L, ceil(K / G), N]
    zeros: jax.Array | None,
    layer: jax.Array | int,
    *,
    group_size: int | None,
    int8_rows: bool,
    dtype: DTypeLike,
) -> jax.Array:
    """Every case that api.py describes. Whether the dequantized kernel is written to memory is the
    compiler's choice."""
    kernel, scale = weights[layer], scales[layer]
    if int8_rows:
        rows, row_scales = quantize_rows(x)
        sums = jax.lax.dot(rows, kernel, preferred_element_type=jnp.int32)
        return (sums.astype(jnp.float32) * row_scales * scale).astype(dtype)
    zero = None if zeros is None else zeros[layer]
    kernel = dequantize(kernel, scale, zero, group_size)
    product = jax.lax.dot(x, kernel, preferred_element_type=jnp.float32)
    if group_size is None:
        product *= scale
    return product.astype(dtype)
