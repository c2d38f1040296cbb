"""Products with packed kernels: the signature, its checks, the choice of an implementation."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import native
from pallas_kernels.packed_matmul import cpu, reference
from pallas_kernels.packed_matmul.layout import GATES, PANEL

IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "cpu": cpu.matmul,
    "reference": reference.matmul,
}


def packed_matmul(
    x: jax.Array,
    kernels: jax.Array,
    layer: jax.Array | int,
    num_rows: jax.Array | int,
    *,
    num_columns: int,
    gated: bool = False,
    dtype: DTypeLike = jnp.float32,
    implementation: str | None = None,
) -> jax.Array:
    """The product of x [T, K] with one of L packed kernels, summed in float32: [T, num_columns].

    Args:
      x: [T, K] bfloat16.
      kernels: [L, panels, K / 2, 32] uint32, see layout.pack; the kernel is kernels[layer], which
        is read where it is.
      layer: an int or a traced int32 scalar.
      num_rows: rows of x that mean something; the others cost nothing and are zero in the result.
      num_columns: N; with gated: F, half the kernel's columns.
      gated: the kernel is layout.pack_gated's, and the result silu(x @ gates) * (x @ values).
      dtype: of the result, float32 or bfloat16.
      implementation: a name of IMPLEMENTATIONS; None: "cpu" where the kernels were built.

    Raises:
      ValueError: a shape or a type does not fit.
    """
    _check(x, kernels, num_columns, gated, dtype)
    if implementation is None:
        implementation = "cpu" if native.is_available() else "reference"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"unknown implementation {implementation!r}; known: {', '.join(IMPLEMENTATIONS)}"
        )
    return IMPLEMENTATIONS[implementation](
        x, kernels, layer, num_rows, num_columns=num_columns, gated=gated, dtype=dtype
    )


def _check(
    x: jax.Array, kernels: jax.Array, num_columns: int, gated: bool, dtype: DTypeLike
) -> None:
    def fail(what: str) -> None:
        raise ValueError(f"packed_matmul: {what}")

    if x.ndim != 2 or x.dtype != jnp.bfloat16:
        fail(f"x must be [T, K] bfloat16, got {x.shape} {x.dtype}")
    panels = -(-num_columns // (GATES if gated else PANEL))
    expected = (panels, x.shape[1] // 2, PANEL)
    if kernels.ndim != 4 or kernels.shape[1:] != expected or kernels.dtype != jnp.uint32:
        fail(
            f"kernels {kernels.shape} {kernels.dtype} are not [L, {', '.join(map(str, expected))}] "
            f"uint32"
        )
    if x.shape[1] % 2:
        fail(f"K must be even, got {x.shape[1]}")
    if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
        fail(f"dtype must be float32 or bfloat16, got {jnp.dtype(dtype).name}")
