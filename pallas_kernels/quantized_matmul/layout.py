"""Quantized kernels and rows: what is stored, and how it comes from floats.

A kernel [K, N] is stored in one of two forms, L of them stacked:

* int8 with a scale for each of the N output channels: kernel[k, n] ~ weights[k, n] * scales[n];
* int4 with a scale, and perhaps a zero point, for each channel of a group of G rows:
  kernel[k, n] ~ (weights[k, n] - zeros[k // G, n]) * scales[k // G, n]. A last group may be short.

The int4 weights are `jnp.int4`, which a TPU's memory holds two to a byte.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

GROUP_SIZES = (32, 64, 128)


class QuantizedKernel(NamedTuple):
    """What `quantize_int8` and `quantize_int4` make; leading axes are those of the kernel."""

    weights: jax.Array  # [..., K, N] int8 or int4
    scales: jax.Array  # [..., 1, N] float32, or [..., ceil(K / G), N] bfloat16
    zeros: jax.Array | None  # [..., ceil(K / G), N] int8


def quantize_int8(kernel: jax.Array) -> QuantizedKernel:
    """Kernel [..., K, N] as int8 with a scale a channel:

        scales[n] = max_k |kernel[k, n]| / 127,  weights = round(kernel / scales)

    A channel of zeros has the scale 1.
    """
    kernel = kernel.astype(jnp.float32)
    scales = _scale(jnp.abs(kernel).max(axis=-2, keepdims=True) / 127)
    return QuantizedKernel(jnp.round(kernel / scales).astype(jnp.int8), scales, None)


def quantize_int4(kernel: jax.Array, group_size: int, zero_points: bool) -> QuantizedKernel:
    """Kernel [..., K, N] as int4 by groups of `group_size` rows. In each group and channel, without
    zero points

        scales = max |kernel| / 7,  weights = clip(round(kernel / scales), -8, 7)

    and with them, for low = min(0, min kernel) and high = max(0, max kernel),

        scales = (high - low) / 15,  zeros = round(-8 - low / scales),
        weights = clip(round(kernel / scales) + zeros, -8, 7)

    Scales are bfloat16, and rounded before anything is divided by them. A group of zeros has the
    scale 1. Raises ValueError for another group size than 32, 64 or 128.
    """
    check_group_size(group_size)
    num_rows = kernel.shape[-2]
    short = -num_rows % group_size
    kernel = kernel.astype(jnp.float32)
    kernel = jnp.pad(kernel, [(0, 0)] * (kernel.ndim - 2) + [(0, short), (0, 0)])
    groups = kernel.reshape(*kernel.shape[:-2], -1, group_size, kernel.shape[-1])  # [.., g, G, N]
    low = jnp.minimum(groups.min(axis=-2, keepdims=True), 0)
    high = jnp.maximum(groups.max(axis=-2, keepdims=True), 0)
    if zero_points:
        scales = _scale((high - low) / 15).astype(jnp.bfloat16)
        zeros = jnp.clip(jnp.round(-8 - low / scales.astype(jnp.float32)), -8, 7)
    else:
        scales = _scale(jnp.maximum(high, -low) / 7).astype(jnp.bfloat16)
        zeros = jnp.zeros_like(low)
    weights = jnp.round(groups / scales.astype(jnp.float32)) + zeros
    weights = jnp.clip(weights, -8, 7).astype(jnp.int4).reshape(kernel.shape)
    return QuantizedKernel(
        weights[..., :num_rows, :],
        scales.squeeze(-2),
        zeros.astype(jnp.int8).squeeze(-2) if zero_points else None,
    )


def dequantize(
    weights: jax.Array,  # [K, N] int8 or int4
    scales: jax.Array,  # [1, N] or [ceil(K / G), N]
    zeros: jax.Array | None,
    group_size: int | None,
) -> jax.Array:
    """What the products of bfloat16 rows are with, [K, N] bfloat16. For int8 that is the weights
    alone: a product is scaled when it is summed up."""
    if group_size is None:
        return weights.astype(jnp.bfloat16)
    num_rows = weights.shape[0]

    def by_row(of_groups: jax.Array) -> jax.Array:
        return jnp.repeat(of_groups.astype(jnp.float32), group_size, axis=0)[:num_rows]

    values = weights.astype(jnp.float32)
    if zeros is not None:
        values -= by_row(zeros)
    return (values * by_row(scales)).astype(jnp.bfloat16)


def quantize_rows(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows x [T, K] as int8 [T, K] with scales [T, 1] float32:

        scales[t] = max_k |x[t, k]| / 127,  rows = round(x / scales)

    A row of zeros has the scale 1.
    """
    x = x.astype(jnp.float32)
    scales = _scale(jnp.abs(x).max(axis=1, keepdims=True) / 127)
    return jnp.round(x / scales).astype(jnp.int8), scales


def check_group_size(group_size: int) -> None:
    """Raises ValueError for a size that is not supported."""
    if group_size not in GROUP_SIZES:
        sizes = ", ".join(map(str, GROUP_SIZES))
        raise ValueError(f"group_size must be one of {sizes}, got {group_size}")


def _scale(step: jax.Array) -> jax.Array:
    return jnp.where(step > 0, step, 1.0)
