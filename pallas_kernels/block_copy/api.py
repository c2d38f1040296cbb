"""Copies of whole blocks, for copy-on-write and for swapping: the signature, its checks, the choice
of an implementation."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_copy import reference, tpu, xla
from pallas_kernels.device import device_kind

IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "tpu": tpu.copy_blocks,
    "xla": xla.copy_blocks,
    "reference": reference.copy_blocks,
}


def copy_blocks(
    pool: jax.Array,
    pairs: jax.Array,
    source: jax.Array | None = None,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """The pool with block pairs[i, 1] a copy of block pairs[i, 0], in all layers, for each i.

    Args:
      pool: [L, N, ...], with two axes or more behind those; donated by the caller, and then changed
        in place.
      pairs: [P, 2] int32, (block read, block written). A pair with a number below 0 or past a
        pool's end is skipped. No block may be written twice or, within one pool, both read and
        written: copies run at the same time, and what such a block holds then is not defined.
        `check_pairs` finds that out where the pairs are made.
      source: [L, M, ...], the pool that blocks are read from; None: from `pool` itself.
      implementation: a name of IMPLEMENTATIONS; None takes the best for the device.

    Raises:
      ValueError: a shape or a type does not fit.
    """

    def fail(what: str) -> None:
        raise ValueError(f"copy_blocks: {what}")

    if pool.ndim < 4:
        fail(f"pool must be [L, N, ...] of 4 axes or more, got {pool.shape}")
    if pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.dtype != jnp.int32:
        fail(f"pairs must be [P, 2] int32, got {pairs.shape} {pairs.dtype}")
    if source is not None:
        fits = source.shape[:1] + source.shape[2:] == pool.shape[:1] + pool.shape[2:]
        if not fits or source.dtype != pool.dtype:
            fail(f"source {source.shape} {source.dtype} and pool {pool.shape} {pool.dtype} differ "
                 f"in more than the number of blocks")  # fmt: skip
    if implementation is None:
        implementation = "tpu" if device_kind().startswith("TPU") else "xla"
    if implementation not in IMPLEMENTATIONS:
        fail(f"unknown implementation {implementation!r}; known: {', '.join(IMPLEMENTATIONS)}")
    return IMPLEMENTATIONS[implementation](pool, pairs, source)


def check_pairs(pairs: np.ndarray, within_one_pool: bool) -> None:
    """Raises ValueError where pairs [P, 2] write a block twice or, within one pool, read a block
    that they also write. Skipped pairs, which have a number below 0, do not count."""
    real = pairs[(pairs >= 0).all(axis=1)]
    written, counts = np.unique(real[:, 1], return_counts=True)
    if (counts > 1).any():
        raise ValueError(f"blocks {written[counts > 1].tolist()} would be written twice")
    both = np.intersect1d(real[:, 0], written)
    if within_one_pool and both.size:
        raise ValueError(f"blocks {both.tolist()} would be read and written; use two calls")
