"""Ragged paged attention by the C++ kernel for bfloat16 on the CPU, see native/attention.h."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import native
from pallas_kernels.ragged_paged_attention.layout import BITS_OF_BFLOAT16


def supports(q: jax.Array, kv_pool: jax.Array) -> bool:
    """bfloat16 queries over a pool that holds the bits of bfloat16, which only the CPU's does."""
    is_bfloat16 = q.dtype == jnp.bfloat16 and kv_pool.dtype == BITS_OF_BFLOAT16
    return is_bfloat16 and q.shape[2] % 2 == 0 and native.is_available()


def ragged_paged_attention(
    q: jax.Array,  # [T, H, D]
    k: jax.Array,  # [T, K, D]
    v: jax.Array,  # [T, K, D]
    kv_pool: jax.Array,  # [L, N, B, 2K, D]
    layer: jax.Array | int,
    seq_lens: jax.Array,  # [S]
    block_tables: jax.Array,  # [S, M]
    query_start: jax.Array,  # [S + 1]
    distribution: jax.Array,  # [3]
    *,
    scale: float,
    window: jax.Array | int = 0,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    k_scale: jax.Array | float = 1.0,
    v_scale: jax.Array | float = 1.0,
    max_query_len: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Every case that api.py describes and `supports` allows."""
    del max_query_len  # the kernel's work follows the real numbers anyway
    num_kv_heads = k.shape[1]
    k, k_factor = _scaled(k, k_scale, num_kv_heads)
    v, v_factor = _scaled(v, v_scale, num_kv_heads)
    results = (
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        jax.ShapeDtypeStruct(kv_pool.shape, kv_pool.dtype),
    )
    return native.call(
        "jaxllm_attention", results, q, k, v, kv_pool, jnp.int32(layer), seq_lens, block_tables,
        query_start, distribution[2], jnp.int32(window),
        jnp.zeros(0, jnp.float32) if sinks is None else sinks.astype(jnp.float32),
        k_factor, v_factor,
        aliases={3: 1}, scale=np.float32(scale), soft_cap=np.float32(soft_cap or 0.0),
    )  # fmt: skip


def _scaled(
    new: jax.Array, scale: jax.Array | float, num_kv_heads: int
) -> tuple[jax.Array, jax.Array]:
    """New keys or values [T, K, D] as the pool holds them, and what to multiply them with [K]."""
    factor = jnp.broadcast_to(jnp.asarray(scale, jnp.float32), (num_kv_heads,))
    if isinstance(scale, jax.Array) or scale != 1.0:
        new = new.astype(jnp.float32) / factor[:, None]
    return new.astype(jnp.bfloat16), factor
