"""The schedule that libtpu gives the attention kernel, from the command that prints it."""

from __future__ import annotations

import pytest
from tpu_topology import needs_libtpu, run_apart

CASES = {"v6e": "32", "v7x": "64"}  # chip: tokens of a block, as the engine chooses them


@needs_libtpu
@pytest.mark.parametrize("chip", CASES)
def test_decoding_from_8_bit_floats_is_bound_by_memory(chip: str) -> None:
    """Converted before the product, both would take more cycles than their copies on v7x, e4m3
    twice as many on v6e."""
    options = ["--chip", chip, "--block-size", CASES[chip], "--only", "float8"]
    printed = run_apart("scripts/kernel_schedule.py", *options)
    rows = [line.strip("| ").split(" | ") for line in printed.splitlines()[2:]]
    assert [row[1] for row in rows] == ["float8_e4m3fn", "float8_e5m2"]
    for _, name, bundles, copies, _, spills, _ in rows:
        assert int(bundles) < 0.95 * int(copies), name
        assert int(spills) == 0, name
