"""Attention: projections, head norms and rotation around the `attend` of the runtime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.typing import DTypeLike

from jaxllm.config import ModelConfig
from jaxllm.models.layers import RMSNorm, project, random_param, zero_param
from jaxllm.models.rope import apply_rope

# attend(q[T,H,D], k[T,K,D], v[T,K,D], kv_pool, layer, window) -> (out[T,H,D], kv_pool)
Attend = Callable[
    [jax.Array, jax.Array, jax.Array, Any, int | jax.Array, int | jax.Array],
    tuple[jax.Array, Any],
]
Tables = tuple[jax.Array, jax.Array]  # cos, sin: each [T, D/2]


class Attention(nnx.Module):
    """Grouped-query attention (https://arxiv.org/abs/2305.13245); K = H is multi-head, K = 1
    multi-query.

    The kernel keeps a group's G = H / K query heads beside its key and value head, so that one
    product makes all three and a shard of K is a shard of whole groups.
    """

    def __init__(self, config: ModelConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        width, head_dim = config.hidden_size, config.head_dim  # E, D
        num_heads, num_kv_heads = config.num_heads, config.num_kv_heads  # H, K
        group = (num_kv_heads, num_heads // num_kv_heads + 2, head_dim)  # [K, G+2, D]
        self.qkv_kernel = random_param(rngs, (width, *group), width, dtype)
        self.o_kernel = random_param(
            rngs, (num_heads, head_dim, width), num_heads * head_dim, dtype
        )
        self.qkv_bias = zero_param(group, dtype) if config.qkv_bias else None
        self.o_bias = zero_param((width,), dtype) if config.attention_output_bias else None
        epsilon, has_norms = config.rms_norm_eps, config.qk_norm
        self.q_norm = RMSNorm(head_dim, epsilon, dtype) if has_norms else None
        self.k_norm = RMSNorm(head_dim, epsilon, dtype) if has_norms else None

    def __call__(
        self,
        x: jax.Array,
        tables: Tables,
        kv_pool: Any,
        attend: Attend,
        layer: int | jax.Array,
        window: int | jax.Array,
    ) -> tuple[jax.Array, Any]:
        """[T, E] -> [T, E] and the pool with this layer's new keys and values."""
        q, k, v = self._queries_keys_values(x)
        q, k = apply_rope(q, *tables), apply_rope(k, *tables)
        mixed, kv_pool = attend(q, k, v, kv_pool, layer, window)  # [T, H, D]
        out = project(mixed.astype(x.dtype), self.o_kernel[...], num_contracted=2)  # [T, E] float32
        if self.o_bias is not None:
            out += self.o_bias[...]
        return out.astype(x.dtype), kv_pool

    def _queries_keys_values(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        qkv = project(x, self.qkv_kernel[...])  # [T, K, G+2, D] float32
        if self.qkv_bias is not None:
            qkv += self.qkv_bias[...]
        qkv = qkv.astype(x.dtype)
        num_tokens, _, _, head_dim = qkv.shape
        q = qkv[:, :, :-2].reshape(num_tokens, -1, head_dim)  # [T, H, D]
        k, v = qkv[:, :, -2], qkv[:, :, -1]  # [T, K, D]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v
