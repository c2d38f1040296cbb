"""Pages of 2 MB instead of 4 KB under what a CPU reads again and again.

The processor then looks up 512 times fewer addresses. In a virtual machine, where a look-up is
slow, two cores read 16 to 20 GB/s instead of 14, and a token of one stream takes 14 % less (Intel
Sapphire Rapids, 2026-11-26). Most systems give such pages only to who asks ("madvise"), which
neither XLA nor its allocator does.
"""

from __future__ import annotations

import ctypes
import sys

import jax

PAGE = 2 << 20
FROM_NOW_ON, AT_ONCE = 14, 25  # Linux's MADV_HUGEPAGE and MADV_COLLAPSE


def use_huge_pages(array: jax.Array, *, filled: bool) -> None:
    """Asks for huge pages under an array in the host's memory. filled: it has its content, which is
    moved; else its pages are taken as they are first written. Where the system has none, nothing
    changes."""
    if sys.platform != "linux" or array.nbytes < 2 * PAGE:
        return
    first = array.unsafe_buffer_pointer()
    start = -(-first // PAGE) * PAGE
    length = (first + array.nbytes) // PAGE * PAGE - start
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    madvise(start, length, FROM_NOW_ON)
    if filled:
        madvise(start, length, AT_ONCE)
