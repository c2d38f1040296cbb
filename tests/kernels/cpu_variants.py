"""The CPU's kernels with each set of instructions that the processor has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

from pallas_kernels import native


def each_variant() -> Iterator[str]:
    """The names of all that run here, each in use while it is the current one."""
    best = native.variant()
    try:
        for name in native.VARIANTS:
            with suppress(ValueError):
                native.use_variant(name)
                yield name
    finally:
        native.use_variant(best)
