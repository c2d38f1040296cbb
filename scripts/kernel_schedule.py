#!/usr/bin/env python3
"""What the TPU kernel of ragged paged attention became: cycles of computing an item beside those of
copying it, from the compiler's final schedule, for a chip that need not be there.

    python scripts/kernel_schedule.py --chip v6e [--prefill]

A bundle is what a chip starts in one cycle. The table's `bundles` are those of one full item of the
decoding loop: the loop's own, and each inner loop's times how often it runs. `copies` is how many
cycles the item's keys and values take from HBM at its stated bandwidth.

With --prefill the `bundles` are those of 128 rows of queries by 256 rows of the pool in the tiles
of long sequences, where no mask is needed, and `products` is how many cycles the two products take
at the chip's stated FLOP/s. That table takes minutes. Needs libtpu.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import tpu_dumps
from tpu_dumps import Loop

from jaxllm.runtime.chips import CHIPS
from pallas_kernels.ragged_paged_attention import tpu
from pallas_kernels.ragged_paged_attention.tpu_layout import physical_shape
from pallas_kernels.ragged_paged_attention.tpu_problem import (
    COPIES_AT_ONCE,
    Problem,
    QueryTile,
)
from pallas_kernels.ragged_paged_attention.tpu_write import HEADS_AT_ONCE

# query heads, key heads, head size, the pool's type
CASES = [
    (32, 8, 128, "bfloat16"), (9, 3, 64, "bfloat16"), (32, 8, 128, "int8"),
    (32, 8, 128, "float8_e4m3fn"), (16, 16, 64, "bfloat16"), (28, 4, 128, "bfloat16"),
    (64, 8, 128, "bfloat16"), (40, 8, 128, "bfloat16"), (32, 8, 128, "float8_e5m2"),
]  # fmt: skip
NUM_SEQS, NUM_BLOCKS, TABLE_LEN = 64, 512, 256
NUM_TOKENS = 1024  # of a call with --prefill
COLUMNS = "queries/keys/size type bundles copies ratio spills compile_s"
PREFILL_COLUMNS = COLUMNS.replace("copies", "products")


def item_bundles(
    loops: list[Loop], problem: Problem, tile: QueryTile, num_blocks: int | None = None
) -> tuple[int, int]:
    """Bundles and spills of one item of the decoding loop, with so many blocks; None: a full one.

    That loop is the last of the outermost ones that computes products, in itself or in a loop
    inside it. The first loop inside starts copies, COPIES_AT_ONCE of them; the products' runs once
    for each unit; the others belong to a sequence's beginning or end.
    """
    num_blocks = problem.fetch_blocks if num_blocks is None else num_blocks
    num_units = problem.num_kv_heads // tile.unit_heads * -(-num_blocks // tile.compute_blocks)
    outer, *inner = next(g for g in reversed(_groups(loops)) if any(loop.products for loop in g))
    computing = [loop for loop in inner if loop.products]
    starting = inner[0].bundles * num_blocks // COPIES_AT_ONCE
    total = outer.bundles + starting + sum(loop.bundles for loop in computing) * num_units
    return total, outer.spills + sum(loop.spills for loop in computing)


def prefill_bundles(loops: list[Loop], problem: Problem, tile: QueryTile) -> tuple[float, int]:
    """Bundles of 128 rows by 256 columns, and the spills of a whole unit.

    The last of the outermost loops holds one loop for units without a mask, which this counts, and
    one for units with one. Where all of an item is one unit they are both in one loop, and this is
    their mean.
    """
    plain, *masked = [loop for loop in _groups(loops)[-1] if loop.products]
    blocks = tile.visible_blocks if masked else tile.visible_blocks + tile.compute_blocks
    rows = tile.unit_heads * tile.unit_parts * tile.unit_rows
    columns = blocks * problem.rows_per_block
    return plain.bundles * 128 * 256 / (rows * columns), plain.spills


def write_bundles(loops: list[Loop], num_kv_heads: int) -> int:
    """Bundles of writing one token, the first of the outermost loops; the loop inside takes a few
    heads at a time."""
    outer, *inner = _groups(loops)[0]
    heads = math.gcd(num_kv_heads, HEADS_AT_ONCE)
    return outer.bundles + sum(loop.bundles for loop in inner) * num_kv_heads // heads


def _groups(loops: list[Loop]) -> list[list[Loop]]:
    """Each of the outermost loops with those inside it."""
    starts = [i for i, loop in enumerate(loops) if loop.depth == 1]
    return [loops[a:b] for a, b in zip(starts, [*starts[1:], len(loops)], strict=True)]


def compile_case(
    chip: str,
    case: tuple[int, int, int, str],
    dump: Path,
    block_size: int,
    num_seqs: int = NUM_SEQS,
    *,
    prefill: bool = False,
) -> tuple[Problem, QueryTile, list[Loop], float]:
    """The kernel's sizes, those of its last kind of tile, its loops and the seconds that it took
    to compile."""
    num_heads, num_kv_heads, head_dim, pool_dtype = case
    pool_shape = physical_shape(1, NUM_BLOCKS, block_size, num_kv_heads, head_dim)
    max_query_len, num_tokens = (None, NUM_TOKENS) if prefill else (1, num_seqs)
    call = partial(tpu.ragged_paged_attention, scale=head_dim**-0.5, max_query_len=max_query_len)
    tpu_dumps.clear(dump)
    with tpu_dumps.described(CHIPS[chip]) as place:
        q = place((num_tokens, num_heads, head_dim), jnp.bfloat16)
        k = place((num_tokens, num_kv_heads, head_dim), jnp.bfloat16)
        pool = place(pool_shape, jnp.dtype(pool_dtype))
        numbers = [(), (num_seqs,), (num_seqs, TABLE_LEN), (num_seqs + 1,), (3,)]
        tables = [place(shape, jnp.int32) for shape in numbers]
        lowered = jax.jit(call, donate_argnums=3).lower(q, k, k, pool, *tables)
        problem, (*_, (_, tile)) = tpu.plan(q, k, pool, tables[2], 0, None, max_query_len, None)
    started = time.process_time()
    lowered.compile()
    seconds = time.process_time() - started
    return problem, tile, tpu_dumps.read_loops(dump, "ragged_paged_attention"), seconds


def row_of_table(
    chip: str, case: tuple[int, int, int, str], block_size: int, dump: Path, *, prefill: bool
) -> list[str]:
    """One case's row of the table."""
    problem, tile, loops, seconds = compile_case(
        chip, case, dump, block_size, NUM_SEQS, prefill=prefill
    )
    num_heads, num_kv_heads, head_dim, pool_dtype = case
    bundles: float
    if prefill:
        bundles, spills = prefill_bundles(loops, problem, tile)
        lanes = problem.key_width + problem.value_width  # of the two products
        least = 2 * 128 * 256 * lanes / (CHIPS[chip].flops / CHIPS[chip].clock)
    else:
        bundles, spills = item_bundles(loops, problem, tile)
        tokens = problem.fetch_blocks * problem.block_size
        size = tokens * 2 * num_kv_heads * head_dim * problem.pool_dtype.itemsize
        least = size / tpu_dumps.bytes_per_cycle(CHIPS[chip])
    return [
        f"{num_heads}/{num_kv_heads}/{head_dim}", pool_dtype, f"{bundles:.0f}", f"{least:.0f}",
        f"{bundles / least:.2f}", str(spills), f"{seconds:.1f}",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chip", choices=CHIPS, default="v6e")
    parser.add_argument("--block-size", type=int, default=32, help="tokens of a block")
    parser.add_argument("--prefill", action="store_true", help="of long sequences")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name has this")
    arguments = parser.parse_args()
    chip, block_size, prefill = arguments.chip, arguments.block_size, arguments.prefill
    columns = (PREFILL_COLUMNS if prefill else COLUMNS).split()
    with tempfile.TemporaryDirectory() as dump:
        tpu_dumps.start_dumps(Path(dump))
        print(f"| {' | '.join(columns)} |")
        print("|---|---|" + "---:|" * (len(columns) - 2))
        for case in CASES:
            if arguments.only not in "/".join(map(str, case)):
                continue
            row = row_of_table(chip, case, block_size, Path(dump), prefill=prefill)
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
