"""The projections and head norms around attention, which itself has no weights."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from jaxllm.config import ModelConfig
from jaxllm.models.layers import Call, RMSNorm, project, random_param, zero_param


class Attention(nnx.Module):
    """Grouped-query attention (https://arxiv.org/abs/2305.13245); K = H is multi-head, K = 1
    multi-query.

    The kernel keeps a group's G = H / K query heads beside its key and value head, so that one
    product makes all three and a shard of K is a shard of whole groups. Both kernels are stored as
    matrices, [E, K(G+2)D] and [HD, E], see merging.py.
    """

    def __init__(self, config: ModelConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        width, head_dim = config.hidden_size, config.head_dim  # E, D
        num_heads, num_kv_heads = config.num_heads, config.num_kv_heads  # H, K
        group = (num_kv_heads, num_heads // num_kv_heads + 2, head_dim)  # [K, G+2, D]
        self.group, self.width = group, width
        self.qkv_kernel = random_param(rngs, (width, *group), width, dtype)
        self.o_kernel = random_param(
            rngs, (num_heads, head_dim, width), num_heads * head_dim, dtype
        )
        self.qkv_bias = zero_param(group, dtype) if config.qkv_bias else None
        self.o_bias = zero_param((width,), dtype) if config.attention_output_bias else None
        epsilon, has_norms = config.rms_norm_eps, config.qk_norm
        self.q_norm = RMSNorm(head_dim, epsilon, dtype) if has_norms else None
        self.k_norm = RMSNorm(head_dim, epsilon, dtype) if has_norms else None

    def heads(self, x: jax.Array, call: Call) -> jax.Array:
        """[T, E] -> [T, K, G+2, D]: each group's queries, key and value, before the rotation."""
        qkv = project(
            x, self.qkv_kernel.get_value(), call, math.prod(self.group),
            bias=self.qkv_bias, dtype=x.dtype,
        )  # fmt: skip
        # Else a compiler for TPU lets the heads decide how the kernel is to lie, and lays it out
        # anew before each step.
        qkv = lax.optimization_barrier(qkv)
        qkv = qkv.reshape(x.shape[0], *self.group)
        if self.q_norm is None or self.k_norm is None:
            return qkv
        q, k, v = qkv[:, :, :-2], qkv[:, :, -2:-1], qkv[:, :, -1:]
        return jnp.concatenate([self.q_norm(q), self.k_norm(k), v], axis=2)

    def output(self, mixed: jax.Array, call: Call) -> jax.Array:
        """[T, H, D] -> [T, E]: what attention adds to the residual stream."""
        return project(
            mixed.reshape(mixed.shape[0], -1), self.o_kernel.get_value(), call, self.width,
            bias=self.o_bias, dtype=mixed.dtype,
        )  # fmt: skip
