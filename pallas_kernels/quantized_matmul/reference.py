"""The oracle of quantized products: from the formulas of api.py, slow and plain."""

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
    """Every case that api.py describes."""
    if int8_rows:
        rows, row_scales = quantize_rows(x)
        sums = jnp.einsum(
            "tk,kn->tn", rows.astype(jnp.int32), weights[layer].astype(jnp.int32)
        )  # [T, N], exact
        return (sums.astype(jnp.float32) * row_scales * scales[layer]).astype(dtype)
    kernel = dequantize(
        weights[layer], scales[layer], None if zeros is None else zeros[layer], group_size
    )
    product = jnp.einsum(
        "tk,kn->tn", x.astype(jnp.float32), kernel.astype(jnp.float32), precision="highest"
    )
    if group_size is None:
        product *= scales[layer]
    return product.astype(dtype)
