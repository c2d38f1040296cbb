"""How the TPU kernel's pool lies in memory: [L, N, K, B / R, W], without padding in HBM.

A row holds R tokens of one key head, first their keys and then their values: W = 2RD lanes. R is
the smallest number for which W is whole tiles of 128 lanes and the keys fill more than half of one:
1 for head sizes 128 and 256, 2 for 64 and 96, 4 for 80. So the keys of a head in a block are a
matrix as the matrix unit takes it, and nothing is moved to get it.

A row's R tokens are R streams to the kernel. Stream r has queries of its own, which are zero but
for the lanes of key r, so one product serves all streams; their softmaxes are put together last.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

LANES = 128
POOL_DTYPES = ("float32", "bfloat16", "int8", "float8_e4m3fn", "float8_e5m2")


class PoolLayout(NamedTuple):
    """Where a row of the pool has what."""

    head_dim: int  # D
    fold: int  # R, tokens of a row
    lanes: int  # W

    @property
    def key_lanes(self) -> slice:
        """Whole tiles of lanes that hold all keys of a row, from 0 on."""
        return slice(0, _whole_tiles(self.fold * self.head_dim))

    @property
    def value_lanes(self) -> slice:
        """Whole tiles of lanes that hold all values of a row."""
        start = self.fold * self.head_dim
        return slice(start - start % LANES, self.lanes)

    @property
    def key_width(self) -> int:
        return self.key_lanes.stop

    @property
    def value_width(self) -> int:
        return self.lanes - self.value_lanes.start


def pool_layout(head_dim: int) -> PoolLayout:
    """The layout for a head size."""
    fold = 1
    while (2 * fold * head_dim) % LANES or fold * head_dim < LANES // 2 + 1:
        fold *= 2
    return PoolLayout(head_dim, fold, 2 * fold * head_dim)


def physical_shape(
    num_layers: int, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int
) -> tuple[int, int, int, int, int]:
    """[L, N, K, B / R, W]. Raises ValueError where a block is not whole rows."""
    layout = pool_layout(head_dim)
    if block_size % layout.fold:
        raise ValueError(
            f"block_size {block_size} does not fit head size {head_dim}: on TPU a row of the pool "
            f"holds {layout.fold} tokens; use a multiple of it"
        )
    return num_layers, num_blocks, num_kv_heads, block_size // layout.fold, layout.lanes


def is_physical(pool_shape: tuple[int, ...], num_kv_heads: int, head_dim: int) -> bool:
    """Whether a pool of that shape has this layout. The last axis tells: it is D in the other."""
    heads_and_lanes = (num_kv_heads, pool_layout(head_dim).lanes)
    return len(pool_shape) == 5 and (pool_shape[2], pool_shape[4]) == heads_and_lanes


def unsupported(q: jax.Array, k: jax.Array, kv_pool: jax.Array) -> str | None:
    """Why the TPU kernel cannot take a case, or None if it can."""
    head_dim, num_kv_heads = q.shape[2], k.shape[1]
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"queries must be float32 or bfloat16, got {q.dtype}"
    if kv_pool.dtype.name not in POOL_DTYPES:
        return f"the pool must be one of {', '.join(POOL_DTYPES)}, got {kv_pool.dtype}"
    if not is_physical(kv_pool.shape, num_kv_heads, head_dim):
        lanes = pool_layout(head_dim).lanes
        return (
            f"the pool {kv_pool.shape} is not [L, N, {num_kv_heads}, B / R, {lanes}], "
            f"see tpu_layout.to_physical"
        )
    return None


def to_physical(pool: jax.Array) -> jax.Array:
    """[L, N, B, 2K, D] -> [L, N, K, B / R, W]."""
    num_layers, num_blocks, block_size, doubled_heads, head_dim = pool.shape
    shape = physical_shape(num_layers, num_blocks, block_size, doubled_heads // 2, head_dim)
    fold = pool_layout(head_dim).fold
    split = pool.reshape(
        num_layers, num_blocks, block_size // fold, fold, doubled_heads // 2, 2, head_dim
    )
    return split.transpose(0, 1, 4, 2, 5, 3, 6).reshape(shape)


def to_logical(pool: jax.Array, head_dim: int) -> jax.Array:
    """[L, N, K, B / R, W] -> [L, N, B, 2K, D]."""
    num_layers, num_blocks, num_kv_heads, num_rows, _ = pool.shape
    fold = pool_layout(head_dim).fold
    split = pool.reshape(num_layers, num_blocks, num_kv_heads, num_rows, 2, fold, head_dim)
    return split.transpose(0, 1, 3, 5, 2, 4, 6).reshape(
        num_layers, num_blocks, num_rows * fold, 2 * num_kv_heads, head_dim
    )


def _whole_tiles(lanes: int) -> int:
    return -(-lanes // LANES) * LANES


def words_of(values: jax.Array, axis: int) -> jax.Array:
    """Values as 32-bit words: those of 16 bits in pairs along an axis, the first one low."""
    if values.dtype.itemsize == 4:
        return jax.lax.bitcast_convert_type(values, jnp.int32)
    bits = jax.lax.bitcast_convert_type(values, jnp.uint16).astype(jnp.uint32)
    low, high = (jax.lax.slice_in_dim(bits, i, None, 2, axis) for i in (0, 1))
    return jax.lax.bitcast_convert_type(low | (high << 16), jnp.int32)


def values_of(words: jax.Array, dtype: jnp.dtype, axis: int) -> jax.Array:
    """The values whose words are given."""
    if jnp.dtype(dtype).itemsize == 4:
        return jax.lax.bitcast_convert_type(words, dtype)
    bits = jax.lax.bitcast_convert_type(words, jnp.uint32)
    halves = jnp.stack([bits & 0xFFFF, bits >> 16], axis=axis + 1).astype(jnp.uint16)
    shape = (*words.shape[:axis], 2 * words.shape[axis], *words.shape[axis + 1 :])
    return jax.lax.bitcast_convert_type(halves.reshape(shape), dtype)
