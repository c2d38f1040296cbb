"""Tile sizes of quantized products on TPU: a heuristic that always answers, overridden by what was
measured, tuned/<device kind>.json (see scripts/tune_kernels.py)."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from pallas_kernels.device import tuned_sizes

LANES = 128
TUNED = Path(__file__).parent / "tuned"
TILE_WEIGHTS = 1 << 20  # of one copy: long enough to hide a grid step, short enough to start with
MAX_ROWS = 512  # of x that one reading of the weights serves
MAX_ROWS_BYTES = 16 << 20  # x of a tile lies on the chip whole, twice


class BlockSizes(NamedTuple):
    """A tile of the product. A grid step takes `k` rows by `n` columns of the weights, and in it
    `columns` at a time."""

    rows: int  # of x, a multiple of 32
    k: int  # a multiple of 128
    n: int  # a multiple of columns
    columns: int  # a multiple of 128


class Problem(NamedTuple):
    """What sizes depend on beside the chip."""

    num_rows: int  # T
    k: int  # K
    n: int  # N
    weight_bits: int  # 8 or 4
    row_bits: int  # 16, or 8 for int8 rows

    @property
    def key(self) -> str:
        """Its name in a tuned file; numbers of rows up to the next power of two share one."""
        rows = 1 << max(self.num_rows - 1, 0).bit_length()
        return f"rows{rows}-k{self.k}-n{self.n}-w{self.weight_bits}-x{self.row_bits}"


def block_sizes(problem: Problem, device_kind: str) -> BlockSizes:
    """The tuned sizes for the problem on that device, or else the heuristic's."""
    tuned = tuned_sizes(TUNED, device_kind).get(problem.key)
    return heuristic(problem) if tuned is None else BlockSizes(*tuned)


def heuristic(problem: Problem) -> BlockSizes:
    """Sizes from the shapes: wide and deep tiles in one unrolled body. With many rows the matrix
    units, not copies, are what a grid step waits for, so that it may be twice as long."""
    few = problem.num_rows <= LANES
    row_limit = min(MAX_ROWS, max(32, MAX_ROWS_BYTES * 8 // problem.row_bits // problem.k))
    rows = _even_tile(problem.num_rows, row_limit // 32 * 32, 32)
    k = _even_tile(problem.k, 2048, LANES)
    columns = min(512, _round_up(problem.n, LANES))
    most = TILE_WEIGHTS * (1 if few else 2) // k
    n = max(columns, min(most, _round_up(problem.n, columns)) // columns * columns)
    return BlockSizes(rows, k, n, columns)


def candidates(problem: Problem) -> list[BlockSizes]:
    """Sizes worth measuring, the heuristic's first."""
    first = heuristic(problem)
    found = [first]
    for max_k in (1024, 2048, 4096):
        k = _even_tile(problem.k, max_k, LANES)
        for columns in (256, 512):
            for n in (512, 1024, 2048):
                sizes = BlockSizes(first.rows, k, n, columns)
                fits = n <= _round_up(problem.n, columns) and k * n <= 4 * TILE_WEIGHTS
                if fits and sizes not in found:
                    found.append(sizes)
    return found


def _even_tile(size: int, limit: int, multiple: int) -> int:
    """The tile of as few equal tiles as the limit allows, rounded up."""
    num_tiles = -(-size // limit)
    return _round_up(-(-size // num_tiles), multiple)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
