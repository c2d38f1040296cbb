"""Huge pages under arrays in the host's memory."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.runtime.huge_pages import PAGE, use_huge_pages

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def huge_bytes(address: int) -> int:
    """Of the mapping that an address lies in."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            return int(line.split()[1]) << 10
    return 0


@pytest.mark.skipif(
    not SETTING.exists() or "[never]" in SETTING.read_text(), reason="the system has no huge pages"
)
def test_a_filled_array_gets_huge_pages_and_keeps_its_content() -> None:
    content = np.random.default_rng(0).integers(0, 100, 16 * PAGE // 4, np.int32)
    array = jax.device_put(content)
    use_huge_pages(array, filled=True)
    middle = array.unsafe_buffer_pointer() + 8 * PAGE
    assert huge_bytes(middle) >= PAGE
    np.testing.assert_array_equal(array, content)


def test_small_arrays_and_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    use_huge_pages(jnp.ones(5), filled=True)
    monkeypatch.setattr(sys, "platform", "darwin")
    use_huge_pages(jnp.ones(16 * PAGE // 4), filled=True)
