"""The TPU kernel of ragged paged attention; tpu.py calls it, tpu_layout.py says how the pool lies.

Three things happen in one call. New tokens go to the pool, segment by segment: the rows are read,
the new tokens put in, the rows written back. When all are there, each tile of queries runs over the
blocks that it sees, in items of at most `fetch_blocks` blocks. An item is planned (its place in the
block table is fetched to scalar memory), some ticks later fetched (one copy a block), and some
ticks later computed, so copies of later items run while one is computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ragged_paged_attention.tpu_layout import LANES
from pallas_kernels.ragged_paged_attention.tpu_problem import (
    COPIES_AT_ONCE,
    FETCHED_AHEAD,
    NUM_PLANS,
    NUM_SLOTS,
    PLANNED_AHEAD,
    SUBLANES,
    TABLE_ALIGNMENT,
    Problem,
    QueryTile,
    Refs,
    Scalar,
    token_mask,
)
from pallas_kernels.ragged_paged_attention.tpu_write import write_new_tokens

MASKED = -1e30  # finite: a row that has seen only masked positions must not become NaN


def kernel(*args: Any, problem: Problem, tiles: tuple[tuple[int, QueryTile], ...]) -> None:
    """tiles: for each kind of sequence, where `distribution` says that it ends, and its tile."""
    refs = Refs(*args)
    write_new_tokens(refs, problem, single_only=len(tiles) == 1)
    first: Scalar = 0
    for kind, tile in tiles:
        attend(refs, problem, tile, first, refs.distribution[kind])
        first = refs.distribution[kind]


(TOKEN_AT, NUM_TOKENS, POSITION, COLUMN, NUM_BLOCKS, OFFSET, IS_FIRST, IS_LAST, TILE) = range(9)
NUM_FIELDS = 9


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
        _begin(refs, p, tile, refs.plans[plan, TILE] & (NUM_SLOTS - 1))

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
            _attend_unit(refs, p, tile, plan, slot, (first, size), head, row, masked=masked)

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
        all_visible = _all_visible(refs, p, tile, plan, first)
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


def _begin(refs: Refs, p: Problem, tile: QueryTile, slot: Scalar) -> None:
    """Lays out the queries of a tile and starts their softmax."""
    num_rows = p.num_rows(tile.num_tokens)
    words, streams = p.group_words, p.layout.fold
    word_rows = num_rows // p.rows_of_word

    def head(h: Scalar, _: None) -> None:
        for part in range(streams * words):
            rows = pl.ds(part * tile.num_tokens, tile.num_tokens)
            refs.q_rows[h, rows] = refs.q_stage[
                slot, pl.ds(0, tile.num_tokens), h * streams * words + part
            ]
        used = streams * words * tile.num_tokens
        if used < word_rows:
            refs.q_rows[h, used:word_rows] = jnp.zeros((word_rows - used, p.key_width), jnp.int32)
        rows = slice(0, num_rows)
        refs.acc[h, rows] = jnp.zeros((num_rows, p.value_width), jnp.float32)
        if refs.sinks is None:
            refs.maxima[h, rows] = jnp.full((num_rows, LANES), MASKED, jnp.float32)
            refs.sums[h, rows] = jnp.zeros((num_rows, LANES), jnp.float32)
        else:
            _begin_with_sinks(refs, p, tile, h)

    lax.fori_loop(0, p.num_kv_heads, head, None, unroll=math.gcd(p.num_kv_heads, 2))


def _begin_with_sinks(refs: Refs, p: Problem, tile: QueryTile, h: Scalar) -> None:
    """The sink is a first logit, of stream 0, whose value is zero."""
    shape = (p.num_rows(tile.num_tokens), LANES)
    row = lax.broadcasted_iota(jnp.int32, shape, 0)
    words = p.rows_of_word
    member = row // (tile.num_tokens * words) * words + row % words  # query head of its key head
    sinks = jnp.full(shape, MASKED, jnp.float32)
    for g in range(p.group_words * words):
        sinks = jnp.where(member == g, refs.sinks[h, g], sinks)
    of_stream = p.group_words * words
    refs.maxima[h, : shape[0]] = sinks
    lane = lax.broadcasted_iota(jnp.int32, shape, 1)
    refs.sums[h, : shape[0]] = jnp.where((member < of_stream) & (lane == 0), 1.0, 0.0)


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


class _RowPart(NamedTuple):
    """unit_rows query rows of a key head."""

    rows: slice | pl.Slice  # of maxima, sums and acc
    words: slice | pl.Slice  # of q_rows
    visible: jax.Array | None  # [rows, columns]; None: all


def _attend_unit(
    refs: Refs, p: Problem, tile: QueryTile, plan: Scalar, slot: Scalar,
    span: tuple[Scalar, int], first_head: Scalar, first_row: Scalar, *, masked: bool,
) -> None:  # fmt: skip
    """unit_parts times unit_rows rows of unit_heads heads against a span of an item's blocks: from
    which on, and how many.

    Each stage is stage_lag products behind the one before, so that the units of the chip have
    work while one waits for another.
    """
    words = tile.unit_rows // p.rows_of_word

    def part_from(row: Scalar) -> _RowPart:
        word_row = pl.multiple_of(row // tile.unit_rows * words, math.gcd(words, SUBLANES))
        return _RowPart(
            pl.ds(pl.multiple_of(row, SUBLANES), tile.unit_rows),
            pl.ds(word_row, words),
            _visible(refs, p, tile, plan, span, row) if masked else None,
        )

    parts = [part_from(first_row + i * tile.unit_rows) for i in range(tile.unit_parts)]
    products = [(first_head + i, part) for part in parts for i in range(tile.unit_heads)]
    blocks = pl.ds(*span)
    precision = lax.Precision.HIGHEST if p.compute_dtype == jnp.float32 else None
    product = partial(lax.dot_general, precision=precision, preferred_element_type=jnp.float32)

    def stored(h: Scalar, lanes: slice) -> jax.Array:
        values = refs.kv[slot, blocks, h, :, lanes]  # [blocks, B / R, lanes]
        return values.reshape(-1, values.shape[-1]).astype(p.product_dtype)

    def logits_of(h: Scalar, part: _RowPart) -> jax.Array:
        q = pltpu.bitcast(refs.q_rows[h, part.words], p.compute_dtype)  # [rows, key lanes]
        x = product(q, stored(h, p.layout.key_lanes), (((1,), (1,)), ((), ())))
        if p.soft_cap is not None:
            x = jnp.tanh(x * refs.scales[0, h])
        return x if part.visible is None else jnp.where(part.visible, x, MASKED)

    def weigh(h: Scalar, part: _RowPart, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        scale = refs.scales[1, h]
        old_max = refs.maxima[h, part.rows]  # [rows, 128], all lanes the same
        new_max = jnp.maximum(old_max, jnp.max(x, axis=1, keepdims=True))
        weight = jnp.exp2((x - _repeated(new_max, x.shape[1])) * scale)
        kept = jnp.exp2((old_max - new_max) * scale)
        refs.maxima[h, part.rows] = new_max
        refs.sums[h, part.rows] = kept * refs.sums[h, part.rows] + _folded(weight)
        return weight.astype(p.compute_dtype), kept

    def accumulate(h: Scalar, part: _RowPart, weight: jax.Array, kept: jax.Array) -> None:
        update = product(weight, stored(h, p.layout.value_lanes), (((1,), (0,)), ((), ())))
        refs.acc[h, part.rows] = _repeated(kept, p.value_width) * refs.acc[h, part.rows] + update

    lag, logits, weights = tile.stage_lag, {}, {}
    for now in range(len(products) + 2 * lag):
        if now < len(products):
            logits[now] = logits_of(*products[now])
        if 0 <= now - lag < len(products):
            weights[now - lag] = weigh(*products[now - lag], logits.pop(now - lag))
        if 0 <= now - 2 * lag < len(products):
            accumulate(*products[now - 2 * lag], *weights.pop(now - 2 * lag))


def _repeated(x: jax.Array, width: int) -> jax.Array:
    """[rows, 128] whose lanes are all the same as [rows, width]; nothing is moved."""
    return jnp.concatenate([x] * -(-width // LANES), axis=1)[:, :width]


def _folded(x: jax.Array) -> jax.Array:
    """[rows, columns] as sums of every 128th column, [rows, 128]: the lanes are added up last."""
    missing = -x.shape[1] % LANES
    if missing:
        x = jnp.concatenate([x, jnp.zeros((x.shape[0], missing), x.dtype)], axis=1)
    return sum(x[:, start : start + LANES] for start in range(0, x.shape[1], LANES))  # type: ignore[return-value]


def _visible(
    refs: Refs, p: Problem, tile: QueryTile, plan: Scalar, span: tuple[Scalar, int], row: Scalar
) -> jax.Array:
    """Which columns of a span of an item's blocks the rows of a unit see: [rows, columns]."""
    block, num_blocks = span
    fold, words = p.layout.fold, p.rows_of_word
    shape = (tile.unit_rows, num_blocks * p.rows_per_block)
    rows = row + lax.broadcasted_iota(jnp.int32, (shape[0], 1), 0)
    token = rows // words % tile.num_tokens
    stream = rows // (p.group_words * words * tile.num_tokens)
    column = lax.broadcasted_iota(jnp.int32, shape, 1) * fold
    # a column's position less a row's, but for what is the same in all
    ahead = column + (stream - token)
    start = refs.plans[plan, POSITION] - refs.plans[plan, COLUMN] - block * p.block_size
    visible = ahead <= start
    if p.has_window:
        visible &= ahead > start - _window_or_all(refs)
    return visible


def _window_or_all(refs: Refs) -> jax.Array:
    return jnp.where(refs.window[0] > 0, refs.window[0], jnp.iinfo(jnp.int32).max // 2)


def _all_visible(refs: Refs, p: Problem, tile: QueryTile, plan: Scalar, block: Scalar) -> jax.Array:
    """Whether every query of a tile sees visible_blocks blocks from `block` on in whole."""
    start = refs.plans[plan, POSITION] - refs.plans[plan, COLUMN] - block * p.block_size
    visible = tile.visible_blocks * p.block_size <= start + 1
    if p.has_window:
        visible &= start + tile.num_tokens - 1 < _window_or_all(refs)
    return visible


def _finish(refs: Refs, p: Problem, tile: QueryTile, plan: Scalar) -> None:
    """Puts the streams of each head together and sends the tile's output off."""
    slot = refs.plans[plan, TILE] & 1
    _wait_for_output(refs, tile, slot)

    def head(h: Scalar, _: None) -> None:
        words = pltpu.bitcast(_output_of_head(refs, p, tile, h).astype(p.compute_dtype), jnp.int32)
        for j in range(p.group_words):
            part = words[j * tile.num_tokens : (j + 1) * tile.num_tokens]
            refs.out_stage[slot, pl.ds(0, tile.num_tokens), h * p.group_words + j] = part

    lax.fori_loop(0, p.num_kv_heads, head, None)
    num_tokens = refs.plans[plan, NUM_TOKENS]
    refs.out_tokens[slot] = num_tokens
    _output_copies(refs, tile, slot, num_tokens, refs.plans[plan, TOKEN_AT], start=True)


def _output_of_head(refs: Refs, p: Problem, tile: QueryTile, h: Scalar) -> jax.Array:
    """[rows of a stream, value lanes]; each stream's value is in its own lanes."""
    num_rows, fold = p.num_rows(tile.num_tokens), p.layout.fold
    factor = refs.scales[2, h]
    if fold == 1:
        rows = slice(0, num_rows)
        return refs.acc[h, rows] * (factor / jnp.sum(refs.sums[h, rows], axis=1, keepdims=True))
    of_stream = p.group_words * p.rows_of_word * tile.num_tokens
    parts = [slice(r * of_stream, (r + 1) * of_stream) for r in range(fold)]
    maxima = [refs.maxima[h, rows][:, :1] for rows in parts]
    highest = maxima[0]
    for other in maxima[1:]:
        highest = jnp.maximum(highest, other)
    shares = [jnp.exp2((m - highest) * refs.scales[1, h]) for m in maxima]
    sums = [jnp.sum(refs.sums[h, rows], axis=1, keepdims=True) for rows in parts]
    total = sum(share * s for share, s in zip(shares, sums, strict=True))
    start = p.layout.fold * p.layout.head_dim - p.layout.value_lanes.start
    lane = lax.broadcasted_iota(jnp.int32, (1, p.value_width), 1) - start
    stream = jnp.where(lane < 0, -1, lane // p.layout.head_dim)
    out = jnp.zeros((of_stream, p.value_width), jnp.float32)
    for r, (share, rows) in enumerate(zip(shares, parts, strict=True)):
        out = jnp.where(stream == r, refs.acc[h, rows] * (share * factor / total), out)
    missing = -of_stream % SUBLANES
    if missing:
        out = jnp.concatenate([out, jnp.zeros((missing, p.value_width), jnp.float32)])
    return out


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
