"""What is read from libtpu's dumps, and what is made of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tpu_topology import needs_libtpu, run_apart

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import tpu_dumps
import tune_kernels
from tpu_dumps import Loop

PROGRAM = """
// a comment
   0x0   :  { %s1 = something  }
   0x1 LB: > { %s2 = start of the outer loop }
   0x2   : > { %s3 = in it
     ;;  %v4 = the same bundle }
   0x3 LB: >> { %s5 = the inner loop }
   0x4   :  {}
   0x5   : > { %s6 = of the outer loop, moved into the inner one }
   0x6   : >> { %s7 = branch back }
   0x7   : > { %s8 = branch back }
   0x8 LBPF: > { %s9 = a second outer loop }
   0x9   :  { %s9 = done }
"""
USAGE = """
MATMUL, VSTORE, VSTORE:SPILL
== CAPACITY
2 1 1
== UTIL
0 0 0
0 1 1
0 0 0
1 1 0
1 1 1
1 1 1
1 1 1
0 0 0
0 1 1
0 0 0
"""


def test_loops_are_read_from_a_program() -> None:
    assert tpu_dumps.loops_of(PROGRAM, USAGE) == [
        Loop(depth=1, bundles=3, spills=1), Loop(depth=2, bundles=4, spills=3, products=4),
        Loop(depth=1, bundles=1, spills=1),
    ]  # fmt: skip


def test_a_step_is_the_outer_loop_and_the_trips_of_the_longest_inner_one() -> None:
    loops = [Loop(1, 100, 0), Loop(2, 30, 0), Loop(2, 7, 0)]
    assert tune_kernels.bundles_of_step(loops, trips=4) == 100 + 4 * 30
    assert tune_kernels.bundles_of_step(loops[:1], trips=1) == 100


def test_a_measurement_joins_the_others_of_its_device(tmp_path: Path) -> None:
    file = tmp_path / "tuned" / "TPU v6 lite.json"
    tune_kernels.keep(file, "a", (32, 128))
    tune_kernels.keep(file, "b", (64, 256))
    tune_kernels.keep(file, "a", (32, 512))
    assert json.loads(file.read_text()) == {"a": [32, 512], "b": [64, 256]}


def test_the_work_of_a_product_is_its_bytes() -> None:
    kernel = tune_kernels.tunables()["quantized_matmul"]
    problem = (64, 4096, 8192, 8, 16)
    from pallas_kernels.quantized_matmul.block_sizes import BlockSizes, Problem

    work = kernel.work(Problem(*problem), BlockSizes(64, 2048, 1024, 512))
    assert (work.steps, work.trips) == (2 * 8, 2)
    assert work.bytes == 64 * 4096 * 2 + 4096 * 8192 + 64 * 8192 * 2
    assert work.first_bytes == 64 * 4096 * 2 + 2048 * 1024


RANKING = """
import sys, tempfile
from pathlib import Path
sys.path.insert(0, "scripts")
import tpu_dumps
with tempfile.TemporaryDirectory() as folder:
    tpu_dumps.start_dumps(Path(folder))
    import tune_kernels
    from jaxllm.runtime.chips import CHIPS
    from pallas_kernels.quantized_matmul.block_sizes import Problem, heuristic
    kernel = tune_kernels.tunables()["quantized_matmul"]
    problem = Problem(64, 14336, 4096, 8, 16)
    sizes = heuristic(problem)
    function, shapes = kernel.build(problem, sizes)
    work = kernel.work(problem, sizes)
    for name in ("v5e", "v6e"):
        chip = CHIPS[name]
        loops = tpu_dumps.compile_loops(Path(folder), chip, "quantized_matmul", function, shapes)
        bundles = work.steps * tune_kernels.bundles_of_step(loops, work.trips)
        print(bundles / (work.bytes / tpu_dumps.bytes_per_cycle(chip)))
"""


@needs_libtpu
def test_an_int8_decode_product_is_bound_by_memory() -> None:
    printed = run_apart("-c", RANKING)
    shares = [float(line) for line in printed.split()]
    assert len(shares) == 2
    assert max(shares) < 0.95, shares  # bundles, of the cycles that its copies take


def test_a_kernel_that_was_not_compiled_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no program of a kernel 'missing'"):
        tpu_dumps.read_loops(tmp_path, "missing")
