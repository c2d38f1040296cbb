"""Kernels as int8 with a scale for each output channel: half the bytes of bfloat16.

They are quantized when they are loaded. A product converts them on their way into the matrix unit
and multiplies its sums with the scales: quantized_matmul where one device reads stacked layers in
place, and else XLA's own product.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# The leaves that are quantized. Not so norms, biases and the embedding, of which a step reads a few
# rows or which is the head too.
KERNELS = ("qkv_kernel", "o_kernel", "gate_up_kernel", "down_kernel", "kernel")
CHUNK_ELEMENTS = 1 << 22  # quantized at a time, in float32
LARGEST = 127


class Int8Kernel(NamedTuple):
    """kernel ~ weights * scales. Arrays, or their shapes."""

    weights: Any  # [..., R, N] int8
    scales: Any  # [..., 1, N] float32


def quantized(kernel: np.ndarray) -> Int8Kernel:
    """[..., R, N] of float32 or bfloat16, in the formula of quantized_matmul's `quantize_int8`:

        scales[n] = max |kernel[..., n]| / 127,  weights = round(kernel / scales)

    A channel of zeros has the scale 1.
    """
    *leading, num_rows, num_columns = kernel.shape
    matrices = kernel.reshape(-1, num_rows, num_columns)
    weights = np.empty(matrices.shape, np.int8)
    scales = np.empty((len(matrices), num_columns), np.float32)
    step = max(1, CHUNK_ELEMENTS // num_rows)
    for i in range(len(matrices)):
        for start in range(0, num_columns, step):
            columns = slice(start, start + step)
            values = matrices[i, :, columns].astype(np.float32)
            scale = np.abs(values).max(axis=0) / np.float32(LARGEST)
            scale[scale == 0] = 1
            values /= scale
            weights[i, :, columns] = np.rint(values, out=values)
            scales[i, columns] = scale
    return Int8Kernel(weights.reshape(kernel.shape), scales.reshape(*leading, 1, num_columns))


def quantized_shape(leaf: jax.ShapeDtypeStruct) -> Int8Kernel:
    """The shapes and types that `quantized` gives a leaf."""
    *leading, _, num_columns = leaf.shape
    return Int8Kernel(
        jax.ShapeDtypeStruct(leaf.shape, jnp.int8),
        jax.ShapeDtypeStruct((*leading, 1, num_columns), jnp.float32),
    )
