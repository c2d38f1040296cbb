"""The oracle of ragged paged attention: written from the formula, slow and plain.

    out[t, h] = sum_p softmax_p(cap(scale * q[t, h] . k[p, h // G])) v[p, h // G]

where p runs over the positions that token t may see, ``cap(x) = soft_cap * tanh(x / soft_cap)``,
and a sink is one more logit in the softmax's denominator that has no value.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.ragged_paged_attention.layout import (
    decode_pool,
    token_rows,
    write_new_tokens,
)


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
    sinks: jax.Array | None = None,  # [H]
    k_scale: jax.Array | float = 1.0,
    v_scale: jax.Array | float = 1.0,
    max_query_len: int | None = None,  # a promise that nothing here needs
) -> tuple[jax.Array, jax.Array]:
    """Every case that api.py describes, over the whole block table of each token's sequence."""
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    rows = token_rows(num_tokens, seq_lens, query_start, distribution)
    kv_pool = write_new_tokens(kv_pool, layer, k, v, rows, block_tables, k_scale, v_scale)

    context = kv_pool[layer][block_tables[rows.sequence]]  # [T, M, B, 2K, D]
    context = context.reshape(num_tokens, -1, num_kv_heads, 2, head_dim)  # [T, M*B, K, 2, D]
    keys = decode_pool(context[:, :, :, 0]) * jnp.asarray(k_scale, jnp.float32).reshape(-1, 1)
    values = decode_pool(context[:, :, :, 1]) * jnp.asarray(v_scale, jnp.float32).reshape(-1, 1)

    position = jnp.arange(keys.shape[1])  # [M*B]
    visible = position <= rows.position[:, None]  # [T, M*B]
    window = jnp.asarray(window)
    visible &= (window <= 0) | (position > rows.position[:, None] - window)
    keys = jnp.where(visible[:, :, None, None], keys, 0.0)  # unused blocks may hold NaN
    values = jnp.where(visible[:, :, None, None], values, 0.0)

    group = num_heads // num_kv_heads
    grouped_q = q.astype(jnp.float32).reshape(num_tokens, num_kv_heads, group, head_dim)
    logits = scale * jnp.einsum("tkgd,tpkd->tkgp", grouped_q, keys, precision="highest")
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    logits = jnp.where(visible[:, None, None, :], logits, -jnp.inf)  # [T, K, G, M*B]
    if sinks is not None:
        sink = sinks.astype(jnp.float32).reshape(1, num_kv_heads, group, 1)
        logits = jnp.concatenate(
            [logits, jnp.broadcast_to(sink, (num_tokens, num_kv_heads, group, 1))], axis=-1
        )
    weights = jax.nn.softmax(logits, axis=-1)[..., : keys.shape[1]]
    out = jnp.einsum("tkgp,tpkd->tkgd", weights, values, precision="highest")
    out = jnp.where(rows.valid[:, None, None, None], out, 0.0)
    return out.reshape(q.shape).astype(q.dtype), kv_pool
