#!/usr/bin/env python3
"""What the TPU kernel of ragged paged attention became: cycles of computing an item beside those of
copying it, from the compiler's final schedule, for a chip that need not be there.

    python scripts/kernel_schedule.py --chip v6e

A bundle is what a chip starts in one cycle. The table's `bundles` are those of one full item of the
decoding loop: the loop's own, and each inner loop's times how often it runs. `copies` is how many
cycles the item's keys and values take from HBM at its stated bandwidth. Needs libtpu.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import tpu_dumps

sys.path.insert(0, str(Path(__file__).parents[1]))


# query heads, key heads, head size, the pool's type
CASES = [
    (32, 8, 128, "bfloat16"), (9, 3, 64, "bfloat16"), (32, 8, 128, "int8"),
    (32, 8, 128, "float8_e4m3fn"), (16, 16, 64, "bfloat16"), (28, 4, 128, "bfloat16"),
    (64, 8, 128, "bfloat16"), (40, 8, 128, "bfloat16"), (32, 8, 128, "float8_e5m2"),
]  # fmt: skip
BLOCK_SIZE = 32
NUM_SEQS, NUM_BLOCKS, TABLE_LEN = 64, 512, 256
COLUMNS = "queries/keys/size type bundles copies ratio spills compile_s"


class Loop(NamedTuple):
    """A loop of the final program: its depth, bundles that are in no loop inside it, and spills."""

    depth: int
    own: int
    spills: int
    products: int


def loops_of(program: str, usage: str) -> list[Loop]:
    """The loops of a kernel in the order in which they begin. A bundle counts for the loop of its
    depth that began last, wherever the compiler has put it."""
    spills, products = (tpu_dumps.units(usage, u) for u in (tpu_dumps.SPILLS, tpu_dumps.PRODUCTS))
    pattern = re.compile(r"^\s*0x([0-9a-f]+)\s+(LB)?[A-Z]*\s*:\s*(>*)\s*(\{\})?", re.M)
    loops: list[list[int]] = []
    open_loops: list[int] = []
    depth = 0
    for match in pattern.finditer(program):
        address = int(match[1], 16)
        if match[3] or not match[4]:  # an empty bundle bears no mark of its depth
            depth = len(match[3])
        if match[2]:
            open_loops = open_loops[: depth - 1]
            open_loops.append(len(loops))
            loops.append([depth, 0, 0, 0])
        if depth == 0 or not open_loops:
            continue
        loop = loops[open_loops[min(depth, len(open_loops)) - 1]]
        loop[1] += 1
        if address < len(spills):
            loop[2] += spills[address]
            loop[3] += products[address]
    return [Loop(*loop) for loop in loops]


def item_bundles(loops: list[Loop], num_blocks: int, num_units: int) -> tuple[int, int]:
    """Bundles and spills of one full item of the decoding loop.

    That loop is the last of the outermost ones that computes products, in itself or in a loop
    inside it. The first loop inside starts copies, COPIES_AT_ONCE of them; the products' runs
    num_units times; the others belong to a sequence's beginning or end.
    """
    from pallas_kernels.ragged_paged_attention.tpu_problem import COPIES_AT_ONCE

    starts = [i for i, loop in enumerate(loops) if loop.depth == 1]
    groups = [loops[a:b] for a, b in zip(starts, [*starts[1:], len(loops)], strict=True)]
    outer, *inner = next(g for g in reversed(groups) if any(loop.products for loop in g))
    computing = [loop for loop in inner if loop.products]
    starting = inner[0].own * num_blocks // COPIES_AT_ONCE
    total = outer.own + starting + sum(loop.own for loop in computing) * num_units
    return total, outer.spills + sum(loop.spills for loop in computing)


def compile_case(chip: str, case: tuple[int, int, int, str], dump: Path) -> tuple[Any, ...]:
    """The kernel's sizes, its loops and the seconds that it took to compile."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.ragged_paged_attention import tpu
    from pallas_kernels.ragged_paged_attention.tpu_layout import physical_shape

    num_heads, num_kv_heads, head_dim, pool_dtype = case
    pool_shape = physical_shape(1, NUM_BLOCKS, BLOCK_SIZE, num_kv_heads, head_dim)
    call = partial(tpu.ragged_paged_attention, scale=head_dim**-0.5, max_query_len=1)
    tpu_dumps.clear(dump)
    with tpu_dumps.described(tpu_dumps.CHIPS[chip]) as place:
        q = place((NUM_SEQS, num_heads, head_dim), jnp.bfloat16)
        k = place((NUM_SEQS, num_kv_heads, head_dim), jnp.bfloat16)
        pool = place(pool_shape, jnp.dtype(pool_dtype))
        numbers = [(), (NUM_SEQS,), (NUM_SEQS, TABLE_LEN), (NUM_SEQS + 1,), (3,)]
        tables = [place(shape, jnp.int32) for shape in numbers]
        lowered = jax.jit(call, donate_argnums=3).lower(q, k, k, pool, *tables)
        problem, ((_, tile),) = tpu.plan(q, k, pool, tables[2], 0, None, 1, None)
    started = time.process_time()
    lowered.compile()
    seconds = time.process_time() - started
    loops = loops_of(*tpu_dumps.read_program(dump, "ragged_paged_attention"))
    return problem, tile, loops, seconds


def row_of_table(chip: str, case: tuple[int, int, int, str], dump: Path) -> list[str]:
    """One case's row of the table."""
    problem, tile, loops, seconds = compile_case(chip, case, dump)
    num_units = problem.num_kv_heads // tile.unit_heads
    num_units *= problem.fetch_blocks // tile.compute_blocks
    bundles, spills = item_bundles(loops, problem.fetch_blocks, num_units)
    tokens = problem.fetch_blocks * problem.block_size
    num_heads, num_kv_heads, head_dim, pool_dtype = case
    size = tokens * 2 * num_kv_heads * head_dim * problem.pool_dtype.itemsize
    copies = size / tpu_dumps.CHIPS[chip].bytes_per_cycle
    return [
        f"{num_heads}/{num_kv_heads}/{head_dim}", pool_dtype, str(bundles), f"{copies:.0f}",
        f"{bundles / copies:.2f}", str(spills), f"{seconds:.1f}",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chip", choices=tpu_dumps.CHIPS, default="v6e")
    chip = parser.parse_args().chip
    with tempfile.TemporaryDirectory() as dump:
        tpu_dumps.start_dumps(Path(dump))
        print(f"| {' | '.join(COLUMNS.split())} |")
        print("|---|---|" + "---:|" * (len(COLUMNS.split()) - 2))
        for case in CASES:
            print(f"| {' | '.join(row_of_table(chip, case, Path(dump)))} |", flush=True)


if __name__ == "__main__":
    main()
