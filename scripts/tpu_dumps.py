"""What libtpu made of a Pallas kernel, for a chip that need not be there: bundles of each loop.

libtpu writes the final program of every kernel as text when it is told to before it is loaded. A
bundle is what a core issues in one cycle, so a loop's bundles are its cycles if nothing waits.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

sys.path.insert(0, str(Path(__file__).parents[1]))

from jaxllm.runtime.chips import Chip, described_devices

SPILLS, PRODUCTS = "VSTORE:SPILL", "MATMUL"  # units
BUNDLE = re.compile(r"\s*0x([0-9a-f]+)\s+([A-Z]*)\s*:\s*(>*)\s*(\{\})?")


class Loop(NamedTuple):
    """A loop of a kernel's program, in the order in which they begin."""

    depth: int  # 1 for one that is in no other
    bundles: int  # without those of loops in it
    spills: int = 0  # stores of registers that ran short, of the same bundles
    products: int = 0  # operations of the matrix units


def start_dumps(folder: Path) -> None:
    """Has libtpu write its programs into the folder. Call it before anything loads libtpu."""
    jax.config.update("jax_platforms", "cpu")
    os.environ["LIBTPU_INIT_ARGS"] = (
        f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_emit_annotations=true"
    )


def compile_loops(
    folder: Path, chip: Chip, kernel: str, function: Callable[..., Any], shapes: Sequence[Any]
) -> list[Loop]:
    """The loops of the kernel (a pallas_call's name) in a function compiled for one chip."""
    clear(folder)
    with described(chip) as place:
        jax.jit(function).lower(*(place(s.shape, s.dtype) for s in shapes)).compile()
    return read_loops(folder, kernel)


def clear(folder: Path) -> None:
    """Forgets the programs that were written."""
    for file in folder.iterdir():
        file.unlink()


@contextmanager
def described(chip: Chip) -> Iterator[Callable[..., Any]]:
    """A chip that what is lowered meanwhile is for; gives jax.ShapeDtypeStruct for arrays on it."""
    mesh = Mesh(np.array(described_devices(chip, 1)[:1]), ("chip",))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        yield partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, PartitionSpec()))


def bytes_per_cycle(chip: Chip) -> float:
    """Of a chip's memory, at its stated bandwidth."""
    return chip.memory_bandwidth / chip.clock


def read_loops(folder: Path, kernel: str) -> list[Loop]:
    """As read_program."""
    return loops_of(*read_program(folder, kernel))


def read_program(folder: Path, kernel: str) -> tuple[str, str]:
    """The program of a kernel and its use of a chip's units. Raises FileNotFoundError where libtpu
    has written no program of that name."""
    programs = [
        file
        for file in sorted(folder.glob(f"*-{kernel}*-final_bundles.txt"))
        if "schedule-analysis" not in file.name
    ]
    if not programs:
        raise FileNotFoundError(f"no program of a kernel {kernel!r} in {folder}")
    stem = re.sub(r"-\d+-final_bundles\.txt$", "", programs[-1].name)
    usage = next(folder.glob(f"{stem}-*final_hlo-static-per-bundle-utilization.txt"))
    return programs[-1].read_text(errors="replace"), usage.read_text(errors="replace")


def loops_of(program: str, usage: str) -> list[Loop]:
    """The loops of a program, which marks a bundle's depth by that many ">" and a loop's first
    bundle by "LB".

    The scheduler moves bundles of an outer loop in among those of an inner one, where they run as
    often as it does. So a loop goes on to the last bundle of its depth before the next loop of that
    depth or of an outer one begins, and a bundle belongs to the innermost loop that it is in.
    """
    depths, starts = _bundles(program)
    owners = [-1] * len(depths)
    for loop, start in enumerate(starts):  # inner ones begin later, and take theirs back
        depth = depths[start]
        after = (other for other in starts[loop + 1 :] if depths[other] <= depth)
        end = next(after, len(depths))
        last = max(i for i in range(start, end) if depths[i] >= depth)
        owners[start : last + 1] = [loop] * (last + 1 - start)
    spills, products = units(usage, SPILLS), units(usage, PRODUCTS)
    loops = []
    for loop, start in enumerate(starts):
        own = [i for i, owner in enumerate(owners) if owner == loop]
        sums = (sum(unit[i] for i in own if i < len(unit)) for unit in (spills, products))
        loops.append(Loop(depths[start], len(own), *sums))
    return loops


def _bundles(program: str) -> tuple[list[int], list[int]]:
    """The depth of each bundle, and which ones loops begin with."""
    depths: list[int] = []
    starts: list[int] = []
    for line in program.splitlines():
        match = BUNDLE.match(line)
        if match is None:
            continue  # a bundle goes on over several lines
        if match[2].startswith("LB"):
            starts.append(len(depths))
        unmarked = match[4] and not match[3]  # an empty bundle bears no mark
        depths.append(depths[-1] if unmarked and depths else len(match[3]))
    return depths, starts


def units(usage: str, name: str) -> list[int]:
    """How often each bundle uses a unit. `usage` has a line of names, and after "== UTIL" a row of
    counts a bundle."""
    head, _, rows = usage.partition("== UTIL")
    names = next(line for line in head.splitlines() if "MATMUL" in line).split(",")
    column = [each.strip() for each in names].index(name)
    return [int(row.split()[column]) for row in rows.splitlines()[1:] if row.strip()]
