"""TPU chips that need not be there: what they can do, and devices to compile for.

Figures are the makers' (cloud.google.com/tpu/docs), of one device: what JAX calls a device is a
whole chip but for v7x, whose chips are two. Memory is what libtpu's compiler gives a program.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jax
from jax.experimental import topologies

from jaxllm.runtime.libtpu_flags import set_flags

# libtpu reads these when it is loaded: no question to a metadata server, and no lock, which is for
# chips that are there.
DESCRIBED = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
FLAT = {
    1: "1x1", 2: "1x2", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16",
    256: "16x16",
}  # fmt: skip
CUBIC = {1: "1x1x1", 2: "1x2x1", 4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4"}


@dataclass(frozen=True)
class Chip:
    """A kind of TPU. All figures but the topologies are of one device.

    memory: bytes. memory_bandwidth, link_bandwidth (all links of a device together, one way):
    bytes/s. flops: of bfloat16 products, 1/s. clock: cycles/s.
    """

    name: str
    prefix: str  # of its topologies' names
    topologies: dict[int, str]  # by number of chips
    memory: int
    memory_bandwidth: float
    flops: float
    link_bandwidth: float
    clock: float
    devices_per_chip: int = 1

    def topology(self, num_chips: int) -> str:
        """libtpu's name for so many chips. Raises ValueError for a number that is not made."""
        if num_chips not in self.topologies:
            sizes = ", ".join(map(str, self.topologies))
            raise ValueError(f"chips must be one of {sizes} for {self.name}, got {num_chips}")
        return f"{self.prefix}:{self.topologies[num_chips]}"


_GIB = 1 << 30
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", "v5e", FLAT, int(15.75 * _GIB), 8.19e11, 1.97e14, 2.0e11, 1.5e9),
        Chip("v5p", "v5p", CUBIC, int(95.73 * _GIB), 2.765e12, 4.59e14, 6.0e11, 1.75e9),
        Chip("v6e", "v6e", FLAT, int(31.24 * _GIB), 1.64e12, 9.18e14, 4.0e11, 1.75e9),
        Chip("v7x", "tpu7x", CUBIC, int(94.74 * _GIB), 3.69e12, 1.153e15, 3.0e11, 2.2e9, 2),
    )
}


def find_chip(name: str) -> Chip:
    """The chip of a name. Raises ValueError listing the names."""
    if name not in CHIPS:
        raise ValueError(
            f"chip must be one of {', '.join(CHIPS)}, got {name!r}; other devices cannot be "
            f"described, only used where they are"
        )
    return CHIPS[name]


def described_devices(chip: Chip, num_chips: int) -> list[jax.Device]:
    """Devices of chips that are not there, for which programs can be compiled. Raises ValueError
    for a number of chips that is not made, or where libtpu is not installed."""
    topology = chip.topology(num_chips)
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            f"compiling for {chip.name} needs libtpu, which runs without a TPU too: "
            f"pip install 'jaxllm[tpu]'"
        )
    set_flags()
    with _environment(DESCRIBED):
        description = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    devices = list(description.devices)
    assert len(devices) == num_chips * chip.devices_per_chip
    assert math.prod(map(int, chip.topologies[num_chips].split("x"))) == num_chips
    return devices


def is_libtpu_alone() -> bool:
    """Whether libtpu is loaded in this process, to describe devices or as JAX looked for a TPU,
    and there is none. JAX's profiler would ask it all the same, and it would end the process."""
    maps = Path("/proc/self/maps")  # on Linux, the only system that libtpu is made for
    loaded = maps.exists() and "libtpu.so" in maps.read_text()
    return loaded and jax.default_backend() != "tpu"


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Variables that are not set have these values meanwhile."""
    new = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            del os.environ[name]
