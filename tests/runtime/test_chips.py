"""Chips that are not there."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

import pytest

from jaxllm.runtime.chips import CHIPS, DESCRIBED, described_devices, find_chip
from jaxllm.runtime.libtpu_flags import set_flags
from jaxllm.runtime.profile import Profile

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is made for Linux on x86-64 only"
)


@pytest.mark.parametrize("name", CHIPS)
def test_devices_of_every_size(name: str) -> None:
    chip = find_chip(name)
    for num_chips in chip.topologies:
        devices = described_devices(chip, num_chips)
        assert len(devices) == num_chips * chip.devices_per_chip
        assert devices[0].platform == "tpu"


def test_the_environment_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in DESCRIBED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "mine")
    set_flags()
    before = dict(os.environ)
    described_devices(find_chip("v5e"), 1)
    assert dict(os.environ) == before


@pytest.mark.parametrize("name", ["h100", "cpu", ""])
def test_a_chip_that_is_none(name: str) -> None:
    expected = f"chip must be one of v5e, v5p, v6e, v7x, got {name!r}"
    with pytest.raises(ValueError, match=re.escape(expected)):
        find_chip(name)


@pytest.mark.parametrize("num_chips", [0, 3, 512])
def test_a_number_of_chips_that_is_not_made(num_chips: int) -> None:
    with pytest.raises(ValueError, match=f"chips must be one of 1, 2, 4, .* got {num_chips}"):
        described_devices(find_chip("v5e"), num_chips)


def test_no_profile_beside_described_devices(tmp_path: Path) -> None:
    """It would end the process."""
    described_devices(find_chip("v5e"), 1)
    with pytest.raises(RuntimeError, match=r"cannot record a profile.*JAX_PLATFORMS=cpu"):
        Profile(tmp_path)


def test_without_libtpu_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"needs libtpu.*pip install 'jaxllm\[tpu\]'"):
        described_devices(find_chip("v6e"), 1)
