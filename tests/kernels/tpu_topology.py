"""Programs compiled for a TPU that is not there, by libtpu."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm.runtime.chips import described_devices, find_chip

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)


def run_apart(*arguments: str) -> str:
    """What Python prints in a process of its own: libtpu reads its options once, when it is
    loaded."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, *arguments], cwd=root, env={"PYTHONPATH": str(root)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def compile_for(
    chip: str, function: Callable[..., Any], *shapes: jax.ShapeDtypeStruct, donate: Any = ()
) -> jax.stages.Compiled:
    """The program of one device of a chip."""
    mesh = Mesh(np.array(described_devices(find_chip(chip), 4)[:1]), ("chip",))
    sharding = NamedSharding(mesh, PartitionSpec())
    placed = [jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding) for s in shapes]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(function, donate_argnums=donate).lower(*placed).compile()
