"""The first part of the TPU kernel: new keys and values go to the pool.

A segment of rows is read, the new tokens are put in, and the rows are written back; several are on
their way at once.
"""

from __future__ import annotations

import math
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ragged_paged_attention.tpu_problem import (
    BLOCK,
    FROM,
    ROW,
    TO,
    TOKEN,
    Problem,
    Refs,
    Scalar,
    stream_of_lane,
    token_mask,
)

HEADS_AT_ONCE = 4  # that are merged in one stretch of code


def write_new_tokens(refs: Refs, p: Problem, single_only: bool) -> None:
    """Puts all new tokens into the pool and returns when they are there."""
    num_single = refs.num_segments[0]
    _write_segments(refs, p, 0, num_single, num_tokens=1)
    if not single_only:
        num_tokens = p.segment_rows * p.layout.fold
        _write_segments(refs, p, num_single, refs.num_segments[1], num_tokens=num_tokens)


def _write_segments(
    refs: Refs, p: Problem, first: Scalar, last: Scalar, *, num_tokens: int
) -> None:
    """Segments first to last. num_tokens: 1 if each has one, else those of a whole segment."""
    ahead = p.num_segment_slots // 2
    count = last - first

    def place(i: Scalar) -> Any:
        rows = pl.ds(pl.multiple_of(refs.segments[ROW, i], p.segment_rows), p.segment_rows)
        return refs.pool.at[refs.layer[0], refs.segments[BLOCK, i], :, rows]

    def reads(i: Scalar) -> list[Any]:
        slot = lax.rem(i, p.num_segment_slots)
        token = refs.segments[TOKEN, i]
        if num_tokens == 1:
            token += refs.segments[FROM, i]
        fresh = refs.fresh.at[slot, pl.ds(0, num_tokens)]
        return [
            pltpu.make_async_copy(place(i), refs.old.at[slot], refs.read_sem.at[slot]),
            pltpu.make_async_copy(
                refs.new.at[pl.ds(token, num_tokens)], fresh, refs.fresh_sem.at[slot]
            ),
        ]

    def write(i: Scalar) -> Any:
        slot = lax.rem(i, p.num_segment_slots)
        return pltpu.make_async_copy(refs.old.at[slot], place(i), refs.write_sem.at[slot])

    def step(j: Scalar, _: None) -> None:
        @pl.when(j < count)
        def read() -> None:
            @pl.when(j >= p.num_segment_slots)
            def make_room() -> None:
                write(first + j - p.num_segment_slots).wait()

            for copy in reads(first + j):
                copy.start()

        @pl.when(j >= ahead)
        def merge() -> None:
            i = first + j - ahead
            for copy in reads(i):
                copy.wait()
            _merge(refs, p, i, lax.rem(i, p.num_segment_slots), num_tokens)
            write(i).start()

    @pl.when(count > 0)
    def _() -> None:
        lax.fori_loop(0, count + ahead, step, None)
        started = jnp.maximum(count - p.num_segment_slots, 0)
        lax.fori_loop(started, count, lambda j, _: write(first + j).wait(), None)


def _merge(refs: Refs, p: Problem, i: Scalar, slot: Scalar, num_tokens: int) -> None:
    """Puts the tokens of segment i into the rows that were read."""
    bits = 32 // p.tokens_of_word
    mask = token_mask(p, p.segment_rows, refs.segments[FROM, i], refs.segments[TO, i])

    def head(h: Scalar, _: None) -> None:
        old = pltpu.bitcast(refs.old[slot, h], jnp.int32)  # [segment rows / P, W]
        if num_tokens == 1:
            token = refs.fresh[slot, pl.ds(0, 1), h]  # [1, W]
            new = token
            for row in range(1, p.tokens_of_word):
                new = new | (token << (bits * row))
            new = jnp.broadcast_to(new, old.shape)
        else:
            new = _packed_tokens(refs, p, slot, h)
        refs.old[slot, h] = pltpu.bitcast((old & ~mask) | (new & mask), p.pool_dtype)

    lax.fori_loop(0, p.num_kv_heads, head, None, unroll=math.gcd(p.num_kv_heads, HEADS_AT_ONCE))


def _packed_tokens(refs: Refs, p: Problem, slot: Scalar, h: Scalar) -> jax.Array:
    """The tokens of a segment as the pool holds them, in words: [segment rows / P, W].

    Tokens come with their keys and values in the lanes of every stream.
    """
    fold, packed = p.layout.fold, p.tokens_of_word
    stream = stream_of_lane(p, (1, p.layout.lanes))
    words = []
    for row in range(packed):
        streams = []
        for r in range(fold):
            tokens = range(row * fold + r, p.segment_rows * fold, packed * fold)
            streams.append(jnp.concatenate([refs.fresh[slot, pl.ds(t, 1), h] for t in tokens]))
        merged = streams[0]
        for r in range(1, fold):
            merged = jnp.where(stream == r, streams[r], merged)
        field = (1 << (32 // packed)) - 1 if packed > 1 else -1
        words.append((merged & field) << (32 // packed * row))
    return reduce(jnp.bitwise_or, words)
