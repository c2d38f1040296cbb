"""Products with quantized kernels: the signature, its checks, the choice of an implementation."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.device import device_kind
from pallas_kernels.quantized_matmul import reference, tpu, xla
from pallas_kernels.quantized_matmul.layout import check_group_size

IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "tpu": tpu.matmul,
    "xla": xla.matmul,
    "reference": reference.matmul,
}


def quantized_matmul(
    x: jax.Array,
    weights: jax.Array,
    scales: jax.Array,
    layer: jax.Array | int,
    *,
    zeros: jax.Array | None = None,
    group_size: int | None = None,
    int8_rows: bool = False,
    dtype: DTypeLike = jnp.bfloat16,
    implementation: str | None = None,
) -> jax.Array:
    """The product of x [T, K] with one of L quantized kernels (see layout.py): [T, N].

    int8 weights:                 out[t, n] = scales[n] * sum_k x[t, k] * weights[k, n]
    int8 weights and int8_rows:   the same of quantize_rows(x), times the scale of row t
    int4 weights by groups of G:  out[t, n] = sum_k x[t, k] * kernel[k, n], with
        kernel[k, n] = (weights[k, n] - zeros[k // G, n]) * scales[k // G, n] in bfloat16

    Sums are float32, or int32 of int8 rows. The kernel is never written to memory dequantized by
    the Pallas implementations, and weights[layer] is read where it is.

    Args:
      x: [T, K] bfloat16.
      weights: [L, K, N] int8, or int4 with a group_size.
      scales: [L, 1, N] float32, or [L, ceil(K / G), N] bfloat16 with a group_size.
      layer: an int or a traced int32 scalar.
      zeros: None or, with a group_size, [L, ceil(K / G), N] int8 from -8 to 7.
      group_size: None for int8; 32, 64 or 128 for int4.
      int8_rows: quantize x by row first, and multiply int8 with int8. Not with int4: each group's
        sums would have to be scaled on their own.
      dtype: of the result, bfloat16 or float32.
      implementation: a name of IMPLEMENTATIONS; None takes the best for the device.

    Raises:
      ValueError: a shape, a type or an option does not fit, or the implementation that was asked
        for does not support the case.
    """
    _check(x, weights, scales, zeros, group_size, int8_rows, dtype)
    on = device_kind()
    unsupported = tpu.unsupported(on, int8_rows)
    if implementation is None:
        implementation = "tpu" if on.startswith("TPU") and unsupported is None else "xla"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"unknown implementation {implementation!r}; known: {', '.join(IMPLEMENTATIONS)}"
        )
    if implementation == "tpu" and unsupported is not None:
        raise ValueError(f"quantized_matmul: {unsupported}")
    return IMPLEMENTATIONS[implementation](
        x, weights, scales, zeros, layer, group_size=group_size, int8_rows=int8_rows, dtype=dtype
    )


def _check(
    x: jax.Array,
    weights: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None,
    group_size: int | None,
    int8_rows: bool,
    dtype: DTypeLike,
) -> None:
    def fail(what: str) -> None:
        raise ValueError(f"quantized_matmul: {what}")

    if x.ndim != 2 or x.dtype != jnp.bfloat16:
        fail(f"x must be [T, K] bfloat16, got {x.shape} {x.dtype}")
    if weights.ndim != 3 or weights.shape[1] != x.shape[1]:
        fail(f"weights {weights.shape} are not [L, K, N] with K = {x.shape[1]} of x")
    expected = jnp.int8 if group_size is None else jnp.int4
    if weights.dtype != expected:
        fail(f"weights must be {jnp.dtype(expected)} with group_size {group_size}, got "
             f"{weights.dtype}")  # fmt: skip
    num_layers, num_rows, num_columns = weights.shape
    if group_size is None:
        shape, scale_dtype = (num_layers, 1, num_columns), jnp.dtype(jnp.float32)
    else:
        check_group_size(group_size)
        shape = (num_layers, -(-num_rows // group_size), num_columns)
        scale_dtype = jnp.dtype(jnp.bfloat16)
    if scales.shape != shape or scales.dtype != scale_dtype:
        fail(f"scales must be {shape} {scale_dtype}, got {scales.shape} {scales.dtype}")
    if zeros is not None and group_size is None:
        fail("zeros need a group_size: int8 weights have none")
    if zeros is not None and (zeros.shape != shape or zeros.dtype != jnp.int8):
        fail(f"zeros must be {shape} int8, got {zeros.shape} {zeros.dtype}")
    if int8_rows and group_size is not None:
        fail("int8_rows needs int8 weights; with int4 weights leave x in bfloat16")
    if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
        fail(f"dtype must be float32 or bfloat16, got {jnp.dtype(dtype).name}")
