"""What libtpu made of a Pallas kernel, for a chip that need not be there: bundles of each loop.

libtpu writes the final program of every kernel as text when it is told to before it is loaded. A
bundle is what a core issues in one cycle, so a loop's bundles are its cycles if nothing waits.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple


class Chip(NamedTuple):
    """A described device; frequencies and bandwidths by the makers' pages."""

    topology: str
    clock: float  # cycles/s
    bandwidth: float  # of its memory, bytes/s

    @property
    def bytes_per_cycle(self) -> float:
        return self.bandwidth / self.clock


CHIPS = {
    "v5e": Chip("v5e:2x2", 1.5e9, 8.19e11),
    "v6e": Chip("v6e:2x2", 1.75e9, 1.64e12),
    "v7x": Chip("tpu7x:2x2x1", 2.2e9, 3.69e12),
}
SPILLS, PRODUCTS = "VSTORE:SPILL", "MATMUL"  # units
BUNDLE = re.compile(r"\s*0x([0-9a-f]+)\s+([A-Z]{2})?\s*:\s*(>*)\s*(\{\})?")


class Loop(NamedTuple):
    """A loop of a kernel's program, outermost first in program order."""

    depth: int  # 1 for one that is in no other
    bundles: int  # without those of loops in it
    spills: int  # stores of registers that ran short, of the same bundles


def start_dumps(folder: Path) -> None:
    """Has libtpu write its programs into the folder. Call it before anything loads libtpu."""
    os.environ.update(
        JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost",
        TPU_ACCELERATOR_TYPE="v5litepod-4", ALLOW_MULTIPLE_LIBTPU_LOAD="1",
        LIBTPU_INIT_ARGS=f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
        f"--xla_jf_emit_annotations=true",
    )  # fmt: skip


def compile_loops(
    folder: Path, chip: Chip, kernel: str, function: Callable[..., Any], shapes: Sequence[Any]
) -> list[Loop]:
    """The loops of the kernel (a pallas_call's name) in a function compiled for one chip."""
    import jax

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
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    description = topologies.get_topology_desc(platform="tpu", topology_name=chip.topology)
    mesh = Mesh(np.array(description.devices[:1]), ("chip",))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        yield partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, PartitionSpec()))


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
    bundle by "LB"."""
    depths: list[int] = []
    starts: list[int] = []
    for line in program.splitlines():
        match = BUNDLE.match(line)
        if match is None:
            continue  # a bundle goes on over several lines
        if match.group(2) == "LB":
            starts.append(len(depths))
        unmarked = match.group(4) and not match.group(3)  # an empty bundle bears no mark
        depths.append(depths[-1] if unmarked and depths else len(match.group(3)))
    spills = units(usage, SPILLS)
    loops = []
    for start in starts:
        depth, own = depths[start], []
        for bundle in range(start, len(depths)):
            next_one = bundle > start and bundle in starts and depths[bundle] == depth
            if depths[bundle] < depth or next_one:
                break
            if depths[bundle] == depth:
                own.append(bundle)
        loops.append(Loop(depth, len(own), sum(spills[bundle] for bundle in own)))
    return loops


def units(usage: str, name: str) -> list[int]:
    """How often each bundle uses a unit. `usage` has a line of names, and after "== UTIL" a row of
    counts a bundle."""
    head, _, rows = usage.partition("== UTIL")
    names = next(line for line in head.splitlines() if "MATMUL" in line).split(",")
    column = [each.strip() for each in names].index(name)
    return [int(row.split()[column]) for row in rows.splitlines()[1:] if row.strip()]
