"""Block copies in plain XLA operations: a gather and a scatter."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def copy_blocks(pool: jax.Array, pairs: jax.Array, source: jax.Array | None) -> jax.Array:
    """Every case that api.py describes. Copied blocks are in memory twice meanwhile."""
    source = pool if source is None else source
    read, write = pairs[:, 0], pairs[:, 1]
    is_source = (read >= 0) & (read < source.shape[1])
    is_target = (write >= 0) & (write < pool.shape[1])
    blocks = source[:, jnp.where(is_source, read, 0)]  # [L, P, ...]
    write = jnp.where(is_source & is_target, write, pool.shape[1])  # out of range: dropped
    return pool.at[:, write].set(blocks, mode="drop")
