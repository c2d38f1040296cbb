"""The products by the C++ kernel, see native/matmul.h."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from pallas_kernels import native


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
    name = "jaxllm_matmul_f32" if jnp.dtype(dtype) == jnp.float32 else "jaxllm_matmul_bf16"
    out = jax.ShapeDtypeStruct((x.shape[0], num_columns), dtype)
    layer, num_rows = jnp.int32(layer), jnp.int32(num_rows)
    return native.call(name, out, x, kernels, layer, num_rows, swiglu=np.bool_(gated))
