"""Which parameters a CPU keeps as packed kernels, and how they get there.

A tree of parameters is loaded and made as the modules describe it; each leaf is then stored by
`stored`. Kernels of layers are stacked along L, and a product reads its layer's where it lies.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.config import ModelConfig
from pallas_kernels.packed_matmul.layout import GATES, pack, pack_gated, packed_shape

# name of the leaf -> how many of its first axes a product sums over
KERNELS = {"qkv_kernel": 1, "o_kernel": 2, "gate_up_kernel": 1, "down_kernel": 1, "kernel": 1}
TIED_EMBEDDING = ("embed", "embedding")  # [V, E]: packed as the head's kernel [E, V]
Path = tuple[Any, ...]


def can_pack(config: ModelConfig) -> bool:
    """Whether every kernel has an even number of rows, since pairs of them are packed."""
    sizes = (config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim)
    return all(size % 2 == 0 for size in sizes)


def is_packed(path: Path, config: ModelConfig) -> bool:
    """Whether the leaf at a path is a kernel that is packed."""
    return path[-1] in KERNELS or (config.tie_word_embeddings and path == TIED_EMBEDDING)


def stored(array: np.ndarray, path: Path, config: ModelConfig) -> np.ndarray:
    """A leaf as the steps read it: a kernel packed, layer by layer, anything else as it is."""
    if not is_packed(path, config):
        return array
    if path[0] != "layers":
        return _pack(array, path)
    packed = np.empty(_packed_shape(array.shape, path), np.uint32)
    for layer, kernel in zip(packed, array, strict=True):
        layer[...] = _pack(kernel, path)
    return packed


def stored_shape(leaf: Any, path: Path, config: ModelConfig) -> jax.ShapeDtypeStruct:
    """The shape and type that `stored` gives a leaf."""
    if not is_packed(path, config):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    return jax.ShapeDtypeStruct(_packed_shape(leaf.shape, path), jnp.uint32)


def _pack(kernel: np.ndarray, path: Path) -> np.ndarray:
    if path[-1] == "gate_up_kernel":
        return pack_gated(kernel)
    if path == TIED_EMBEDDING:
        kernel = kernel.T
    return pack(kernel.reshape(_matrix_shape(kernel.shape, KERNELS.get(path[-1], 1))))


def _packed_shape(shape: tuple[int, ...], path: Path) -> tuple[int, ...]:
    layers, shape = (shape[:1], shape[1:]) if path[0] == "layers" else ((), shape)
    if path[-1] == "gate_up_kernel":
        width, _, inner = shape
        return (*layers, *packed_shape(width, -(-inner // GATES) * 2 * GATES))
    if path == TIED_EMBEDDING:
        shape = shape[::-1]
    return (*layers, *packed_shape(*_matrix_shape(shape, KERNELS.get(path[-1], 1))))


def _matrix_shape(shape: tuple[int, ...], num_contracted: int) -> tuple[int, int]:
    num_rows = int(np.prod(shape[:num_contracted]))
    return num_rows, int(np.prod(shape)) // num_rows
