"""Tile sizes of the Pallas kernels, measured or estimated.

python scripts/tune_kernels.py --k 14336 --n 4096 --rows 64 2048
    on an accelerator: runs every candidate, and writes the fastest into
    pallas_kernels/<kernel>/tuned/<device kind>.json, which the kernel reads
python scripts/tune_kernels.py --k 14336 --n 4096 --rows 64 --chip v6e
    without one: compiles every candidate for the chip and ranks them by the larger of the
    program's bundles and the cycles of its copies; it writes nothing, for nothing was measured
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import tpu_dumps

from jaxllm.runtime.chips import CHIPS, Chip
from pallas_kernels.quantized_matmul import block_sizes, tpu

REPETITIONS = 20


class Work(NamedTuple):
    """What one call of a kernel does."""

    steps: int  # of its grid
    trips: int  # of the longest loop in a step
    first_bytes: int  # copied before the first step can start
    bytes: int  # copied in all


class Estimate(NamedTuple):
    """Of one call, from the compiler's final program."""

    cycles: float  # until it ends
    bundles: int
    copies: float  # cycles that they take at the chip's stated bandwidth
    spills: int  # in the loops


class Tunable(NamedTuple):
    """A kernel whose sizes can be tuned. Problems and sizes are tuples of the kernel's own."""

    problems: Callable[[argparse.Namespace], list[Any]]
    candidates: Callable[[Any], Sequence[Any]]
    build: Callable[[Any, Any], tuple[Callable[..., Any], list[Any]]]  # function, its shapes
    work: Callable[[Any, Any], Work]
    tuned: Path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kernel", default="quantized_matmul", choices=["quantized_matmul"])
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 2048])
    parser.add_argument("--k", type=int, required=True, help="rows of the weights")
    parser.add_argument("--n", type=int, required=True, help="columns of the weights")
    parser.add_argument("--bits", type=int, default=8, choices=[4, 8], help="of a weight")
    parser.add_argument("--int8-rows", action="store_true", help="quantize activations too")
    parser.add_argument("--chip", choices=CHIPS, help="one that is not here")
    arguments = parser.parse_args()
    if arguments.bits == 4 and arguments.int8_rows:
        parser.error("--int8-rows needs --bits 8")
    with tempfile.TemporaryDirectory() as folder:
        if arguments.chip:  # before anything loads libtpu
            tpu_dumps.start_dumps(Path(folder))
        kernel = tunables()[arguments.kernel]
        for problem in kernel.problems(arguments):
            if arguments.chip:
                rank(kernel, arguments.kernel, problem, arguments.chip, Path(folder))
            else:
                measure(kernel, problem)


def tunables() -> dict[str, Tunable]:
    """Every kernel that can be tuned."""
    return {
        "quantized_matmul": Tunable(
            lambda a: [
                block_sizes.Problem(rows, a.k, a.n, a.bits, 8 if a.int8_rows else 16)
                for rows in a.rows
            ],
            block_sizes.candidates,
            _build_quantized_matmul,
            _work_of_quantized_matmul,
            block_sizes.TUNED,
        ),
    }


def _build_quantized_matmul(problem: Any, sizes: Any) -> tuple[Callable[..., Any], list[Any]]:
    group_size = 128 if problem.weight_bits == 4 else None
    num_groups = -(-problem.k // group_size) if group_size else 1
    shape = jax.ShapeDtypeStruct
    shapes = [
        shape((problem.num_rows, problem.k), jnp.bfloat16),
        shape((1, problem.k, problem.n), jnp.int4 if group_size else jnp.int8),
        shape((1, num_groups, problem.n), jnp.bfloat16 if group_size else jnp.float32),
    ]
    product = partial(
        tpu.matmul, zeros=None, layer=0, group_size=group_size,
        int8_rows=problem.row_bits == 8, dtype=jnp.bfloat16, sizes=sizes,
    )  # fmt: skip
    return product, shapes


def _work_of_quantized_matmul(problem: Any, sizes: Any) -> Work:
    row_tiles, n_tiles, k_tiles = (
        -(-size // tile)
        for size, tile in zip(problem[:3], (sizes.rows, sizes.n, sizes.k), strict=True)
    )
    x = problem.num_rows * problem.k * problem.row_bits // 8
    weights = problem.k * problem.n * problem.weight_bits // 8
    if problem.weight_bits == 4:
        weights += problem.k // 128 * problem.n * 2
    first = x // row_tiles + sizes.k * sizes.n * problem.weight_bits // 8
    out = 2 * problem.num_rows * problem.n
    return Work(
        row_tiles * n_tiles * k_tiles, sizes.n // sizes.columns, first,
        x + row_tiles * weights + out,
    )  # fmt: skip


def rank(kernel: Tunable, name: str, problem: Any, chip_name: str, folder: Path) -> None:
    """Prints the candidates, the best estimate first."""
    chip = CHIPS[chip_name]
    estimates = [
        (estimate(kernel, name, problem, sizes, chip, folder), sizes)
        for sizes in kernel.candidates(problem)
    ]
    print(f"{problem.key} on {chip_name}, estimated:")
    for found, sizes in sorted(estimates):
        print(
            f"  {found.cycles / chip.clock * 1e6:9.1f} us  bundles {found.bundles:9}  cycles of "
            f"copies {found.copies:9.0f}  spills in the loops {found.spills:4}  {sizes}"
        )


def estimate(
    kernel: Tunable, name: str, problem: Any, sizes: Any, chip: Chip, folder: Path
) -> Estimate:
    """Of the problem in tiles of those sizes. The first step's copies run beside no other."""
    function, shapes = kernel.build(problem, sizes)
    loops = tpu_dumps.compile_loops(folder, chip, name, function, shapes)
    work = kernel.work(problem, sizes)
    bundles = work.steps * bundles_of_step(loops, work.trips)
    copies, first = (
        size / tpu_dumps.bytes_per_cycle(chip) for size in (work.bytes, work.first_bytes)
    )
    spills = sum(loop.spills for loop in loops)
    return Estimate(max(bundles, copies) + first, bundles, copies, spills)


def bundles_of_step(loops: Sequence[tpu_dumps.Loop], trips: int) -> int:
    """Of one step of the grid, the outermost loop if it has more than one step: its own bundles,
    what is done only in some steps included, and its longest loop as often as it runs."""
    own = sum(loop.bundles for loop in loops if loop.depth == 1)
    inner = max((loop.bundles for loop in loops if loop.depth > 1), default=0)
    return own + trips * inner


def measure(kernel: Tunable, problem: Any) -> None:
    """Runs the candidates, prints their times, and keeps the fastest in the device's file."""
    device = jax.devices()[0]
    if device.platform != "tpu":
        raise SystemExit(
            f"the kernel runs on TPU and this device is {device.device_kind}; --chip ranks the "
            f"candidates for one that is not here"
        )
    times = {}
    for sizes in kernel.candidates(problem):
        function, shapes = kernel.build(problem, sizes)
        operands = [jnp.ones(shape.shape, shape.dtype) for shape in shapes]
        times[sizes] = seconds(jax.jit(function), operands)
        print(f"{problem.key} {times[sizes] * 1e6:9.1f} us  {sizes}")
    keep(
        kernel.tuned / f"{device.device_kind}.json", problem.key, min(times, key=times.__getitem__)
    )


def seconds(function: Callable[..., Any], operands: list[Any]) -> float:
    """The shortest of a few runs of several calls each."""
    function(*operands).block_until_ready()
    runs = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(REPETITIONS):
            out = function(*operands)
        out.block_until_ready()
        runs.append((time.perf_counter() - start) / REPETITIONS)
    return min(runs)


def keep(file: Path, key: str, sizes: Sequence[int]) -> None:
    """Writes one entry; the others stay."""
    tuned = json.loads(file.read_text()) if file.is_file() else {}
    tuned[key] = list(sizes)
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(tuned, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
