"""The schedule that libtpu gives the attention kernel, from the command that prints it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tpu_topology import needs_libtpu

ROOT = Path(__file__).parents[2]
CASES = {"v6e": "32", "v7x": "64"}  # chip: tokens of a block, as the engine chooses them


@needs_libtpu
@pytest.mark.parametrize("chip", CASES)
def test_decoding_from_8_bit_floats_is_bound_by_memory(chip: str) -> None:
    """Converted before the product, both would take more cycles than their copies on v7x, e4m3
    twice as many on v6e."""
    command = ["scripts/kernel_schedule.py", "--chip", chip, "--block-size", CASES[chip]]
    done = subprocess.run(
        [sys.executable, *command, "--only", "float8"], cwd=ROOT, env={"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()[2:]]
    assert [row[1] for row in rows] == ["float8_e4m3fn", "float8_e5m2"]
    for _, name, bundles, copies, _, spills, _ in rows:
        assert int(bundles) < 0.95 * int(copies), name
        assert int(spills) == 0, name
