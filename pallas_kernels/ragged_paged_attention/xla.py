"""Ragged paged attention in plain XLA operations: the fast path of the CPU, and of any device that
no Pallas kernel supports.

Work follows real lengths: a loop over tiles of query tokens, and in it a loop over as many chunks
of the context as that tile sees, with a running softmax (Milakov and Gimelshein 2018; Dao et al.
2022). Trip counts are known at run time only, so one compiled program serves every length.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.ragged_paged_attention.layout import (
    decode_pool,
    token_rows,
    write_new_tokens,
)

MASKED = -1e30  # finite: a row that has seen only masked positions must not become NaN
CHUNK_TOKENS = 128  # context tokens of one inner iteration
TILE_TOKENS = 64  # query tokens of one outer iteration, where a sequence brings several


class _Context(NamedTuple):
    """What every tile reads."""

    kv_pool: jax.Array  # [L, N, B, 2K, D]
    layer: jax.Array | int
    seq_lens: jax.Array  # [S]
    block_tables: jax.Array  # [S, M]
    query_start: jax.Array  # [S + 1]
    window: jax.Array | int
    soft_cap: float | None
    sinks: jax.Array | None  # [H]
    q_scale: jax.Array  # [K, 1, 1]
    v_scale: jax.Array  # [K, 1, 1]


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
    """Every case that api.py describes."""
    rows = token_rows(q.shape[0], seq_lens, query_start, distribution)
    kv_pool = write_new_tokens(kv_pool, layer, k, v, rows, block_tables, k_scale, v_scale)
    num_kv_heads = k.shape[1]
    q_scale = scale * jnp.broadcast_to(jnp.asarray(k_scale, jnp.float32), (num_kv_heads,))
    context = _Context(
        kv_pool, layer, seq_lens, block_tables, query_start, window, soft_cap, sinks,
        q_scale[:, None, None],
        jnp.broadcast_to(jnp.asarray(v_scale, jnp.float32), (num_kv_heads,))[:, None, None],
    )  # fmt: skip
    num_decodes, num_seqs = distribution[0], distribution[2]
    out = jnp.zeros(q.shape, q.dtype)
    out = jax.lax.fori_loop(0, num_decodes, partial(_decode_tile, context, q), out)
    if max_query_len == 1:
        return out, kv_pool

    tile_len = min(TILE_TOKENS, q.shape[0])
    sequence = jnp.arange(seq_lens.shape[0])
    num_tiles = -(-(query_start[1:] - query_start[:-1]) // tile_len)
    num_tiles = jnp.where((sequence >= num_decodes) & (sequence < num_seqs), num_tiles, 0)
    tile_end = jnp.cumsum(num_tiles)  # [S]

    def tile(index: jax.Array, out: jax.Array) -> jax.Array:
        s = jnp.searchsorted(tile_end, index, side="right", method="compare_all")
        return _tile(context, q, out, s, index - (tile_end[s] - num_tiles[s]), tile_len)

    return jax.lax.fori_loop(0, tile_end[-1], tile, out), kv_pool


def _decode_tile(context: _Context, q: jax.Array, s: jax.Array, out: jax.Array) -> jax.Array:
    return _tile(context, q, out, s, jnp.int32(0), 1)


def _tile(
    context: _Context, q: jax.Array, out: jax.Array, s: jax.Array, tile: jax.Array, tile_len: int
) -> jax.Array:
    """out with the attention of query tokens tile * tile_len and on of sequence s in it."""
    num_heads, head_dim = q.shape[1:]
    num_kv_heads = context.q_scale.shape[0]
    group = num_heads // num_kv_heads
    query_end = context.query_start[s + 1]
    first = context.query_start[s] + tile * tile_len
    # A tile that would run over the end starts earlier and leaves the rows that are not its own.
    start = jnp.minimum(first, q.shape[0] - tile_len)
    row = start + jnp.arange(tile_len)  # [t]
    own = (row >= first) & (row < query_end)
    offset = context.seq_lens[s] - query_end
    position = row + offset  # [t]
    last = jnp.minimum(start + tile_len, query_end) - 1 + offset

    queries = jax.lax.dynamic_slice_in_dim(q, start, tile_len).astype(jnp.float32)
    queries = queries.reshape(tile_len, num_kv_heads, group, head_dim).transpose(1, 2, 0, 3)
    queries = queries.reshape(num_kv_heads, group * tile_len, head_dim) * context.q_scale
    positions = jnp.tile(position, group)  # [G * t]

    values = _running_softmax(context, s, queries, positions, first + offset, last)
    values = values.reshape(num_kv_heads, group, tile_len, head_dim).transpose(2, 0, 1, 3)
    values = values.reshape(tile_len, num_heads, head_dim).astype(out.dtype)
    if tile_len > 1:
        present = jax.lax.dynamic_slice_in_dim(out, start, tile_len)
        values = jnp.where(own[:, None, None], values, present)
    return jax.lax.dynamic_update_slice_in_dim(out, values, start, 0)


def _running_softmax(
    context: _Context,
    s: jax.Array,
    queries: jax.Array,  # [K, R, D] float32, scaled
    positions: jax.Array,  # [R]
    first: jax.Array,  # position of the first query of the tile
    last: jax.Array,  # and of the last
) -> jax.Array:
    """Attention of R = G * t query rows of sequence s, [K, R, D] float32."""
    num_kv_heads, num_rows, head_dim = queries.shape
    block_size = context.kv_pool.shape[2]
    max_blocks = context.block_tables.shape[1]
    chunk_blocks = min(max(1, CHUNK_TOKENS // block_size), max_blocks)
    chunk_len = chunk_blocks * block_size
    window = jnp.asarray(context.window)
    oldest = jnp.where(window > 0, jnp.maximum(first - window + 1, 0), 0)

    def chunk(c: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        row_max, row_sum, acc = carry
        column = jnp.minimum(c * chunk_blocks + jnp.arange(chunk_blocks), max_blocks - 1)
        kv = context.kv_pool[context.layer, context.block_tables[s, column]]  # [c, B, 2K, D]
        kv = decode_pool(kv.reshape(chunk_len, num_kv_heads, 2, head_dim))
        position = c * chunk_len + jnp.arange(chunk_len)  # [p]
        known = position <= last  # what lies behind may be NaN, and 0 * NaN is NaN
        values = jnp.where(known[:, None, None], kv[:, :, 1], 0.0)  # [p, K, D]
        logits = jnp.einsum("krd,pkd->krp", queries, kv[:, :, 0], precision="highest")
        if context.soft_cap is not None:
            logits = context.soft_cap * jnp.tanh(logits / context.soft_cap)
        visible = position <= positions[:, None]  # [R, p]
        visible &= (window <= 0) | (position > positions[:, None] - window)
        logits = jnp.where(visible, logits, MASKED)
        new_max = jnp.maximum(row_max, logits.max(axis=-1))  # [K, R]
        weights = jnp.exp(logits - new_max[..., None])
        kept = jnp.exp(row_max - new_max)
        row_sum = kept * row_sum + weights.sum(axis=-1)
        update = jnp.einsum("krp,pkd->krd", weights, values, precision="highest")
        return new_max, row_sum, kept[..., None] * acc + update

    if context.sinks is None:
        row_max = jnp.full((num_kv_heads, num_rows), MASKED, jnp.float32)
        row_sum = jnp.zeros((num_kv_heads, num_rows), jnp.float32)
    else:  # the sink is a first logit whose value is zero
        group = context.sinks.shape[0] // num_kv_heads
        sinks = context.sinks.astype(jnp.float32).reshape(num_kv_heads, group)
        row_max = jnp.repeat(sinks, num_rows // group, axis=1)
        row_sum = jnp.ones((num_kv_heads, num_rows), jnp.float32)
    acc = jnp.zeros((num_kv_heads, num_rows, head_dim), jnp.float32)
    _, row_sum, acc = jax.lax.fori_loop(
        oldest // chunk_len, last // chunk_len + 1, chunk, (row_max, row_sum, acc)
    )
    return acc / row_sum[..., None] * context.v_scale
