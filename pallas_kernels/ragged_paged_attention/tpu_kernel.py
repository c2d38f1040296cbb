"""The TPU kernel of ragged paged attention; tpu.py calls it, tpu_layout.py says how the pool lies.

Three things happen in one call. New tokens go to the pool, segment by segment: the rows are read,
the new tokens put in, the rows written back. When all are there, each tile of queries runs over the
blocks that it sees, in items of at most `fetch_blocks` blocks. An item is planned (its place in the
block table is fetched to scalar memory), some ticks later fetched (one copy a block), and some
ticks later computed, so copies of later items run while one is computed; tpu_softmax.py computes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ragged_paged_attention.tpu_problem import (
    COLUMN,
    COPIES_AT_ONCE,
    FETCHED_AHEAD,
    IS_FIRST,
    IS_LAST,
    NUM_BLOCKS,
    NUM_PLANS,
    NUM_SLOTS,
    NUM_TOKENS,
    OFFSET,
    PLANNED_AHEAD,
    POSITION,
    TABLE_ALIGNMENT,
    TILE,
    TOKEN_AT,
    Problem,
    QueryTile,
    Refs,
    Scalar,
    token_mask,
)
from pallas_kernels.ragged_paged_attention.tpu_softmax import (
    all_visible_from,
    attend_unit,
    begin,
    output_of_head,
)
from pallas_kernels.ragged_paged_attention.tpu_write import write_new_tokens


def kernel(*args: Any, problem: Problem, tiles: tuple[tuple[int, QueryTile], ...]) -> None:
    """tiles: for each kind of sequence, where `distribution` says that it ends, and its tile."""
    refs = Refs(*args)
    write_new_tokens(refs, problem, single_only=len(tiles) == 1)
    first: Scalar = 0
    for kind, tile in tiles:
        attend(refs, problem, tile, first, refs.distribution[kind])
        first = refs.distribution[kind]


def attend(refs: Refs, p: Problem, tile: QueryTile, first: Scalar, last: Scalar) -> None:
    """Computes the queries of sequences first to last."""

    def unfinished(state: tuple[Any, ...]) -> jax.Array:
        tick, num_planned, s = state[:3]
        return (s < last) | (tick < num_planned)

    def step(state: tuple[Any, ...]) -> tuple[Any, ...]:
        tick, num_planned, s, query_tile, kv_tile, num_tiles = state
        can_plan = s < last
        cursor = (s, query_tile, kv_tile, num_tiles)
        cursor = lax.cond(
            can_plan, partial(_plan, refs, p, tile, num_planned), lambda *c: c, *cursor
        )
        num_planned += jnp.where(can_plan, 1, 0)
        fetched = tick + FETCHED_AHEAD

        @pl.when((fetched >= 0) & (fetched < num_planned))
        def _() -> None:
            _fetch(refs, p, tile, fetched)

        @pl.when(tick >= 0)
        def _() -> None:
            _compute(refs, p, tile, tick)

        return tick + 1, num_planned, *cursor

    zero = jnp.int32(0)
    refs.out_tokens[0] = refs.out_tokens[1] = 0
    start = jnp.int32(-FETCHED_AHEAD - PLANNED_AHEAD)
    lax.while_loop(unfinished, step, (start, zero, jnp.int32(first), zero, zero, zero))
    for slot in range(2):
        _wait_for_output(refs, tile, slot)


def _plan(
    refs: Refs, p: Problem, tile: QueryTile, item: Scalar,
    s: Scalar, query_tile: Scalar, kv_tile: Scalar, num_tiles: Scalar,
) -> tuple[Scalar, ...]:  # fmt: skip
    """Writes down what an item is and has its part of the block table fetched; returns the place
    after it."""
    query_len = refs.query_start[s + 1] - refs.query_start[s]
    offset = query_tile * tile.num_tokens
    num_tokens = jnp.minimum(query_len - offset, tile.num_tokens)
    position = refs.seq_lens[s] - query_len + offset
    first_block: Scalar = 0
    if p.has_window:
        oldest = jnp.where(refs.window[0] > 0, position - refs.window[0] + 1, 0)
        first_block = jnp.maximum(oldest, 0) // p.block_size
    num_blocks = (position + num_tokens - 1) // p.block_size + 1  # of the sequence
    block = first_block + kv_tile * p.fetch_blocks
    is_last = block + p.fetch_blocks >= num_blocks
    column = jnp.minimum(block // TABLE_ALIGNMENT * TABLE_ALIGNMENT, p.max_blocks - p.table_window)
    slot = item & (NUM_PLANS - 1)
    fields = {
        TOKEN_AT: refs.query_start[s] + offset,
        NUM_TOKENS: num_tokens,
        POSITION: position,
        COLUMN: block * p.block_size,
        NUM_BLOCKS: jnp.minimum(num_blocks - block, p.fetch_blocks),
        OFFSET: block - column,
        IS_FIRST: kv_tile == 0,
        IS_LAST: is_last,
        TILE: num_tiles,
    }
    for name, value in fields.items():
        refs.plans[slot, name] = jnp.int32(value)
    _table_copy(refs, p, s, column, slot).start()

    tile_ends = is_last
    sequence_ends = tile_ends & (offset + tile.num_tokens >= query_len)
    return (
        s + sequence_ends,
        jnp.where(sequence_ends, 0, query_tile + tile_ends),
        jnp.where(tile_ends, 0, kv_tile + 1),
        num_tiles + tile_ends,
    )


def _table_copy(refs: Refs, p: Problem, s: Scalar, column: Scalar, slot: Scalar) -> Any:
    part = pl.ds(pl.multiple_of(column, TABLE_ALIGNMENT), p.table_window)
    return pltpu.make_async_copy(
        refs.block_tables.at[s, part], refs.tables.at[slot], refs.table_sem.at[slot]
    )


def _fetch(refs: Refs, p: Problem, tile: QueryTile, item: Scalar) -> None:
    """Starts the copies of an item's blocks, and of its queries if it is the first of its tile."""
    plan, slot = item & (NUM_PLANS - 1), item & (NUM_SLOTS - 1)
    _table_copy(refs, p, 0, 0, plan).wait()
    offset = refs.plans[plan, OFFSET]

    def start(j: Scalar, _: None) -> None:
        block = refs.tables[plan, offset + j]
        pltpu.make_async_copy(
            refs.pool.at[refs.layer[0], block], refs.kv.at[slot, j], refs.kv_sem.at[slot]
        ).start()

    def start_several(i: Scalar, _: None) -> None:
        for j in range(COPIES_AT_ONCE):
            start(i * COPIES_AT_ONCE + j, None)

    num_blocks = refs.plans[plan, NUM_BLOCKS]
    whole = num_blocks // COPIES_AT_ONCE
    lax.fori_loop(0, whole, start_several, None)
    lax.fori_loop(whole * COPIES_AT_ONCE, num_blocks, start, None)

    @pl.when(refs.plans[plan, IS_FIRST] == 1)
    def _() -> None:
        _query_copy(refs, tile, plan).start()


def _query_copy(refs: Refs, tile: QueryTile, plan: Scalar) -> Any:
    slot = refs.plans[plan, TILE] & (NUM_SLOTS - 1)
    source = refs.q.at[pl.ds(refs.plans[plan, TOKEN_AT], tile.num_tokens)]
    stage = refs.q_stage.at[slot, pl.ds(0, tile.num_tokens)]
    return pltpu.make_async_copy(source, stage, refs.q_sem.at[slot])


def _wait_for_blocks(refs: Refs, p: Problem, slot: Scalar, num_blocks: Scalar) -> None:
    """A semaphore counts bytes, so one wait does for a full item."""
    sem = refs.kv_sem.at[slot]

    @pl.when(num_blocks == p.fetch_blocks)
    def _() -> None:
        pltpu.make_async_copy(refs.kv.at[slot], refs.kv.at[slot], sem).wait()

    @pl.when(num_blocks < p.fetch_blocks)
    def _() -> None:
        block = refs.kv.at[slot, 0]
        wait = pltpu.make_async_copy(block, block, sem).wait
        lax.fori_loop(0, num_blocks, lambda j, _: wait(), None)


def _compute(refs: Refs, p: Problem, tile: QueryTile, item: Scalar) -> None:
    """Takes an item's keys and values into the running softmax of its tile of queries."""
    plan, slot = item & (NUM_PLANS - 1), item & (NUM_SLOTS - 1)
    is_last = refs.plans[plan, IS_LAST] == 1
    num_blocks = refs.plans[plan, NUM_BLOCKS]

    @pl.when(refs.plans[plan, IS_FIRST] == 1)
    def _() -> None:
        _query_copy(refs, tile, plan).wait()
        begin(refs, p, tile, refs.plans[plan, TILE] & (NUM_SLOTS - 1))

    _wait_for_blocks(refs, p, slot, num_blocks)

    @pl.when(is_last)
    def _() -> None:
        _clear_unused(refs, p, tile, plan, slot)

    num_rows = p.num_rows(tile.num_tokens)
    rows_of_unit = tile.unit_rows * tile.unit_parts
    num_row_units, num_head_units = num_rows // rows_of_unit, p.num_kv_heads // tile.unit_heads

    def attend_blocks(first: Scalar, size: int, *, masked: bool) -> None:
        def unit(u: Scalar, _: None) -> None:
            head = u // num_row_units * tile.unit_heads
            row = u % num_row_units * rows_of_unit
            attend_unit(refs, p, tile, plan, slot, (first, size), head, row, masked=masked)

        num_units = num_row_units * num_head_units
        _for_each(num_units, num_units, unit)

    def attend_masked(first: Scalar, most: int) -> None:
        """The blocks from `first` on, up to `most` of them, by parts."""

        def part(index: Scalar, _: None) -> None:
            start = first + index * tile.compute_blocks
            attend_blocks(start, tile.compute_blocks, masked=True)

        here = jnp.minimum(num_blocks - first, most)
        num_parts = (here + tile.compute_blocks - 1) // tile.compute_blocks
        _for_each(most // tile.compute_blocks, num_parts, part)

    def stretch(index: Scalar, _: None) -> None:
        first = index * tile.visible_blocks
        all_visible = all_visible_from(refs, p, tile, plan, first)
        pl.when(all_visible)(partial(attend_blocks, first, tile.visible_blocks, masked=False))
        pl.when(jnp.logical_not(all_visible))(partial(attend_masked, first, tile.visible_blocks))

    if tile.visible_blocks:
        num_stretches = (num_blocks + tile.visible_blocks - 1) // tile.visible_blocks
        _for_each(p.fetch_blocks // tile.visible_blocks, num_stretches, stretch)
    else:
        attend_masked(0, p.fetch_blocks)

    @pl.when(is_last)
    def _() -> None:
        _finish(refs, p, tile, plan)


def _for_each(most: int, number: Scalar, body: Callable[[Scalar, None], None]) -> None:
    """body(i, None) for each i below number, of which there are at most `most`; where that is one,
    it runs whatever the number is, without a loop."""
    if most == 1:
        body(0, None)
    else:
        lax.fori_loop(0, number, body, None)


def _clear_unused(refs: Refs, p: Problem, tile: QueryTile, plan: Scalar, slot: Scalar) -> None:
    """Zeroes what follows a tile's last token in the parts that will be computed: it was never
    written or is another sequence's, and NaN times a weight of zero is NaN."""
    num_blocks = refs.plans[plan, NUM_BLOCKS]
    last = refs.plans[plan, POSITION] + refs.plans[plan, NUM_TOKENS] - refs.plans[plan, COLUMN]
    mask = token_mask(p, p.rows_per_block, 0, last - (num_blocks - 1) * p.block_size)

    def clear_end(h: Scalar, _: None) -> None:
        words = pltpu.bitcast(refs.kv[slot, num_blocks - 1, h], jnp.int32) & mask
        refs.kv[slot, num_blocks - 1, h] = pltpu.bitcast(words, p.pool_dtype)

    @pl.when(num_blocks > 0)
    def _() -> None:
        lax.fori_loop(0, p.num_kv_heads, clear_end, None)

    def clear_block(j: Scalar, _: None) -> None:
        refs.kv[slot, j] = jnp.zeros(refs.kv.shape[2:], p.pool_dtype)

    whole_parts = (num_blocks + tile.compute_blocks - 1) // tile.compute_blocks
    end = jnp.maximum(whole_parts, 1) * tile.compute_blocks
    lax.fori_loop(num_blocks, jnp.minimum(end, p.fetch_blocks), clear_block, None)


def _finish(refs: Refs, p: Problem, tile: QueryTile, plan: Scalar) -> None:
    """Puts the streams of each head together and sends the tile's output off."""
    slot = refs.plans[plan, TILE] & 1
    _wait_for_output(refs, tile, slot)

    def head(h: Scalar, _: None) -> None:
        words = pltpu.bitcast(output_of_head(refs, p, tile, h).astype(p.compute_dtype), jnp.int32)
        for j in range(p.group_words):
            part = words[j * tile.num_tokens : (j + 1) * tile.num_tokens]
            refs.out_stage[slot, pl.ds(0, tile.num_tokens), h * p.group_words + j] = part

    lax.fori_loop(0, p.num_kv_heads, head, None)
    num_tokens = refs.plans[plan, NUM_TOKENS]
    refs.out_tokens[slot] = num_tokens
    _output_copies(refs, tile, slot, num_tokens, refs.plans[plan, TOKEN_AT], start=True)


def _output_copies(
    refs: Refs, tile: QueryTile, slot: Scalar, num_tokens: Scalar, token: Scalar, *, start: bool
) -> None:
    """Starts, or waits for, the copies of exactly num_tokens tokens: one for each binary digit."""
    for digit in range(tile.num_tokens.bit_length()):
        size = 1 << digit
        before = num_tokens & ~(2 * size - 1)  # tokens of the larger digits

        @pl.when((num_tokens & size) != 0)
        def _(size: int = size, before: Scalar = before) -> None:
            copy = pltpu.make_async_copy(
                refs.out_stage.at[slot, pl.ds(before, size)],
                refs.out.at[pl.ds(token + before, size)],
                refs.out_sem.at[slot],
            )
            copy.start() if start else copy.wait()


def _wait_for_output(refs: Refs, tile: QueryTile, slot: Scalar) -> None:
    _output_copies(refs, tile, slot, refs.out_tokens[slot], 0, start=False)
    refs.out_tokens[slot] = 0
