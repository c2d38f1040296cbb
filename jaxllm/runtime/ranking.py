"""The best of a row: its largest entries, and the likeliest continuations of a beam."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.engine.beam_search import MAX_CANDIDATES

TOP_K_BLOCK = 32  # entries of a block when looking for the largest: first blocks, then entries
LANES = 128  # of a TPU's registers
SIZES = (32, MAX_CANDIDATES)  # how many candidates are looked for


class Candidates(NamedTuple):
    """The likeliest next tokens of R rows, best first; minus infinity where there is none."""

    token_ids: jax.Array  # [R, MAX_CANDIDATES] int32
    logprobs: jax.Array  # [R, MAX_CANDIDATES] float32


def top_k(x: jax.Array, k: int, num_wanted: Any = None) -> tuple[jax.Array, jax.Array]:
    """The k largest entries of each row [R, n] and their indices, as jax.lax.top_k. num_wanted: of
    them, traced; the others may be missing. None: all.

    The k blocks with the largest maxima hold them, also where entries are equal: of those the first
    blocks and in them the first entries count. On CPU three times faster than over whole rows. For
    TPU the compiler takes a minute to lay out a sort of a few thousand entries, so they are taken
    one by one there.
    """
    return jax.lax.platform_dependent(
        x,
        k if num_wanted is None else num_wanted,
        tpu=partial(_from_strided_blocks, k=k),
        default=lambda x, _: _from_blocks(x, k),
    )


def _from_blocks(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    num_rows, size = x.shape
    if -(-size // TOP_K_BLOCK) <= k:
        values, indices = jax.lax.top_k(x, k)
        return values, indices
    padding = ((0, 0), (0, -size % TOP_K_BLOCK))
    blocks = jnp.pad(x, padding, constant_values=-jnp.inf).reshape(num_rows, -1, TOP_K_BLOCK)
    _, chosen = jax.lax.top_k(blocks.max(axis=-1), k)  # [R, k]
    chosen = jnp.sort(chosen, axis=-1)
    entries = jnp.take_along_axis(blocks, chosen[:, :, None], axis=1)  # [R, k, TOP_K_BLOCK]
    values, places = jax.lax.top_k(entries.reshape(num_rows, -1), k)
    block = jnp.take_along_axis(chosen, places // TOP_K_BLOCK, axis=-1)
    return values, block * TOP_K_BLOCK + places % TOP_K_BLOCK


def _from_strided_blocks(
    x: jax.Array, num_wanted: jax.Array, *, k: int
) -> tuple[jax.Array, jax.Array]:
    """Block b has entries b, b + the number of blocks, ..., so that maxima need no moves between
    lanes. The order of equal entries is that of their indices throughout."""
    num_rows, size = x.shape
    num_blocks = -(-size // (TOP_K_BLOCK * LANES)) * LANES
    if num_blocks <= k:
        return _one_by_one(x, k, num_wanted)
    padding = ((0, 0), (0, num_blocks * TOP_K_BLOCK - size))
    blocks = jnp.pad(x, padding, constant_values=-jnp.inf).reshape(num_rows, TOP_K_BLOCK, -1)
    index = jax.lax.broadcasted_iota(jnp.int32, blocks.shape[1:], 0) * num_blocks
    index += jax.lax.broadcasted_iota(jnp.int32, blocks.shape[1:], 1)
    maxima = blocks.max(axis=1)  # [R, blocks]
    first = jnp.where(blocks == maxima[:, None], index, index.size).min(axis=1)
    _, found = _one_by_one(maxima, k, num_wanted, first)  # [R, k], an entry in each of k blocks
    chosen = found % num_blocks
    entries = jnp.take_along_axis(blocks, chosen[:, None, :], axis=2)  # [R, TOP_K_BLOCK, k]
    indices = jnp.arange(TOP_K_BLOCK)[:, None] * num_blocks + chosen[:, None, :]
    entries, indices = entries.reshape(num_rows, -1), indices.reshape(num_rows, -1)
    return _one_by_one(entries, k, num_wanted, indices)


def _one_by_one(
    x: jax.Array, k: int, num_wanted: jax.Array | int, index: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """The k largest entries of each row [R, n], of equal ones those of the lowest index [R, n];
    None: their place. An entry that is given twice counts once; minus infinity and 0 stand for
    those that are not wanted."""
    index = jnp.arange(x.shape[1], dtype=jnp.int32) if index is None else index
    beyond = jnp.iinfo(jnp.int32).max

    def take(i: jax.Array, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        values, indices = found
        before = jnp.maximum(i - 1, 0)
        last_value, last_index = values[before][:, None], indices[before][:, None]
        is_left = (i == 0) | (x < last_value) | ((x == last_value) & (index > last_index))
        value = jnp.where(is_left, x, -jnp.inf).max(axis=1)  # [R]
        is_next = is_left & (x == value[:, None])
        return values.at[i].set(value), indices.at[i].set(
            jnp.where(is_next, index, beyond).min(axis=1)
        )

    shape = (k, x.shape[0])
    start = jnp.full(shape, -jnp.inf, x.dtype), jnp.zeros(shape, jnp.int32)
    values, indices = jax.lax.fori_loop(0, jnp.minimum(num_wanted, k), take, start)
    return values.T, indices.T


def find_candidates(
    logits: jax.Array,  # [S, V] float32
    temperature: jax.Array,  # [S] float32
    num_candidates: jax.Array,  # [S] int32, 0: not wanted
    restrict: Callable[[jax.Array], jax.Array],
) -> Candidates:
    """At least so many of each row, if it has them. restrict: its logits [S, V] with minus infinity
    for tokens that must not come; what these have counts in the log-probabilities of the others. A
    batch without beams computes nothing."""
    num_rows, vocab_size = logits.shape
    most, none = num_candidates.max(), partial(no_candidates, num_rows)

    def find(size: int) -> Candidates:
        scaled = logits / jnp.where(num_candidates > 0, temperature, 1.0)[:, None]
        log_total = jax.nn.logsumexp(scaled, axis=-1, keepdims=True)
        found = min(size, vocab_size)
        values, token_ids = top_k(restrict(scaled), found, most)
        missing = ((0, 0), (0, MAX_CANDIDATES - found))
        return Candidates(
            jnp.pad(token_ids.astype(jnp.int32), missing),
            jnp.pad(values - log_total, missing, constant_values=-jnp.inf),
        )

    def of_size() -> Candidates:
        branch = sum((most > size).astype(jnp.int32) for size in (0, *SIZES[:-1]))
        return jax.lax.switch(branch, [none, *(partial(find, size) for size in SIZES)])

    def of_any_size() -> Candidates:  # where time depends on how many are wanted
        return jax.lax.cond(most > 0, partial(find, MAX_CANDIDATES), none)

    return jax.lax.platform_dependent(tpu=of_any_size, default=of_size)


def no_candidates(num_rows: int) -> Candidates:
    """What stands in for candidates that nobody asked for."""
    shape = (num_rows, MAX_CANDIDATES)
    return Candidates(jnp.zeros(shape, jnp.int32), jnp.full(shape, -jnp.inf, jnp.float32))
