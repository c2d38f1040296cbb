"""Ragged paged attention: the signature, its checks, and the choice of an implementation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.ragged_paged_attention import cpu, reference, xla
from pallas_kernels.ragged_paged_attention.layout import BITS_OF_BFLOAT16
from pallas_kernels.ragged_paged_attention.tpu_layout import (
    is_physical,
    pool_layout,
    unsupported,
)


def _tpu(*args: Any, interpret: bool = False, **options: Any) -> tuple[jax.Array, jax.Array]:
    # Imported when used: Pallas takes a quarter of a second, which a start on CPU need not spend.
    from pallas_kernels.ragged_paged_attention import tpu

    return tpu.ragged_paged_attention(*args, **options, interpret=interpret)


IMPLEMENTATIONS: dict[str, Callable[..., tuple[jax.Array, jax.Array]]] = {
    "cpu": cpu.ragged_paged_attention,
    "xla": xla.ragged_paged_attention,
    "reference": reference.ragged_paged_attention,
    "tpu": _tpu,
    "tpu_interpret": partial(_tpu, interpret=True),  # on any platform, very slowly
}


def ragged_paged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kv_pool: jax.Array,
    layer: jax.Array | int,
    seq_lens: jax.Array,
    block_tables: jax.Array,
    query_start: jax.Array,
    distribution: jax.Array,
    *,
    scale: float,
    window: jax.Array | int = 0,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    k_scale: jax.Array | float = 1.0,
    v_scale: jax.Array | float = 1.0,
    max_query_len: int | None = None,
    prepared: Any = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Causal attention of new tokens over a paged context, which they join first.

    T query tokens belong to S sequences, packed one sequence after the other. Sequence s has tokens
    query_start[s] to query_start[s + 1], which are the last ones of its seq_lens[s] tokens; it sees
    itself and what came before it in the blocks of block_tables[s]. All new keys and values are in
    the pool before any query reads it, so sequences of one call may share blocks that it fills. No
    two sequences write to one block.

    Args:
      q, k, v: [T, H, D], [T, K, D], [T, K, D]; H is a multiple of K, query head h reads key head
        h // (H // K).
      kv_pool: [L, N, B, 2K, D], heads interleaved k0, v0, k1, v1, ...; donated by the caller. Its
        type is float32, bfloat16, float16, uint16 (the bits of bfloat16), int8 or a float8. For
        "tpu" it is [L, N, K, B / R, W] instead, see tpu_layout.py.
      layer: which of the L layers to write and read; an int or a traced int32 scalar.
      seq_lens: [S] int32, tokens of each sequence including the new ones.
      block_tables: [S, M] int32, indices into N; entries past a sequence's end are not read.
      query_start: [S + 1] int32, non-decreasing.
      distribution: [3] int32 (i, j, n): sequences 0 to i have exactly one new token, those up to j
        a few, those up to n any number; from n on they are padding, as are tokens from
        query_start[n] on, whose output is zero and which write nothing.
      scale: what the products of queries and keys are multiplied with.
      window: tokens that a query sees, itself included; 0 for all. An int or a traced scalar.
      soft_cap: c > 0 replaces each logit x by c * tanh(x / c).
      sinks: [H], one more logit a head in the softmax's denominator.
      k_scale, v_scale: a scalar or [K]: stored keys (values) times this are the true ones.
      max_query_len: a bound on the new tokens of a sequence that the caller promises; 1 lets a
        program for decoding leave out what several need. None: no bound.
      prepared: what `prepare` made of the same arguments; None: it is made here.
      implementation: a name of IMPLEMENTATIONS; None takes the best for the pool: "tpu" for one in
        its layout, "cpu" where that is supported, else "xla".

    Returns:
      out [T, H, D] in q's type, and the pool with the new tokens.

    Raises:
      ValueError: a shape or an option does not fit, or the implementation that was asked for
        does not support the case.
    """
    _check(q, k, v, kv_pool, seq_lens, block_tables, query_start, distribution, sinks, soft_cap)
    implementation = implementation or _best(q, k, kv_pool)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"unknown implementation {implementation!r}; known: {', '.join(IMPLEMENTATIONS)}"
        )
    _check_support(implementation, q, k, kv_pool)
    shared = {} if prepared is None else {"prepared": prepared}
    return IMPLEMENTATIONS[implementation](
        q, k, v, kv_pool, layer, seq_lens, block_tables, query_start, distribution,
        scale=scale, window=window, soft_cap=soft_cap, sinks=sinks,
        k_scale=k_scale, v_scale=v_scale, max_query_len=max_query_len, **shared,
    )  # fmt: skip


def prepare(
    kv_pool: jax.Array,
    num_kv_heads: int,
    head_dim: int,
    num_tokens: int,
    seq_lens: jax.Array,
    block_tables: jax.Array,
    query_start: jax.Array,
    distribution: jax.Array,
    *,
    max_query_len: int | None = None,
) -> Any:
    """A tree of arrays that all layers of a step share, to be given to each of their calls with the
    same arguments; None where the pool's layout says that an implementation runs which has no use
    for it."""
    if not is_physical(kv_pool.shape, num_kv_heads, head_dim):
        return None
    from pallas_kernels.ragged_paged_attention import tpu

    return tpu.prepare(
        head_dim, kv_pool, num_tokens, seq_lens, block_tables, query_start, distribution,
        max_query_len,
    )  # fmt: skip


def uses_tpu_layout(implementation: str | None) -> bool:
    """Whether an implementation of that name takes the pool in tpu_layout's shape."""
    return implementation in ("tpu", "tpu_interpret")


def _best(q: jax.Array, k: jax.Array, kv_pool: jax.Array) -> str:
    if is_physical(kv_pool.shape, k.shape[1], q.shape[2]):
        return "tpu"
    return "cpu" if cpu.supports(q, kv_pool) else "xla"


def _check_support(implementation: str, q: jax.Array, k: jax.Array, kv_pool: jax.Array) -> None:
    if uses_tpu_layout(implementation):
        if (reason := unsupported(q, k, kv_pool)) is not None:
            raise ValueError(f"ragged_paged_attention: {implementation!r}: {reason}")
        return
    expected = (2 * k.shape[1], q.shape[2])
    if kv_pool.shape[3:] != expected:
        raise ValueError(
            f"ragged_paged_attention: kv_pool {kv_pool.shape} is not [L, N, B, {expected[0]}, "
            f"{expected[1]}], which {implementation!r} takes"
        )
    if implementation == "cpu" and not cpu.supports(q, kv_pool):
        raise ValueError(
            f"ragged_paged_attention: 'cpu' needs the built kernels, bfloat16 queries (got "
            f"{q.dtype}) and a pool of {BITS_OF_BFLOAT16.__name__} (got {kv_pool.dtype}); use 'xla'"
        )


def _check(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kv_pool: jax.Array,
    seq_lens: jax.Array,
    block_tables: jax.Array,
    query_start: jax.Array,
    distribution: jax.Array,
    sinks: jax.Array | None,
    soft_cap: float | None,
) -> None:
    def fail(what: str) -> None:
        raise ValueError(f"ragged_paged_attention: {what}")

    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    if k.shape != v.shape or k.shape != (num_tokens, num_kv_heads, head_dim):
        fail(f"k {k.shape} and v {v.shape} do not fit q {q.shape}")
    if num_heads % num_kv_heads:
        fail(f"{num_heads} query heads are not a multiple of {num_kv_heads} key heads")
    is_logical = kv_pool.ndim == 5 and kv_pool.shape[3:] == (2 * num_kv_heads, head_dim)
    if not is_logical and not is_physical(kv_pool.shape, num_kv_heads, head_dim):
        fail(
            f"kv_pool {kv_pool.shape} is neither [L, N, B, {2 * num_kv_heads}, {head_dim}] nor, "
            f"for TPU, [L, N, {num_kv_heads}, B / R, {pool_layout(head_dim).lanes}]"
        )
    num_seqs = seq_lens.shape[0]
    if block_tables.ndim != 2 or block_tables.shape[0] != num_seqs:
        fail(f"block_tables {block_tables.shape} is not [{num_seqs}, M]")
    if query_start.shape != (num_seqs + 1,):
        fail(f"query_start {query_start.shape} is not [{num_seqs + 1}]")
    if distribution.shape != (3,):
        fail(f"distribution {distribution.shape} is not [3]")
    for name, array in (
        ("seq_lens", seq_lens), ("block_tables", block_tables),
        ("query_start", query_start), ("distribution", distribution),
    ):  # fmt: skip
        if array.dtype != jnp.int32:
            fail(f"{name} must be int32, got {array.dtype}")
    if sinks is not None and sinks.shape != (num_heads,):
        fail(f"sinks {sinks.shape} is not [{num_heads}]")
    if soft_cap is not None and not soft_cap > 0:
        fail(f"soft_cap must be positive, got {soft_cap}")
