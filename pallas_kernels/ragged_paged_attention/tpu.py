"""Ragged paged attention by a Pallas kernel for TPU; see tpu_kernel.py and tpu_layout.py."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.device import device_kind
from pallas_kernels.ragged_paged_attention.block_sizes import (
    FEW_TOKENS,
    INTERLEAVED,
    BlockSizes,
    block_sizes,
    largest_divisor,
)
from pallas_kernels.ragged_paged_attention.layout import new_elements, token_rows
from pallas_kernels.ragged_paged_attention.tpu_kernel import kernel
from pallas_kernels.ragged_paged_attention.tpu_layout import (
    LANES,
    PoolLayout,
    pool_layout,
    values_of,
    words_of,
)
from pallas_kernels.ragged_paged_attention.tpu_problem import (
    NUM_FIELDS,
    NUM_PLANS,
    NUM_SLOTS,
    SUBLANES,
    TABLE_ALIGNMENT,
    Problem,
    QueryTile,
)

LOG2_E = math.log2(math.e)
SEGMENT_BYTES = 4 << 20  # of VMEM for blocks on their way through a write
VMEM_RESERVE = 8 << 20  # for what the compiler puts there beside the scratch


class Prepared(NamedTuple):
    """What all layers of a step share, see prepare."""

    valid: jax.Array  # [T] bool: tokens that are no padding
    segments: jax.Array  # see write_segments
    num_segments: jax.Array


def ragged_paged_attention(
    q: jax.Array,  # [T, H, D]
    k: jax.Array,  # [T, K, D]
    v: jax.Array,  # [T, K, D]
    kv_pool: jax.Array,  # [L, N, K, B / R, W]
    layer: jax.Array | int,
    seq_lens: jax.Array,  # [S]
    block_tables: jax.Array,  # [S, M]
    query_start: jax.Array,  # [S + 1]
    distribution: jax.Array,  # [3]
    *,
    scale: float,
    window: jax.Array | int = 0,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    k_scale: jax.Array | float = 1.0,
    v_scale: jax.Array | float = 1.0,
    max_query_len: int | None = None,
    prepared: Prepared | None = None,
    sizes: BlockSizes | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[jax.Array, jax.Array]:
    """Every case that api.py describes and tpu_layout.unsupported allows. sizes: None for those of
    block_sizes.py."""
    num_tokens, num_heads = q.shape[:2]
    num_kv_heads = k.shape[1]
    problem, tiles = plan(q, k, kv_pool, block_tables, window, soft_cap, max_query_len, sizes)
    segment_tokens = problem.segment_rows * problem.layout.fold
    prepared = prepared or prepare(
        q.shape[2], kv_pool, num_tokens, seq_lens, block_tables, query_start, distribution,
        max_query_len,
    )  # fmt: skip
    new = _token_words(problem, new_elements(k, v, k_scale, v_scale, kv_pool.dtype))
    if max_query_len != 1:  # copied by whole segments, which may begin before the first token
        new = jnp.pad(new, ((segment_tokens, segment_tokens), (0, 0), (0, 0)))
    scales = _scales(scale, soft_cap, k_scale, v_scale, num_kv_heads)
    query_words = _query_words(problem, q, max(tile.num_tokens for _, tile in tiles) - 1)
    if block_tables.shape[1] < problem.max_blocks:
        missing = problem.max_blocks - block_tables.shape[1]
        block_tables = jnp.pad(block_tables, ((0, 0), (0, missing)))
    sink_words = None if sinks is None else _sink_logits(problem, sinks, scales[1])
    out_words, kv_pool = _call(
        problem, tiles, interpret,
        [jnp.asarray(layer, jnp.int32).reshape(1), jnp.asarray(window, jnp.int32).reshape(1),
         distribution, seq_lens, query_start, prepared.segments, prepared.num_segments],
        scales, query_words, new, block_tables, sink_words, kv_pool,
    )  # fmt: skip
    out = _outputs(problem, out_words, num_tokens, num_heads)
    return jnp.where(prepared.valid[:, None, None], out, 0).astype(q.dtype), kv_pool


def prepare(
    head_dim: int,
    kv_pool: jax.Array,
    num_tokens: int,
    seq_lens: jax.Array,
    block_tables: jax.Array,
    query_start: jax.Array,
    distribution: jax.Array,
    max_query_len: int | None,
) -> Prepared:
    """What does not depend on the layer, by which a program with many layers computes it once."""
    fold = pool_layout(head_dim).fold
    rows = token_rows(num_tokens, seq_lens, query_start, distribution)
    segments, num_segments = write_segments(
        num_tokens, seq_lens, block_tables, query_start, distribution,
        kv_pool.shape[3] * fold, _segment_rows(kv_pool) * fold, fold,
        single_only=max_query_len == 1,
    )  # fmt: skip
    return Prepared(rows.valid, segments, num_segments)


def _segment_rows(kv_pool: jax.Array) -> int:
    return min(kv_pool.shape[3], SUBLANES * 4 // kv_pool.dtype.itemsize)


def plan(
    q: jax.Array,
    k: jax.Array,
    kv_pool: jax.Array,
    block_tables: jax.Array,
    window: jax.Array | int,
    soft_cap: float | None,
    max_query_len: int | None,
    sizes: BlockSizes | None,
) -> tuple[Problem, tuple[tuple[int, QueryTile], ...]]:
    """The static sizes of a call, and for each kind of sequence that it may have its place in
    `distribution` and its tile."""
    layout, num_kv_heads = pool_layout(q.shape[2]), k.shape[1]
    packed = 4 // q.dtype.itemsize
    group_words = -(-(q.shape[1] // num_kv_heads) // packed)
    rows_per_block = kv_pool.shape[3]
    block_size = rows_per_block * layout.fold
    row_bytes = layout.lanes * kv_pool.dtype.itemsize
    query_rows = layout.fold * group_words * packed
    sizes = sizes or block_sizes(
        num_kv_heads, query_rows, layout.fold, row_bytes,
        _token_bytes(num_kv_heads, query_rows, packed, layout), device_kind(),
    )  # fmt: skip
    longest = 1 << (block_tables.shape[1] - 1).bit_length()
    fetch_blocks = max(1, min(sizes.fetch_tokens // block_size, longest))
    window_entries = -(-(fetch_blocks + TABLE_ALIGNMENT - 1) // TABLE_ALIGNMENT) * TABLE_ALIGNMENT
    whole = -(-block_tables.shape[1] // TABLE_ALIGNMENT) * TABLE_ALIGNMENT
    segment_rows = _segment_rows(kv_pool)
    segment_bytes = num_kv_heads * segment_rows * layout.lanes * (4 * layout.fold + 4)
    problem = Problem(
        num_kv_heads=num_kv_heads,
        rows_per_block=rows_per_block,
        layout=layout,
        group_words=group_words,
        compute_dtype=q.dtype,
        pool_dtype=kv_pool.dtype,
        fetch_blocks=fetch_blocks,
        table_window=window_entries,
        max_blocks=max(whole, window_entries),
        segment_rows=segment_rows,
        num_segment_slots=max(2, min(16, SEGMENT_BYTES // segment_bytes)),
        has_window=not (isinstance(window, int) and window == 0),
        soft_cap=soft_cap,
    )
    return problem, _tiles(problem, sizes, max_query_len)


def _token_bytes(num_kv_heads: int, query_rows: int, packed: int, layout: PoolLayout) -> int:
    """What one token of a tile takes of _scratch."""
    queries = (NUM_SLOTS + 1) * layout.key_width // packed
    outputs = 2 * layout.value_width // (packed * layout.fold)
    return 4 * num_kv_heads * query_rows * (queries + 2 * LANES + layout.value_width + outputs)


def _tiles(
    p: Problem, sizes: BlockSizes, max_query_len: int | None
) -> tuple[tuple[int, QueryTile], ...]:
    def blocks(tokens: int) -> int:
        """So many that a whole number of them is an item."""
        return largest_divisor(p.fetch_blocks, max(1, tokens // p.block_size))

    heads, decode_blocks = sizes.decode_heads, blocks(sizes.decode_tokens)
    single = QueryTile(1, p.num_rows(1), heads, decode_blocks, stage_lag=heads)
    if max_query_len == 1:
        return ((0, single),)

    def several(num_tokens: int) -> QueryTile:
        num_rows = p.num_rows(num_tokens)
        unit_rows = math.gcd(num_rows, sizes.unit_rows)
        heads = largest_divisor(p.num_kv_heads, INTERLEAVED)
        parts = math.gcd(num_rows // unit_rows, INTERLEAVED // heads)
        columns = blocks(sizes.prefill_tokens)
        twice = math.gcd(2 * columns, p.fetch_blocks)
        return QueryTile(
            num_tokens, unit_rows, heads, columns, stage_lag=1, unit_parts=parts,
            visible_blocks=twice,
        )  # fmt: skip

    few = several(FEW_TOKENS)
    if max_query_len is not None and max_query_len <= FEW_TOKENS:
        return ((0, single), (2, few))
    return ((0, single), (1, few), (2, several(sizes.query_tokens)))


def _token_words(p: Problem, elements: jax.Array) -> jax.Array:
    """New keys and values [T, K, 2, D] as bits in words, in the lanes of every stream of a row of
    the pool: [T, K, W] int32."""
    bits = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[elements.dtype.itemsize]
    words = jax.lax.bitcast_convert_type(elements, bits).astype(jnp.uint32)
    words = jax.lax.bitcast_convert_type(words, jnp.int32)
    return jnp.tile(words, (1, 1, 1, p.layout.fold)).reshape(*words.shape[:2], p.layout.lanes)


def _query_words(p: Problem, q: jax.Array, padding: int) -> jax.Array:
    """[T, H, D] -> [T + padding, K * R * words, key width]: for each key head and stream the
    queries in that stream's lanes."""
    num_tokens, num_heads, head_dim = q.shape
    fold, packed = p.layout.fold, p.rows_of_word
    group = num_heads // p.num_kv_heads
    grouped = q.reshape(num_tokens, p.num_kv_heads, group, head_dim)
    grouped = jnp.pad(grouped, ((0, padding), (0, 0), (0, p.group_words * packed - group), (0, 0)))
    words = words_of(grouped, axis=2)  # [T', K, words, D]
    streams = [
        jnp.pad(words, (*[(0, 0)] * 3, (r * head_dim, p.key_width - (r + 1) * head_dim)))
        for r in range(fold)
    ]
    return jnp.stack(streams, axis=2).reshape(words.shape[0], -1, p.key_width)


def _outputs(p: Problem, words: jax.Array, num_tokens: int, num_heads: int) -> jax.Array:
    """The kernel's output words as [T, H, D]."""
    head_dim, fold = p.layout.head_dim, p.layout.fold
    start = fold * head_dim - p.layout.value_lanes.start
    values = values_of(words, p.compute_dtype, axis=1)[:num_tokens]
    values = values.reshape(num_tokens, p.num_kv_heads, -1, p.value_width)
    values = values[:, :, : num_heads // p.num_kv_heads, start:]
    values = values.reshape(*values.shape[:3], fold, head_dim)
    return values.astype(jnp.float32).sum(axis=3).reshape(num_tokens, num_heads, head_dim)


def _scales(
    scale: float,
    soft_cap: float | None,
    k_scale: jax.Array | float,
    v_scale: jax.Array | float,
    num_kv_heads: int,
) -> jax.Array:
    """[3, K]: what products are multiplied with before the soft cap, logits before exp2, and the
    output."""

    def by_head(factor: jax.Array | float) -> jax.Array:
        return jnp.broadcast_to(jnp.asarray(factor, jnp.float32), (num_kv_heads,))

    of_logits = by_head(scale) * by_head(k_scale)
    if soft_cap is None:
        return jnp.stack([by_head(1.0), of_logits * LOG2_E, by_head(v_scale)])
    return jnp.stack([of_logits / soft_cap, by_head(soft_cap * LOG2_E), by_head(v_scale)])


def _sink_logits(p: Problem, sinks: jax.Array, scale: jax.Array) -> jax.Array:
    """[H] -> [K, query heads of a key head, padded], in the unit of what exp2's factor takes."""
    grouped = sinks.astype(jnp.float32).reshape(p.num_kv_heads, -1) * LOG2_E / scale[:, None]
    missing = p.group_words * p.rows_of_word - grouped.shape[1]
    return jnp.pad(grouped, ((0, 0), (0, missing)))


def write_segments(
    num_tokens: int,
    seq_lens: jax.Array,
    block_tables: jax.Array,
    query_start: jax.Array,
    distribution: jax.Array,
    block_size: int,
    segment_tokens: int,
    fold: int,
    *,
    single_only: bool,
) -> tuple[jax.Array, jax.Array]:
    """The segments of blocks that new tokens go to, [5, I], and [2] how many there are: with
    one token each, which come first, and in all.

    Columns: block; row in it; the token that would be the segment's token 0, counted from
    segment_tokens before the first (single_only: from the first); from which to which of its
    tokens it is written.
    """
    num_seqs = seq_lens.shape[0]
    num_single, num_real = distribution[0], distribution[2]
    query_len = query_start[1:] - query_start[:-1]
    first = (seq_lens - query_len) // segment_tokens  # [S]
    count = jnp.where(query_len > 0, (seq_lens - 1) // segment_tokens + 1 - first, 0)
    last_seq = num_single if single_only else num_real
    count = jnp.where(jnp.arange(num_seqs) < last_seq, count, 0)
    end = jnp.cumsum(count)  # [S]
    most = num_seqs if single_only else min(num_tokens, num_tokens // segment_tokens + 2 * num_seqs)
    index = jnp.arange(most, dtype=jnp.int32)
    s = jnp.searchsorted(end, index, side="right", method="compare_all")
    s = jnp.minimum(s, num_seqs - 1).astype(jnp.int32)
    start = (first[s] + index - (end[s] - count[s])) * segment_tokens  # position
    old_len = seq_lens[s] - query_len[s]
    block = jnp.clip(start // block_size, 0, block_tables.shape[1] - 1)
    segments = jnp.stack([
        block_tables[s, block],
        start % block_size // fold,
        query_start[s] + start - old_len + (0 if single_only else segment_tokens),
        jnp.maximum(old_len - start, 0),
        jnp.minimum(seq_lens[s] - start, segment_tokens),
    ])  # fmt: skip
    return segments.astype(jnp.int32), jnp.stack([num_single, end[-1]]).astype(jnp.int32)


def _call(
    p: Problem,
    tiles: tuple[tuple[int, QueryTile], ...],
    interpret: bool | pltpu.InterpretParams,
    prefetched: list[jax.Array],
    scales: jax.Array,
    q: jax.Array,
    new: jax.Array,
    block_tables: jax.Array,
    sinks: jax.Array | None,
    kv_pool: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    smem = pl.BlockSpec(memory_space=pltpu.SMEM)
    inputs = [scales, q, new, block_tables, *([] if sinks is None else [sinks]), kv_pool]
    specs = [smem, anywhere, anywhere, anywhere, *([] if sinks is None else [smem]), anywhere]
    out_shape = (
        jax.ShapeDtypeStruct(
            (q.shape[0], p.num_kv_heads * p.group_words, p.value_width), jnp.int32
        ),
        jax.ShapeDtypeStruct(kv_pool.shape, kv_pool.dtype),
    )
    scratch = _scratch(p, max((tile for _, tile in tiles), key=lambda tile: tile.num_tokens))
    body = partial(kernel, problem=p, tiles=tiles)
    if sinks is None:
        num_before = len(prefetched) + 4

        def run(*refs: object) -> None:
            body(*refs[:num_before], None, *refs[num_before:])
    else:
        run = body
    return pl.pallas_call(
        run,
        out_shape=out_shape,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetched),
            grid=(1,),
            in_specs=specs,
            out_specs=(anywhere, anywhere),
            scratch_shapes=scratch,
        ),
        input_output_aliases={len(prefetched) + len(inputs) - 1: 1},
        compiler_params=pltpu.CompilerParams(
            vmem_limit_bytes=_vmem_bytes(scratch) + VMEM_RESERVE, disable_bounds_checks=True
        ),
        interpret=pltpu.InterpretParams() if interpret is True else interpret,
        name="ragged_paged_attention",
    )(*prefetched, *inputs)


def _scratch(p: Problem, largest: QueryTile) -> list[Any]:
    num_tokens, num_rows = largest.num_tokens, p.num_rows(largest.num_tokens)
    heads, words, lanes = p.num_kv_heads, p.num_kv_heads * p.group_words, p.layout.lanes
    segment = (p.num_segment_slots, heads, p.segment_rows, lanes)
    fresh = (p.num_segment_slots, p.segment_rows * p.layout.fold, heads, lanes)
    semaphores = [NUM_SLOTS, NUM_PLANS, NUM_SLOTS, 2, *[p.num_segment_slots] * 3]
    return [
        pltpu.VMEM((NUM_SLOTS, p.fetch_blocks, heads, p.rows_per_block, lanes), p.pool_dtype),
        pltpu.SMEM((NUM_PLANS, p.table_window), jnp.int32),
        pltpu.SMEM((NUM_PLANS, NUM_FIELDS), jnp.int32),
        pltpu.VMEM((NUM_SLOTS, num_tokens, words * p.layout.fold, p.key_width), jnp.int32),
        pltpu.VMEM((heads, num_rows // p.rows_of_word, p.key_width), jnp.int32),
        pltpu.VMEM((heads, num_rows, LANES), jnp.float32),
        pltpu.VMEM((heads, num_rows, LANES), jnp.float32),
        pltpu.VMEM((heads, num_rows, p.value_width), jnp.float32),
        pltpu.VMEM((2, num_tokens, words, p.value_width), jnp.int32),
        pltpu.SMEM((2,), jnp.int32),
        pltpu.VMEM(segment, p.pool_dtype),
        pltpu.VMEM(fresh, jnp.int32),
        *(pltpu.SemaphoreType.DMA((n,)) for n in semaphores),
    ]


def _vmem_bytes(scratch: list[Any]) -> int:
    """Of scratch in VMEM, with rows padded to whole tiles."""
    total = 0
    for memory in scratch:
        if getattr(memory, "memory_space", None) is pltpu.VMEM:
            *leading, rows, lanes = memory.shape
            size = jnp.dtype(memory.dtype).itemsize
            total += math.prod(leading) * -(-rows // SUBLANES) * SUBLANES * lanes * size
    return total
