"""The running softmax of a tile of queries: its start, an item's keys and values, its result.

tpu_kernel.py says when; what a tile's rows are, `Problem.num_rows` does.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ragged_paged_attention.tpu_layout import LANES
from pallas_kernels.ragged_paged_attention.tpu_problem import (
    COLUMN,
    POSITION,
    SUBLANES,
    Problem,
    QueryTile,
    Refs,
    Scalar,
)

MASKED = -1e30  # finite: a row that has seen only masked positions must not become NaN


def begin(refs: Refs, p: Problem, tile: QueryTile, slot: Scalar) -> None:
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


class _RowPart(NamedTuple):
    """unit_rows query rows of a key head."""

    rows: slice | pl.Slice  # of maxima, sums and acc
    words: slice | pl.Slice  # of q_rows
    visible: jax.Array | None  # [rows, columns]; None: all


def attend_unit(
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


def all_visible_from(
    refs: Refs, p: Problem, tile: QueryTile, plan: Scalar, block: Scalar
) -> jax.Array:
    """Whether every query of a tile sees visible_blocks blocks from `block` on in whole."""
    start = refs.plans[plan, POSITION] - refs.plans[plan, COLUMN] - block * p.block_size
    visible = tile.visible_blocks * p.block_size <= start + 1
    if p.has_window:
        visible &= start + tile.num_tokens - 1 < _window_or_all(refs)
    return visible


def output_of_head(refs: Refs, p: Problem, tile: QueryTile, h: Scalar) -> jax.Array:
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
