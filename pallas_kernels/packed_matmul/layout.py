"""Kernels of products in the order in which a CPU's dot product instruction reads them.

A panel holds 32 columns; in it, pair i of rows comes as 32 words of 32 bits, the bfloat16 of row 2i
in a word's lower half and that of row 2i + 1 in the upper one. So a product reads its kernel once,
from end to end, and each vector of it is ready for an instruction that adds up pairs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

PANEL = 32  # columns
GATES = PANEL // 2  # of a panel of gated kernels: as many gates, then the columns that they gate


def packed_shape(num_rows: int, num_columns: int) -> tuple[int, int, int]:
    """[panels, pairs, PANEL] of a kernel [num_rows, num_columns]; num_rows is even."""
    if num_rows % 2:
        raise ValueError(f"a packed kernel has an even number of rows, got {num_rows}")
    return -(-num_columns // PANEL), num_rows // 2, PANEL


def pack(kernel: np.ndarray) -> np.ndarray:
    """[K, N] bfloat16 -> [ceil(N / 32), K / 2, 32] uint32; columns past N are zero."""
    shape = packed_shape(*kernel.shape)
    bits = kernel.view(np.uint16)
    pairs = bits[0::2].astype(np.uint32)
    pairs |= bits[1::2].astype(np.uint32) << 16  # [K / 2, N]
    missing = shape[0] * PANEL - kernel.shape[1]
    if missing:
        pairs = np.pad(pairs, ((0, 0), (0, missing)))
    return np.ascontiguousarray(pairs.reshape(shape[1], shape[0], PANEL).swapaxes(0, 1))


def pack_gated(kernel: np.ndarray) -> np.ndarray:
    """[K, 2, F] bfloat16, gates and then what they gate -> [ceil(F / 16), K / 2, 32] uint32. Each
    panel has 16 gates and their 16 columns."""
    num_rows, _, inner = kernel.shape
    missing = -inner % GATES
    bits = kernel.view(np.uint16)
    if missing:
        bits = np.pad(bits, ((0, 0), (0, 0), (0, missing)))
    groups = bits.reshape(num_rows, 2, -1, GATES).swapaxes(1, 2)  # [K, groups, 2, 16]
    return pack(np.ascontiguousarray(groups).reshape(num_rows, -1).view(kernel.dtype))


def unpack(packed: jax.Array, num_columns: int) -> jax.Array:
    """The kernel [K, N] bfloat16 that `pack` was given."""
    pairs = packed.swapaxes(0, 1).reshape(packed.shape[1], -1)[:, :num_columns]
    halves = jax.lax.bitcast_convert_type(pairs, jnp.bfloat16)  # [K / 2, N, 2], lower half first
    return halves.swapaxes(1, 2).reshape(-1, num_columns)


def columns(packed: jax.Array, indices: jax.Array) -> jax.Array:
    """Columns [n] of a packed kernel as rows [n, K] bfloat16. Indices outside it read its nearest
    column."""
    indices = jnp.clip(indices, 0, packed.shape[0] * PANEL - 1)
    pairs = packed[indices // PANEL, :, indices % PANEL]  # [n, K / 2]
    return jax.lax.bitcast_convert_type(pairs, jnp.bfloat16).reshape(indices.shape[0], -1)
