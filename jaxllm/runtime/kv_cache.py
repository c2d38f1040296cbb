"""The block pool's array: its physical type on a platform, its size, its allocation."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxllm.config import ModelConfig
from pallas_kernels import native
from pallas_kernels.ragged_paged_attention.api import uses_tpu_layout
from pallas_kernels.ragged_paged_attention.layout import BITS_OF_BFLOAT16
from pallas_kernels.ragged_paged_attention.tpu_layout import (
    is_physical,
    physical_shape,
    pool_layout,
)


def has_tpu_layout(
    config: ModelConfig, block_size: int, platform: str, attention: str | None
) -> bool:
    """Whether the pool lies as the TPU's kernel takes it, which then runs: where that kernel is
    asked for, and on TPU wherever blocks fit it. attention: an implementation's name or None."""
    if attention is not None:
        return uses_tpu_layout(attention)
    return platform == "tpu" and block_size % pool_layout(config.head_dim).fold == 0


def pool_dtype(dtype: DTypeLike, platform: str, attention: str | None = None) -> jnp.dtype:
    """How the pool stores keys and values of dtype. On CPU bfloat16 is kept as its bits: XLA turns
    a gather or scatter on bfloat16 there into one on float32 of the whole operand."""
    is_bits = platform == "cpu" and not uses_tpu_layout(attention)
    if is_bits and jnp.dtype(dtype) == jnp.bfloat16:
        return jnp.dtype(BITS_OF_BFLOAT16)
    return jnp.dtype(dtype)


def abstract_pool(
    config: ModelConfig,
    num_blocks: int,
    block_size: int,
    dtype: DTypeLike,
    platform: str,
    attention: str | None = None,
) -> jax.ShapeDtypeStruct:
    """The pool's shape and type; allocates nothing. The shape is [L, N, B, 2K, D], or that of
    tpu_layout.py, from which ragged_paged_attention knows which kernel to run."""
    shape = (config.num_layers, num_blocks, block_size, 2 * config.num_kv_heads, config.head_dim)
    if has_tpu_layout(config, block_size, platform, attention):
        shape = physical_shape(
            config.num_layers, num_blocks, block_size, config.num_kv_heads, config.head_dim
        )
    return jax.ShapeDtypeStruct(shape, pool_dtype(dtype, platform, attention))


def head_axis(pool: Any, config: ModelConfig) -> int:
    """The axis of a pool that its heads lie along, which several devices divide."""
    return 2 if is_physical(pool.shape, config.num_kv_heads, config.head_dim) else 3


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
