"""How the kernels of a layer lie for products on any device but a CPU that packs them (packing.py).

A parameter is loaded in the shape that its module describes, [E, K, G+2, D], [H, D, E] or
[E, 2, F]. A product reads a matrix, and a compiler for TPU that is given one with small axes in it
lays the weights out anew before each step. So what one product sums over or makes is one axis, and
each device's part of it is in one piece.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jaxllm.runtime.sharding import repeat_kv_heads, repeated_shape

QKV = ("qkv_kernel", "qkv_bias")  # the leaves that hold key and value heads


def stored(array: np.ndarray, name: str, kv_repeats: int, num_devices: int) -> np.ndarray:
    """A leaf as `forward` takes it; a view where that is possible. name: the last key of its
    path; kv_repeats: how many devices share a key and value head."""
    if name in QKV and kv_repeats > 1:
        array = repeat_kv_heads(array, kv_repeats)
    if name == "gate_up_kernel" and num_devices > 1:
        *leading, width, _, inner = array.shape
        bits = array.view(f"u{array.dtype.itemsize}")  # which numpy moves in bulk
        parts = bits.reshape(*leading, width, 2, num_devices, inner // num_devices)
        parts = np.moveaxis(parts, -2, -4)  # [..., n, E, 2, F / n]
        return parts.reshape(_stored_shape(array.shape, name, num_devices)).view(array.dtype)
    return array.reshape(_stored_shape(array.shape, name, num_devices))


def stored_shape(leaf: Any, name: str, kv_repeats: int, num_devices: int) -> jax.ShapeDtypeStruct:
    """The shape and type that `stored` gives a leaf."""
    if name in QKV and kv_repeats > 1:
        leaf = repeated_shape(leaf, kv_repeats)
    return jax.ShapeDtypeStruct(_stored_shape(leaf.shape, name, num_devices), leaf.dtype)


def _stored_shape(shape: tuple[int, ...], name: str, num_devices: int) -> tuple[int, ...]:
    if name == "qkv_kernel":
        *leading, num_kv_heads, group, head_dim = shape
        return (*leading, num_kv_heads * group * head_dim)
    if name == "o_kernel":
        *leading, num_heads, head_dim, width = shape
        return (*leading, num_heads * head_dim, width)
    if name == "gate_up_kernel":
        *leading, width, _, inner = shape
        return (*leading, num_devices, width, 2 * inner // num_devices)
    return shape
