"""Tensor parallelism: which part of each array lies on which device.

Query heads, key and value heads, feed-forward and vocabulary are divided among the devices of one
mesh axis (Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053). Each device attends with its own
heads; the rest is divided by XLA, from where the parameters lie.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import DictKey

from jaxllm.config import ModelConfig
from jaxllm.runtime import kv_cache
from jaxllm.runtime.huge_pages import use_huge_pages

AXIS = "tensor"
# name of a parameter as it is stored -> its axis that is divided, counted from the last: heads, F
# or V. Stacked layers have one more axis in front. What is not named lies whole on every device.
DIVIDED = {
    "qkv_kernel": -1,  # [E, K(G+2)D]
    "qkv_bias": -3,  # [K, G+2, D]
    "o_kernel": -2,  # [HD, E]
    "gate_up_kernel": -3,  # [n, E, 2F / n]
    "gate_up_bias": -1,  # [2, F]
    "down_kernel": -2,  # [F, E]
    "embedding": -2,  # [V, E]
    "kernel": -1,  # [E, V], the head's
    "kv_scales": -1,  # [L, 2, K]
}
OF_VOCABULARY = ("embedding", "kernel")


def check_divisible(config: ModelConfig, num_devices: int) -> None:
    """Raises ValueError unless so many devices can share a model's heads and feed-forward."""
    for name in ("num_heads", "intermediate_size"):
        size = getattr(config, name)
        if size % num_devices:
            raise ValueError(
                f"{num_devices} devices cannot share the model: its {name} is {size}; take a "
                f"number that divides it"
            )
    num_kv_heads = config.num_kv_heads
    if num_kv_heads % num_devices and num_devices % num_kv_heads:
        raise ValueError(
            f"{num_devices} devices cannot share the model: its num_kv_heads is {num_kv_heads}; "
            f"take a divisor or a multiple of it"
        )


def kv_repeats(config: ModelConfig, num_devices: int) -> int:
    """How many devices hold the same key and value head, because there are more of them."""
    return max(1, num_devices // config.num_kv_heads)


@dataclass(frozen=True)
class Placement:
    """The devices of an engine and what lies on each. mesh: None for one device that is there,
    whose arrays have no sharding."""

    devices: tuple[jax.Device, ...]
    mesh: Mesh | None

    @classmethod
    def on(cls, devices: Sequence[jax.Device], *, on_mesh: bool = False) -> Placement:
        """All devices share the model. on_mesh: one has a mesh too, as those that are only
        described need it (see chips.py), and what was compiled for them."""
        if len(devices) == 1 and not on_mesh:
            return cls(tuple(devices), None)
        mesh = Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))
        return cls(tuple(devices), mesh)

    def __str__(self) -> str:
        number = f"{self.num_devices} x " if self.num_devices > 1 else ""
        return number + self.devices[0].device_kind

    @property
    def num_devices(self) -> int:
        return len(self.devices)

    @property
    def platform(self) -> str:
        return self.devices[0].platform

    @property
    def is_one_cpu(self) -> bool:
        """Whether all lies in this process's memory, where C++ kernels can work on it."""
        return self.platform == "cpu" and self.mesh is None

    def whole(self, tree: Any) -> Any:
        """A tree of shapes that lie whole on every device."""
        sharding = None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())
        return jax.tree.map(lambda leaf: _placed(leaf, sharding), tree)

    def parameters(self, tree: Any) -> Any:
        """A tree of parameters' shapes, each with its sharding."""

        def placed(path: tuple[Any, ...], leaf: Any) -> jax.ShapeDtypeStruct:
            name = next(key.key for key in reversed(path) if isinstance(key, DictKey))
            return _placed(leaf, self._of_parameter(name, leaf.shape))

        return jax.tree.map_with_path(placed, tree)

    def pool(self, pool: jax.ShapeDtypeStruct, config: ModelConfig) -> jax.ShapeDtypeStruct:
        """The block pool's shape, its heads divided."""
        if self.mesh is None:
            return pool
        return _placed(pool, NamedSharding(self.mesh, pool_spec(pool, config)))

    def put(self, parameter: Any, name: str) -> Any:
        """A parameter, an array or a quantized kernel of several, on the devices. name: the last
        key of its path."""
        return jax.tree.map(lambda array: self._put(array, name), parameter)

    def _put(self, array: np.ndarray, name: str) -> jax.Array:
        if self.mesh is None:
            parameter = jax.device_put(array, self.devices[0])
            if self.is_one_cpu:
                use_huge_pages(parameter, filled=True)
            return parameter
        return jax.device_put(array, self._of_parameter(name, array.shape))

    def _of_parameter(self, name: str, shape: tuple[int, ...]) -> NamedSharding | None:
        if self.mesh is None:
            return None
        axis = DIVIDED.get(name)
        # as do a vocabulary that cannot be divided, and scales along what a product sums over
        if (
            axis is None
            or shape[axis] == 1
            or (name in OF_VOCABULARY and shape[axis] % self.num_devices)
        ):
            return NamedSharding(self.mesh, PartitionSpec())
        return NamedSharding(self.mesh, axis_spec(len(shape), len(shape) + axis))


def axis_spec(num_axes: int, axis: int) -> PartitionSpec:
    """That of an array whose axis is divided."""
    return PartitionSpec(*(AXIS if i == axis else None for i in range(num_axes)))


def pool_spec(pool: Any, config: ModelConfig) -> PartitionSpec:
    """That of the block pool."""
    return axis_spec(len(pool.shape), kv_cache.head_axis(pool, config))


def device_bytes(tree: Any) -> int:
    """Bytes of a tree of shapes or arrays on one device."""

    def size(leaf: Any) -> int:
        sharding = getattr(leaf, "sharding", None)
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(size(leaf) for leaf in jax.tree.leaves(tree))


def with_repeated_kv_heads(config: ModelConfig, repeats: int) -> ModelConfig:
    """The same model with each key and value head so many times, one after the other. A group's
    query heads are divided among the copies, so their order stays."""
    if repeats == 1:
        return config
    return replace(config, num_kv_heads=config.num_kv_heads * repeats)


def repeat_kv_heads(kernel: np.ndarray, repeats: int) -> np.ndarray:
    """[..., K, G+2, D] as [..., K*r, G/r+2, D]: each copy of a key head has its part of the query
    heads."""
    *leading, num_kv_heads, group, head_dim = kernel.shape
    queries = kernel[..., :-2, :].reshape(
        *leading, num_kv_heads * repeats, (group - 2) // repeats, head_dim
    )
    keys_values = np.repeat(kernel[..., -2:, :], repeats, axis=-3)  # [..., K*r, 2, D]
    return np.concatenate([queries, keys_values], axis=-2)


def repeated_shape(leaf: Any, repeats: int) -> jax.ShapeDtypeStruct:
    """The shape that `repeat_kv_heads` gives a leaf."""
    *leading, num_kv_heads, group, head_dim = leaf.shape
    heads = (num_kv_heads * repeats, (group - 2) // repeats + 2, head_dim)
    return jax.ShapeDtypeStruct((*leading, *heads), leaf.dtype)


def _placed(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
