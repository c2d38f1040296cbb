"""The CPU's kernels with each set of instructions that the processor has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

from pallas_kernels import native


def each_variant() -> Iterator[str]:
    """The names of all that run here, each in use while it is the current one."""
    best = None
    try:
        for name in native.VARIANTS:
            with suppress(ValueError):
                before = native.use_variant(name)
                best = best or before
                yield name
    finally:
        if best:
            native.use_variant(best)
