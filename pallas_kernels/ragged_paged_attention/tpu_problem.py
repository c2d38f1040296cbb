"""What the parts of the TPU kernel share: its static sizes, its memory, masks of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.ragged_paged_attention.tpu_layout import PoolLayout

NUM_PLANS = 8  # a power of two, at least NUM_SLOTS + PLANNED_AHEAD
NUM_SLOTS = 4  # a power of two: items whose blocks are in VMEM
FETCHED_AHEAD = NUM_SLOTS - 1  # items whose copies run while one is computed
PLANNED_AHEAD = 4  # items before that whose block table is on its way
COPIES_AT_ONCE = 8  # copies started in one stretch of code
TABLE_ALIGNMENT = 128  # entries; where a copy from a block table may begin
SUBLANES = 8
# Columns of the list of segments that are written, see tpu.write_segments.
BLOCK, ROW, TOKEN, FROM, TO = range(5)
# Fields of the plan of an item.
(TOKEN_AT, NUM_TOKENS, POSITION, COLUMN, NUM_BLOCKS, OFFSET, IS_FIRST, IS_LAST, TILE) = range(9)
NUM_FIELDS = 9

Scalar = Any  # an int or a traced int32


@dataclass(frozen=True)
class QueryTile:
    """Static sizes of how sequences of one kind are computed."""

    num_tokens: int  # queries of a tile
    unit_rows: int  # query rows of one product
    unit_heads: int  # key heads whose products are interleaved
    compute_blocks: int  # blocks of one product
    stage_lag: int  # products between one stage and the next; the logits of as many are held
    unit_parts: int = 1  # parts of a head's rows whose products are interleaved too
    visible_blocks: int = 0  # blocks of one product where no mask is needed; 0: that is never known


@dataclass(frozen=True)
class Problem:
    """Static sizes of a call."""

    num_kv_heads: int  # K
    rows_per_block: int  # B / R
    layout: PoolLayout
    group_words: int  # 32-bit words of a key head's queries in one lane
    compute_dtype: Any
    pool_dtype: Any
    fetch_blocks: int
    table_window: int  # entries of a block table that an item fetches
    max_blocks: int  # entries of a block table
    segment_rows: int
    num_segment_slots: int
    has_window: bool
    soft_cap: float | None

    @property
    def block_size(self) -> int:
        return self.rows_per_block * self.layout.fold

    @property
    def rows_of_word(self) -> int:
        """Query heads that share a 32-bit word."""
        return 4 // jnp.dtype(self.compute_dtype).itemsize

    @property
    def tokens_of_word(self) -> int:
        """Rows of the pool that share a 32-bit word."""
        return 4 // jnp.dtype(self.pool_dtype).itemsize

    @property
    def product_dtype(self) -> Any:
        """As what stored keys and values enter a product: the matrix units take 8-bit floats
        beside bfloat16 as they are."""
        is_float8 = self.pool_dtype in (jnp.float8_e4m3fn, jnp.float8_e5m2)
        as_it_is = is_float8 and self.compute_dtype == jnp.bfloat16
        return self.pool_dtype if as_it_is else self.compute_dtype

    @property
    def key_width(self) -> int:
        return self.layout.key_width

    @property
    def value_width(self) -> int:
        return self.layout.value_width

    def num_rows(self, num_tokens: int) -> int:
        """Rows of a key head for a tile of queries, streams outermost, whole sublanes."""
        rows = self.layout.fold * self.group_words * num_tokens * self.rows_of_word
        return -(-rows // SUBLANES) * SUBLANES


class Refs(NamedTuple):
    """What the kernel is given, in the order of pallas_call."""

    layer: Any  # SMEM [1]
    window: Any  # SMEM [1]
    distribution: Any  # SMEM [3]
    seq_lens: Any  # SMEM [S]
    query_start: Any  # SMEM [S + 1]
    segments: Any  # SMEM [5, I]
    num_segments: Any  # SMEM [2]: of one token, and in all
    scales: Any  # SMEM [3, K] float32: before the soft cap, before exp2, of the output
    q: Any  # HBM [T', R * K * words, key width] int32
    new: Any  # HBM [T', K, W] int32
    block_tables: Any  # HBM [S, M]
    sinks: Any  # SMEM [K, query heads of a key head, padded] float32, or None
    pool_in: Any  # the pool; it is `pool`
    out: Any  # HBM [T', K * words, value width] int32
    pool: Any  # HBM [L, N, K, B / R, W]
    kv: Any  # VMEM [slots, fetch blocks, K, B / R, W]
    tables: Any  # SMEM [plans, table window]
    plans: Any  # SMEM [plans, fields]
    q_stage: Any  # VMEM [slots, tokens, R * K * words, key width] int32
    q_rows: Any  # VMEM [K, word rows, key width] int32
    maxima: Any  # VMEM [K, rows, 128] float32
    sums: Any  # VMEM [K, rows, 128] float32, to be added up
    acc: Any  # VMEM [K, rows, value width] float32
    out_stage: Any  # VMEM [2, tokens, K * words, value width] int32
    out_tokens: Any  # SMEM [2]: of the copies that run
    old: Any  # VMEM [segment slots, K, segment rows, W]
    fresh: Any  # VMEM [segment slots, segment tokens, K, W] int32
    kv_sem: Any
    table_sem: Any
    q_sem: Any
    out_sem: Any
    read_sem: Any
    fresh_sem: Any
    write_sem: Any


def stream_of_lane(p: Problem, shape: tuple[int, int]) -> jax.Array:
    """Whose key or value a lane of a row holds: int32 in that shape [.., W]."""
    stream = lax.broadcasted_iota(jnp.int32, shape, 1) // p.layout.head_dim
    return jnp.where(stream >= p.layout.fold, stream - p.layout.fold, stream)


def token_mask(p: Problem, num_rows: int, start: Scalar, stop: Scalar) -> jax.Array:
    """Bits of the words of rows 0 to num_rows that hold tokens start to stop: [rows / P, W]."""
    packed, fold = p.tokens_of_word, p.layout.fold
    shape = (num_rows // packed, p.layout.lanes)
    row = lax.broadcasted_iota(jnp.int32, shape, 0) * packed
    stream = stream_of_lane(p, shape)
    mask = jnp.zeros(shape, jnp.int32)
    bits = 32 // packed
    for j in range(packed):
        token = (row + j) * fold + stream
        field = (1 << bits) - 1 << (bits * j)
        field -= (field >> 31) << 32  # as a signed word
        mask |= jnp.where((token >= start) & (token < stop), jnp.int32(field), 0)
    return mask
