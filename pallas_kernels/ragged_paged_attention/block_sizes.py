"""Tile sizes of the TPU kernel: a heuristic that always answers, then what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from pallas_kernels.device import tuned_sizes

TUNED = Path(__file__).parent / "tuned"
ITEM_BYTES = 4 << 20  # of one fetch: long enough to hide the latency of the next
DECODE_ROWS = 4096  # of the pool times heads, in one stretch of code without a loop
PREFILL_ROWS = 512  # query rows of a key head
PREFILL_BYTES = 28 << 20  # of VMEM for the tokens of a tile: v7x has 64 MiB, others twice that
PREFILL_UNIT_ROWS = 256
PREFILL_COLUMNS = 512
INTERLEAVED = 8  # products, of heads or of parts of their rows
FEW_TOKENS = 8  # of a tile for sequences with a few new tokens


class BlockSizes(NamedTuple):
    """fetch_tokens: context of one item, that is of one wait. decode_tokens, prefill_tokens: of
    one product. decode_heads: key heads whose products are interleaved. query_tokens: new tokens
    of a tile; unit_rows: query rows of one product."""

    fetch_tokens: int
    decode_tokens: int
    decode_heads: int
    prefill_tokens: int
    query_tokens: int
    unit_rows: int


def block_sizes(
    num_kv_heads: int,
    query_rows: int,
    fold: int,
    row_bytes: int,
    token_bytes: int,
    device_kind: str,
) -> BlockSizes:
    """Sizes for K key heads. query_rows: of one token for a key head, in all streams; fold: tokens
    of a row of the pool, whose bytes are row_bytes; token_bytes: of VMEM for one token of a tile.
    Tokens are powers of two."""
    problem = f"{num_kv_heads}x{query_rows}x{fold}x{row_bytes}"
    tuned = tuned_sizes(TUNED, device_kind).get(problem)
    if tuned is not None:
        return BlockSizes(**tuned)
    heads = largest_divisor(num_kv_heads, INTERLEAVED)
    rows = _power_of_two(DECODE_ROWS // heads, 128, 2048)
    item_rows = _power_of_two(ITEM_BYTES // (num_kv_heads * row_bytes), 64, 4096)
    tokens = min(PREFILL_ROWS // query_rows, PREFILL_BYTES // token_bytes)
    query_tokens = _power_of_two(tokens, FEW_TOKENS, 128)
    return BlockSizes(
        fetch_tokens=max(item_rows, 64) * fold,
        decode_tokens=min(rows, item_rows) * fold,
        decode_heads=heads,
        prefill_tokens=min(item_rows, PREFILL_COLUMNS) * fold,
        query_tokens=query_tokens,
        unit_rows=PREFILL_UNIT_ROWS,
    )


def largest_divisor(number: int, most: int) -> int:
    """Of a number, up to a bound."""
    return max(n for n in range(1, min(number, most) + 1) if number % n == 0)


def _power_of_two(number: int, least: int, most: int) -> int:
    """The largest power of two up to a number, within bounds."""
    return min(max(1 << max(number, 1).bit_length() - 1, least), most)
