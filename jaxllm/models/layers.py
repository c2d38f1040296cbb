"""What decoders of all families are built from: norm, embedding, feed-forward, head.

Activations keep the dtype of the parameters; sums, norms and logits are float32.
"""

from __future__ import annotations

from typing import NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from jaxllm.config import ModelConfig
from jaxllm.quantization.int8 import Int8Kernel
from pallas_kernels.packed_matmul.api import packed_matmul
from pallas_kernels.packed_matmul.layout import columns
from pallas_kernels.quantized_matmul.api import quantized_matmul

PACKED = jnp.uint32  # the type of packed kernels, see packing.py


class Call(NamedTuple):
    """What products with packed and quantized kernels need to know beside their operands."""

    layer: jax.Array | int  # of stacked kernels
    num_rows: jax.Array | int  # rows that are no padding
    in_place: bool = False  # whether int8 kernels of layers are stacked too, and read in place


def random_param(
    rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int, dtype: DTypeLike
) -> nnx.Param[jax.Array]:
    """A parameter drawn so that a product over fan_in inputs keeps their variance."""
    bound = (3 / fan_in) ** 0.5  # uniform, because a normal takes twice as long to compile
    return nnx.Param(jax.random.uniform(rngs.params(), shape, dtype, -bound, bound))


def project(
    x: jax.Array,
    kernel: jax.Array | Int8Kernel,
    call: Call,
    num_columns: int,
    *,
    bias: nnx.Param[jax.Array] | None = None,
    dtype: DTypeLike = jnp.float32,
) -> jax.Array:
    """The product of x [T, R] and a kernel [R, N], plus the elements of bias: [T, N] in dtype,
    summed in float32. The kernel may be quantized, and packed or quantized it may be alone or with
    those of other layers."""
    summed = dtype if bias is None else jnp.float32
    if _is_packed(kernel):
        product = packed_matmul(
            x,
            kernel[None] if kernel.ndim == 3 else kernel,
            call.layer,
            call.num_rows,
            num_columns=num_columns,
            dtype=summed,
        )
    else:
        product = _product(x, kernel, call, summed)
    if bias is not None:
        product += bias[...].reshape(-1)
    return product.astype(dtype)


def _is_packed(kernel: jax.Array | Int8Kernel) -> TypeGuard[jax.Array]:
    return not isinstance(kernel, Int8Kernel) and kernel.dtype == PACKED


def _product(
    x: jax.Array, kernel: jax.Array | Int8Kernel, call: Call, dtype: DTypeLike = jnp.float32
) -> jax.Array:
    """x [T, R] by a kernel [..., R, N]: [T, ..., N] in dtype."""
    if not isinstance(kernel, Int8Kernel):
        return _dot(x, kernel, kernel.ndim - 2).astype(dtype)
    weights, scales = kernel
    if not call.in_place:
        sums = _dot(x, weights.astype(x.dtype), weights.ndim - 2)
        return (sums * jnp.squeeze(scales, -2)).astype(dtype)
    *leading, _, num_columns = weights.shape  # leading: [L, ...], or nothing of a kernel alone
    matrices, their_scales = (
        array.reshape(-1, array.shape[-2], num_columns) for array in (weights, scales)
    )
    product = quantized_matmul(x, matrices, their_scales, call.layer, dtype=dtype)
    return product.reshape(x.shape[0], *leading[1:], num_columns)


def _dot(x: jax.Array, kernel: jax.Array, axis: int) -> jax.Array:
    """x [T, R] by a kernel whose axis has R elements, in float32."""
    # GPUs and TPUs would round float32 operands to TF32 or bfloat16. A float32 result is also what
    # keeps bfloat16 products on the CPU at full speed.
    precision = lax.Precision.HIGHEST if kernel.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(
        x, kernel, (((1,), (axis,)), ((), ())), precision=precision,
        preferred_element_type=jnp.float32,
    )  # fmt: skip


def zero_param(shape: tuple[int, ...], dtype: DTypeLike) -> nnx.Param[jax.Array]:
    """A bias before a checkpoint fills it."""
    return nnx.Param(jnp.zeros(shape, dtype))


class RMSNorm(nnx.Module):
    """Root mean square norm (https://arxiv.org/abs/1910.07467) over the last axis."""

    def __init__(self, size: int, epsilon: float, dtype: DTypeLike) -> None:
        self.scale = nnx.Param(jnp.ones((size,), dtype))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
        normed = wide * lax.rsqrt(mean_square + self.epsilon)
        return normed.astype(x.dtype) * self.scale[...]


class Embedding(nnx.Module):
    """Token embeddings [V, E]; tied models use them as the output head too."""

    def __init__(self, config: ModelConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        shape = (config.vocab_size, config.hidden_size)
        self.size = config.vocab_size
        self.embedding = random_param(rngs, shape, config.hidden_size, dtype)

    def __call__(self, token_ids: jax.Array) -> jax.Array:
        """[T] -> [T, E]. Ids outside the vocabulary, as padding may have, read its nearest row."""
        table = self.embedding[...]
        if table.dtype == PACKED:
            return columns(table, jnp.clip(token_ids, 0, self.size - 1))
        if table.dtype != jnp.bfloat16:
            return _rows(table, token_ids)
        # The CPU backend converts the whole operand of a bfloat16 gather to float32; the TPU's
        # copies the whole table for its bits.
        return lax.platform_dependent(table, token_ids, cpu=_rows_by_bits, default=_rows)

    def attend(self, hidden: jax.Array, call: Call) -> jax.Array:
        """Logits [R, V] of hidden [R, E]; contracts E in place, so no transposed copy is made."""
        table = self.embedding[...]
        if table.dtype == PACKED:
            return project(hidden, table, call, self.size)
        return _dot(hidden, table, 1)


def _rows(table: jax.Array, indices: jax.Array) -> jax.Array:
    return jnp.take(table, indices, axis=0, mode="clip")


def _rows_by_bits(table: jax.Array, indices: jax.Array) -> jax.Array:
    rows = _rows(lax.bitcast_convert_type(table, jnp.uint16), indices)
    return lax.bitcast_convert_type(rows, jnp.bfloat16)


class Head(nnx.Module):
    """The output head of models that do not tie it to the embedding."""

    def __init__(self, config: ModelConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.size = config.vocab_size
        shape = (config.hidden_size, self.size)
        self.kernel = random_param(rngs, shape, config.hidden_size, dtype)

    def __call__(self, hidden: jax.Array, call: Call) -> jax.Array:
        """Logits [R, V] of hidden [R, E]."""
        return project(hidden, self.kernel.get_value(), call, self.size)


class FeedForward(nnx.Module):
    """SwiGLU (https://arxiv.org/abs/2002.05202): gate and up in one product.

    Their kernel is stored as [n, E, 2F / n]: for each of n devices its columns of both, see
    merging.py.
    """

    def __init__(self, config: ModelConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        width, inner = config.hidden_size, config.intermediate_size  # E, F
        self.width, self.inner = width, inner
        self.gate_up_kernel = random_param(rngs, (width, 2, inner), width, dtype)
        self.down_kernel = random_param(rngs, (inner, width), inner, dtype)
        has_bias = config.mlp_bias
        self.gate_up_bias = zero_param((2, inner), dtype) if has_bias else None
        self.down_bias = zero_param((width,), dtype) if has_bias else None

    def __call__(self, x: jax.Array, call: Call) -> jax.Array:
        inner = self._gated(x, call)  # [T, F]
        return project(
            inner, self.down_kernel.get_value(), call, self.width,
            bias=self.down_bias, dtype=x.dtype,
        )  # fmt: skip

    def _gated(self, x: jax.Array, call: Call) -> jax.Array:
        kernel: jax.Array | Int8Kernel = self.gate_up_kernel.get_value()
        if _is_packed(kernel):
            return packed_matmul(
                x, kernel, call.layer, call.num_rows,
                num_columns=self.inner, gated=True, dtype=x.dtype,
            )  # fmt: skip
        gate_up = _product(x, kernel, call)  # [T, n, 2F / n]
        _, num_parts, columns = gate_up.shape
        if self.gate_up_bias is not None:
            bias = self.gate_up_bias[...].reshape(2, num_parts, columns // 2)
            gate_up += bias.swapaxes(0, 1).reshape(num_parts, columns)
        gate, up = gate_up[..., : columns // 2], gate_up[..., columns // 2 :]
        return (jax.nn.silu(gate) * up).astype(x.dtype).reshape(x.shape[0], self.inner)
