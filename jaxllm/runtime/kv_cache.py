"""The block pool's array: its physical type on a platform, its size, its allocation."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxllm.config import ModelConfig
from pallas_kernels import native
from pallas_kernels.ragged_paged_attention.layout import BITS_OF_BFLOAT16


def pool_dtype(dtype: DTypeLike, platform: str) -> jnp.dtype:
    """How the pool stores keys and values of dtype. On CPU bfloat16 is kept as its bits: XLA turns
    a gather or scatter on bfloat16 there into one on float32 of the whole operand."""
    if platform == "cpu" and jnp.dtype(dtype) == jnp.bfloat16:
        return jnp.dtype(BITS_OF_BFLOAT16)
    return jnp.dtype(dtype)


def pool_shape(config: ModelConfig, num_blocks: int, block_size: int) -> tuple[int, ...]:
    """[L, N, B, 2K, D]."""
    return (
        config.num_layers, num_blocks, block_size, 2 * config.num_kv_heads, config.head_dim,
    )  # fmt: skip


def abstract_pool(
    config: ModelConfig, num_blocks: int, block_size: int, dtype: DTypeLike, platform: str
) -> jax.ShapeDtypeStruct:
    """The pool's shape and type; allocates nothing."""
    shape = pool_shape(config, num_blocks, block_size)
    return jax.ShapeDtypeStruct(shape, pool_dtype(dtype, platform))


def head_axis(pool: Any) -> int:
    """The axis of a pool that its heads lie along, which several devices divide."""
    return len(pool.shape) - 2


def grows_with_use(stored: jnp.dtype) -> bool:
    """Whether a pool of that type takes its memory block by block, as they are first written."""
    return stored == BITS_OF_BFLOAT16 and native.is_available()


def new_pool(abstract: jax.ShapeDtypeStruct) -> jax.Array:
    """A pool whose content does not matter; called inside a trace. One with a sharding lies on
    several devices, or on one that is not there."""
    if abstract.sharding is None and grows_with_use(abstract.dtype):
        return native.call("jaxllm_reserve", abstract)
    return jnp.zeros(abstract.shape, abstract.dtype)


def block_bytes(config: ModelConfig, block_size: int, dtype: DTypeLike) -> int:
    """Bytes of one block over all layers."""
    elements = config.num_layers * block_size * 2 * config.num_kv_heads * config.head_dim
    return elements * jnp.dtype(dtype).itemsize


def copy_blocks(kv_pool: jax.Array, copies: jax.Array, num_copies: jax.Array) -> jax.Array:
    """The pool [L, N, ...] with the first num_copies blocks of copies [S, 2] (source, destination)
    copied, one after the other; in place, and nothing is done where there are none."""

    def copy(index: jax.Array, kv_pool: jax.Array) -> jax.Array:
        source, destination = copies[index]
        block = jax.lax.dynamic_slice_in_dim(kv_pool, source, 1, axis=1)  # [L, 1, ...]
        return jax.lax.dynamic_update_slice_in_dim(kv_pool, block, destination, axis=1)

    return jax.lax.fori_loop(0, num_copies, copy, kv_pool)
