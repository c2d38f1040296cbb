"""Quantized products on TPU: weights come to the chip as they are stored, and become bfloat16 on
their way into the matrix unit.

The grid is (rows of x, columns, K), with a tile's rows of x on the chip whole, so that x is read
once. Copies of weights are the pipeline's, double-buffered. K need not be a multiple of its tile:
x is padded with zeros, and what the last tile's copy leaves unwritten is multiplied with them.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from pallas_kernels.device import device_kind
from pallas_kernels.quantized_matmul.block_sizes import BlockSizes, Problem, block_sizes
from pallas_kernels.quantized_matmul.layout import quantize_rows

CHUNK = 512  # rows of weights dequantized at once: what fits in registers
WITHOUT_BFLOAT16 = ("TPU v4", "TPU v5")  # vector units that compute in float32 only
WITHOUT_INT8 = ("TPU7",)  # matrix units that multiply no integers


def _kernel(
    # inputs
    layer_ref: Any,  # [1]
    x_ref: Any,  # [rows, padded K]
    *operand_refs: Any,  # [rows, 1] scales of int8 rows; weights [k, n]; scales, zeros [groups, n];
    # output [rows, n]; scratch: sums [rows, n], scales and zeros [padded groups, n] float32
    int8_rows: bool,
    has_zeros: bool,
    group_size: int | None,
    columns: int,
    dequantized_in: DTypeLike,
) -> None:
    refs = list(operand_refs)
    row_scales_ref = refs.pop(0) if int8_rows else None
    weights_ref, scales_ref = refs.pop(0), refs.pop(0)
    zeros_ref = refs.pop(0) if has_zeros else None
    out_ref, sums_ref, *groups = refs  # scales, and zeros if there are any
    step = pl.program_id(2)
    tile_k, tile_n = weights_ref.shape

    @pl.when(step == 0)
    def _start() -> None:
        sums_ref[...] = jnp.zeros_like(sums_ref)
        for group, ref in zip(groups, (scales_ref, zeros_ref), strict=False):
            group[...] = jnp.zeros_like(group)  # past K: finite
            group[: ref.shape[0]] = ref[...].astype(jnp.float32)

    def dequantized(start: int, size: int, here: pl.Slice | slice) -> jax.Array:
        stored = weights_ref[start : start + size, here]  # [size, columns]
        if group_size is None:
            return stored.astype(x_ref.dtype)
        first_group = (step * tile_k + start) // group_size
        parts = []
        for i in range(size // group_size):
            part = stored[i * group_size : (i + 1) * group_size].astype(dequantized_in)
            scale, *zero = (
                group[pl.ds(first_group + i, 1), here].astype(dequantized_in) for group in groups
            )
            for z in zero:
                part -= z
            parts.append((part * scale).astype(x_ref.dtype))
        return jnp.concatenate(parts)

    def multiply(i: jax.Array, _: None) -> None:
        here = pl.ds(pl.multiple_of(i * columns, columns), columns)
        sums = sums_ref[:, here]
        for start in range(0, tile_k, CHUNK):
            size = min(CHUNK, tile_k - start)
            x = x_ref[:, pl.ds(pl.multiple_of(step * tile_k + start, 128), size)]
            kernel = dequantized(start, size, here)
            sums += jnp.dot(x, kernel, preferred_element_type=sums.dtype)
        sums_ref[:, here] = sums

    jax.lax.fori_loop(0, tile_n // columns, multiply, None)

    @pl.when(step == pl.num_programs(2) - 1)
    def _finish() -> None:
        out = sums_ref[...].astype(jnp.float32)
        if row_scales_ref is not None:
            out *= row_scales_ref[...]
        if group_size is None:
            out *= scales_ref[...]
        out_ref[...] = out.astype(out_ref.dtype)


def unsupported(kind: str, int8_rows: bool) -> str | None:
    """Why a device of that kind cannot run a case; None if it can."""
    if int8_rows and kind.startswith(WITHOUT_INT8):
        return f"{kind} multiplies no int8 rows; leave x in bfloat16, or use 'xla'"
    return None


def matmul(
    x: jax.Array,  # [T, K]
    weights: jax.Array,  # [L, K, N]
    scales: jax.Array,  # [L, 1, N] or [L, ceil(K / G), N]
    zeros: jax.Array | None,
    layer: jax.Array | int,
    *,
    group_size: int | None,
    int8_rows: bool,
    dtype: DTypeLike,
    sizes: BlockSizes | None = None,
) -> jax.Array:
    """Every case that api.py describes but `unsupported` ones; sizes are for measuring."""
    kind = device_kind()
    num_rows, num_columns = x.shape[0], weights.shape[2]
    if sizes is None:
        problem = Problem(
            num_rows, x.shape[1], num_columns, 4 if group_size else 8, 8 if int8_rows else 16
        )
        sizes = block_sizes(problem, kind)
    row_scales: list[jax.Array] = []
    if int8_rows:
        x, scale = quantize_rows(x)
        row_scales = [jnp.pad(scale, ((0, -num_rows % sizes.rows), (0, 0)))]
    x = jnp.pad(x, ((0, -num_rows % sizes.rows), (0, -x.shape[1] % sizes.k)))

    operands = [x, *row_scales, weights, scales, *([] if zeros is None else [zeros])]
    out = pl.pallas_call(
        partial(
            _kernel,
            int8_rows=int8_rows,
            has_zeros=zeros is not None,
            group_size=group_size,
            columns=sizes.columns,
            dequantized_in=jnp.float32 if kind.startswith(WITHOUT_BFLOAT16) else jnp.bfloat16,
        ),
        grid_spec=_grid(operands, sizes, num_columns, group_size),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], num_columns), dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=_vmem_bytes(operands, sizes),
        ),
        cost_estimate=_cost(operands, x.shape[0] // sizes.rows, num_columns, dtype),
        name="quantized_matmul",
    )(jnp.asarray(layer, jnp.int32).reshape(1), *operands)
    return out[:num_rows]


def _grid(
    operands: list[jax.Array], sizes: BlockSizes, num_columns: int, group_size: int | None
) -> pltpu.PrefetchScalarGridSpec:
    num_rows, padded_k = operands[0].shape
    int8_rows = operands[0].dtype == jnp.int8

    def of_layer(rows: int, by_step: bool) -> pl.BlockSpec:
        return pl.BlockSpec(
            (None, rows, sizes.n), lambda t, n, k, layer: (layer[0], k if by_step else 0, n)
        )

    specs = [pl.BlockSpec((sizes.rows, padded_k), lambda t, n, k, layer: (t, 0))]
    if int8_rows:
        specs.append(pl.BlockSpec((sizes.rows, 1), lambda t, n, k, layer: (t, 0)))
    specs.append(of_layer(sizes.k, by_step=True))
    of_groups = operands[len(specs) :]  # scales, and zeros if there are any
    specs += [of_layer(array.shape[1], by_step=False) for array in of_groups]
    scratch = [pltpu.VMEM((sizes.rows, sizes.n), jnp.int32 if int8_rows else jnp.float32)]
    if group_size is not None:
        scratch += [pltpu.VMEM((padded_k // group_size, sizes.n), jnp.float32)] * len(of_groups)
    return pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(num_rows // sizes.rows, pl.cdiv(num_columns, sizes.n), padded_k // sizes.k),
        in_specs=specs,
        out_specs=pl.BlockSpec((sizes.rows, sizes.n), lambda t, n, k, layer: (t, n)),
        scratch_shapes=scratch,
    )


def _cost(
    operands: list[jax.Array], row_tiles: int, num_columns: int, dtype: DTypeLike
) -> pl.CostEstimate:
    """What the compiler and those who plan are told: each tile of rows reads all of a layer."""
    rows, *others = operands
    stacked = [array for array in others if array.ndim == 3]  # weights, scales, zeros
    bits = [4 if a.dtype == jnp.int4 else 8 * a.dtype.itemsize for a in stacked]
    layer = sum(math.prod(a.shape[1:]) * n for a, n in zip(stacked, bits, strict=True)) // 8
    num_rows = rows.shape[0]
    out = num_rows * num_columns * jnp.dtype(dtype).itemsize
    return pl.CostEstimate(
        flops=2 * num_rows * stacked[0].shape[1] * num_columns,
        transcendentals=0,
        bytes_accessed=rows.nbytes + row_tiles * layer + out,
    )


def _vmem_bytes(operands: list[jax.Array], sizes: BlockSizes) -> int:
    """A bound on what the blocks take, all buffered twice, with room for the compiler's own."""
    padded_k = operands[0].shape[1]
    x = sizes.rows * padded_k * operands[0].dtype.itemsize
    weights = sizes.k * sizes.n
    groups = 8 * (padded_k // 32 + 32) * sizes.n  # scales and zeros, stored and in float32
    out_and_sums = 3 * 4 * sizes.rows * sizes.n
    return 2 * (x + weights) + groups + out_and_sums + (8 << 20)
