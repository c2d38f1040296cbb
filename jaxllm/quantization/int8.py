"""Kernels as int8 with a scale for each output channel: half the bytes of bfloat16.

They are quantized when they are loaded. A product converts them on their way into the matrix unit,
which compilers do while they read them, and multiplies its sums with the scales.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# The leaves that are quantized, as they are stored -> their axes that a product sums over. Norms,
# biases and the embedding, of which a step reads a few rows or which is the head too, are not.
CONTRACTED = {
    "qkv_kernel": (-2,),  # [E, K(G+2)D]
    "o_kernel": (-3, -2),  # [H, D, E]
    "gate_up_kernel": (-2,),  # [n, E, 2F / n]
    "down_kernel": (-2,),  # [F, E]
    "kernel": (-2,),  # [E, V], the head's
}
CHUNK_ELEMENTS = 1 << 22  # quantized at a time, in float32
LARGEST = 127


class Int8Kernel(NamedTuple):
    """kernel ~ weights * scales. Arrays, or their shapes."""

    weights: Any  # [..., rows, N] int8
    scales: Any  # the same with 1 for the axes of rows, float32


def quantized(kernel: np.ndarray, name: str) -> Int8Kernel:
    """A leaf of float32 or bfloat16, in the formula of quantized_matmul's `quantize_int8`:

        scales[n] = max |kernel[..., n]| / 127,  weights = round(kernel / scales)

    A channel of zeros has the scale 1.
    """
    scales_shape = _scales_shape(kernel.shape, name)
    num_rows = math.prod(kernel.shape[axis] for axis in CONTRACTED[name])
    matrices = kernel.reshape(-1, num_rows, kernel.shape[-1])  # [..., rows, N]
    weights = np.empty(matrices.shape, np.int8)
    scales = np.empty((matrices.shape[0], matrices.shape[2]), np.float32)
    step = max(1, CHUNK_ELEMENTS // num_rows)
    for i in range(len(matrices)):
        for start in range(0, matrices.shape[2], step):
            columns = slice(start, start + step)
            values = matrices[i, :, columns].astype(np.float32)
            scale = np.abs(values).max(axis=0) / np.float32(LARGEST)
            scale[scale == 0] = 1
            values /= scale
            weights[i, :, columns] = np.rint(values, out=values)
            scales[i, columns] = scale
    return Int8Kernel(weights.reshape(kernel.shape), scales.reshape(scales_shape))


def quantized_shape(leaf: jax.ShapeDtypeStruct, name: str) -> Int8Kernel:
    """The shapes and types that `quantized` gives a leaf."""
    return Int8Kernel(
        jax.ShapeDtypeStruct(leaf.shape, jnp.int8),
        jax.ShapeDtypeStruct(_scales_shape(leaf.shape, name), jnp.float32),
    )


def _scales_shape(shape: tuple[int, ...], name: str) -> tuple[int, ...]:
    contracted = [len(shape) + axis for axis in CONTRACTED[name]]
    return tuple(1 if axis in contracted else size for axis, size in enumerate(shape))
