"""Where the tokens of a ragged batch lie: in the batch, in the pool, in the bits of an element."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

BITS_OF_BFLOAT16 = jnp.uint16  # a pool of this type holds bfloat16 bit for bit (see encode_pool)


class TokenRows(NamedTuple):
    """For each of the T query tokens: its sequence, its position there, and whether it is real."""

    sequence: jax.Array  # [T] int32
    position: jax.Array  # [T] int32
    valid: jax.Array  # [T] bool


def token_rows(
    num_tokens: int, seq_lens: jax.Array, query_start: jax.Array, distribution: jax.Array
) -> TokenRows:
    """Rows past the last real sequence are padding: position 0 of the last row of the batch."""
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    num_seqs = distribution[2]
    starts = jnp.where(jnp.arange(seq_lens.shape[0]) < num_seqs, query_start[1:], num_tokens)
    sequence = jnp.searchsorted(starts, token, side="right", method="compare_all")
    sequence = jnp.minimum(sequence, seq_lens.shape[0] - 1).astype(jnp.int32)
    valid = token < query_start[num_seqs]
    position = seq_lens[sequence] - (query_start[sequence + 1] - token)
    return TokenRows(sequence, jnp.where(valid, position, 0), valid)


def encode_pool(values: jax.Array, pool_dtype: jnp.dtype) -> jax.Array:
    """Values as the pool stores them.

    XLA's CPU backend turns a gather or scatter on bfloat16 into one on float32 of the whole
    operand; a pool of uint16 holds the same bits and is left alone.
    """
    if pool_dtype == BITS_OF_BFLOAT16:
        return jax.lax.bitcast_convert_type(values.astype(jnp.bfloat16), jnp.uint16)
    if jnp.issubdtype(pool_dtype, jnp.integer):
        limits = jnp.iinfo(pool_dtype)
        return jnp.clip(jnp.round(values), limits.min, limits.max).astype(pool_dtype)
    if jnp.finfo(pool_dtype).bits == 8:  # saturate: a cast of these formats would give NaN
        limit = float(jnp.finfo(pool_dtype).max)
        return jnp.clip(values, -limit, limit).astype(pool_dtype)
    return values.astype(pool_dtype)


def decode_pool(stored: jax.Array, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """Stored elements as numbers of dtype, before any scale."""
    if stored.dtype == BITS_OF_BFLOAT16:
        stored = jax.lax.bitcast_convert_type(stored, jnp.bfloat16)
    return stored.astype(dtype)


def write_new_tokens(
    kv_pool: jax.Array,  # [L, N, B, 2K, D]
    layer: jax.Array | int,
    k: jax.Array,  # [T, K, D]
    v: jax.Array,  # [T, K, D]
    rows: TokenRows,
    block_tables: jax.Array,  # [S, M]
    k_scale: jax.Array | float,
    v_scale: jax.Array | float,
) -> jax.Array:
    """The pool with the new keys and values in their places: heads k0, v0, k1, v1, ..."""
    num_blocks, block_size = kv_pool.shape[1:3]
    new = new_elements(k, v, k_scale, v_scale, kv_pool.dtype)  # [T, K, 2, D]
    new = new.reshape(k.shape[0], -1, k.shape[2])  # [T, 2K, D]
    block = block_tables[rows.sequence, rows.position // block_size]  # [T]
    block = jnp.where(rows.valid, block, num_blocks)  # out of range: dropped
    return kv_pool.at[layer, block, rows.position % block_size].set(
        new, mode="drop", unique_indices=True
    )


def new_elements(
    k: jax.Array,  # [T, K, D]
    v: jax.Array,  # [T, K, D]
    k_scale: jax.Array | float,
    v_scale: jax.Array | float,
    pool_dtype: jnp.dtype,
) -> jax.Array:
    """New keys and values as the pool stores them, [T, K, 2, D]."""
    if isinstance(k_scale, jax.Array) or k_scale != 1.0:
        k = k.astype(jnp.float32) / jnp.asarray(k_scale, jnp.float32).reshape(-1, 1)
    if isinstance(v_scale, jax.Array) or v_scale != 1.0:
        v = v.astype(jnp.float32) / jnp.asarray(v_scale, jnp.float32).reshape(-1, 1)
    return encode_pool(jnp.stack([k, v], axis=2), pool_dtype)
