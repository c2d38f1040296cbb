"""The projections and head norms around attention, which itself has no weights."""

from __future__ import annotations

import math

import jax
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from jaxllm.config import ModelConfig
from jaxllm.models.layers import Call, RMSNorm, project, random_param, zero_param


class Attention(nnx.Module):
    """Grouped-query attention (https://arxiv.org/abs/2305.13245); K = H is multi-head, K = 1
    multi-query.

    The kernel keeps a group's G = H / K query heads beside its key and value head, so that one
    product makes all three and a shard of K is a shard of whole groups. It is stored as a matrix
    [E, K(G+2)D], see merging.py.
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

    def queries_keys_values(
        self, x: jax.Array, call: Call
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """[T, E] -> [T, H, D], [T, K, D], [T, K, D], before the rotation."""
        qkv = project(
            x, self.qkv_kernel[...], call, math.prod(self.group), bias=self.qkv_bias, dtype=x.dtype
        )
        # Else a compiler for TPU lets the heads decide how the kernel is to lie, and lays it out
        # anew before each step.
        qkv = lax.optimization_barrier(qkv)
        num_tokens, head_dim = x.shape[0], self.group[-1]
        qkv = qkv.reshape(num_tokens, *self.group)  # [T, K, G+2, D]
        q = qkv[:, :, :-2].reshape(num_tokens, -1, head_dim)  # [T, H, D]
        k, v = qkv[:, :, -2], qkv[:, :, -1]  # [T, K, D]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def output(self, mixed: jax.Array, call: Call) -> jax.Array:
        """[T, H, D] -> [T, E]: what attention adds to the residual stream."""
        return project(
            mixed, self.o_kernel[...], call, self.width,
            num_contracted=2, bias=self.o_bias, dtype=mixed.dtype,
        )  # fmt: skip
