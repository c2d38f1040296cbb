"""Rotary position embeddings (https://arxiv.org/abs/2104.09864) and extensions to long contexts.

The rotation is that of Hugging Face ("rotate half"): dimension i turns together with i + D/2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxllm.config import ModelConfig, ModelError, RopeConfig


@dataclass(frozen=True)
class Rope:
    """The rotation of one model, ready for `rope_tables`.

    inv_freq: radians a token, [D/2] float32.
    attention_factor: what cos and sin are multiplied by (yarn's temperature of the attention).
    dynamic_factor: 0 when inv_freq holds for every length; otherwise frequencies fall as a
    sequence grows past max_position_embeddings.
    """

    inv_freq: np.ndarray
    attention_factor: float = 1.0
    dynamic_factor: float = 0.0
    max_position_embeddings: int = 0


def build_rope(config: ModelConfig) -> Rope:
    """The rotation that config.rope describes. Raises ModelError when its values make none."""
    with np.errstate(all="ignore"):  # what overflows is refused by name
        rope = _rope(config)
    finite = np.isfinite(rope.inv_freq) & (rope.inv_freq > 0)
    if not finite.all():
        raise ModelError(
            f"rope_theta {config.rope.theta} and factor {config.rope.factor} make a rotary "
            f"frequency of {rope.inv_freq[~finite][0]}, but all must be positive and finite"
        )
    if not 0 < rope.attention_factor <= float(np.finfo(np.float32).max):
        raise ModelError(
            f"rope's attention_factor must be positive and finite, got {rope.attention_factor}; "
            f"it follows from factor, mscale and mscale_all_dim where it is not given"
        )
    return rope


def _rope(config: ModelConfig) -> Rope:
    rope, head_dim = config.rope, config.head_dim
    inv_freq = rope_frequencies(rope.theta, head_dim)
    context_len = rope.original_max_position_embeddings or config.max_position_embeddings
    match rope.rope_type:
        case "linear":
            return Rope((inv_freq / rope.factor).astype(np.float32))
        case "dynamic":
            if head_dim < 4:
                raise ModelError(
                    f"rope_type 'dynamic' needs head_dim of at least 4, got {head_dim}"
                )
            # The length is that of the checkpoint's max_position_embeddings, as in transformers.
            return Rope(
                inv_freq,
                dynamic_factor=rope.factor,
                max_position_embeddings=config.max_position_embeddings,
            )
        case "llama3":
            return Rope(llama3_frequencies(rope, inv_freq, context_len))
        case "yarn":
            return Rope(_yarn_inv_freq(rope, head_dim, context_len), _yarn_attention_factor(rope))
    return Rope(inv_freq)


def rope_frequencies(theta: float, head_dim: int) -> np.ndarray:
    """Radians a token without scaling, [D/2] float32."""
    return (1.0 / _tokens_a_radian(theta, head_dim)).astype(np.float32)


def _tokens_a_radian(theta: float, head_dim: int) -> np.ndarray:
    """theta ** (2i / D), [D/2] float32."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    # numpy's float32 power is up to two units off torch's, which shows at late positions.
    return (np.float64(theta) ** exponents.astype(np.float64)).astype(np.float32)


def llama3_frequencies(rope: RopeConfig, inv_freq: np.ndarray, context_len: int) -> np.ndarray:
    """Llama 3.1: slow frequencies are divided by factor, fast ones kept, a ramp lies between."""
    low, high = rope.low_freq_factor, rope.high_freq_factor
    if not 0 < low < high:
        raise ModelError(
            f"rope_type 'llama3' needs 0 < low_freq_factor < high_freq_factor, got {low} and {high}"
        )
    turns = context_len * inv_freq / np.float32(2 * math.pi)  # full turns within the context
    kept = np.clip((turns - low) / (high - low), 0, 1)  # share of the original frequency
    return ((1 - kept) * inv_freq / rope.factor + kept * inv_freq).astype(np.float32)


def _yarn_inv_freq(rope: RopeConfig, head_dim: int, context_len: int) -> np.ndarray:
    """YaRN (https://arxiv.org/abs/2309.00071), section 3.2: a ramp over dimensions between
    interpolated frequencies and original ones."""
    if not rope.theta > 1:
        raise ModelError(f"rope_type 'yarn' needs rope_theta above 1, got {rope.theta}")
    if not (rope.beta_fast > 0 and rope.beta_slow > 0):
        raise ModelError(
            f"rope_type 'yarn' needs positive beta_fast and beta_slow, got {rope.beta_fast} and "
            f"{rope.beta_slow}"
        )

    def dimension(turns: float) -> float:  # the one that turns this often within the context
        tokens_a_radian = context_len / (turns * 2 * math.pi)
        if not 0 < tokens_a_radian < math.inf:
            raise ModelError(f"rope_type 'yarn' cannot use a beta_fast or beta_slow of {turns}")
        return head_dim * math.log(tokens_a_radian) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    dimensions = np.arange(head_dim // 2, dtype=np.float32)
    interpolated = np.clip((dimensions - low) / (high - low), 0, 1)  # share of it
    inv_freq = 1.0 / _tokens_a_radian(rope.theta, head_dim)
    mixed = inv_freq / rope.factor * interpolated + inv_freq * (1 - interpolated)
    return mixed.astype(np.float32)


def _yarn_attention_factor(rope: RopeConfig) -> float:
    def temperature(mscale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * mscale * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        divisor = temperature(rope.mscale_all_dim)
        return temperature(rope.mscale) / divisor if divisor else math.inf
    return temperature(1.0)


def rope_tables(
    rope: Rope, positions: jax.Array, rope_lens: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """cos and sin of each token's angles, both [T, D/2] float32.

    positions [T]: the token's index in its sequence. rope_lens [T]: max(prompt length of its
    sequence, position + 1), which only the dynamic type reads.
    """
    inv_freq = jnp.asarray(rope.inv_freq)[None, :]  # [1, D/2]
    if rope.dynamic_factor:
        inv_freq = inv_freq * _dynamic_slowdown(rope, rope_lens)  # [T, D/2]
    angles = positions.astype(jnp.float32)[:, None] * inv_freq  # [T, D/2]
    return jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor


def _dynamic_slowdown(rope: Rope, rope_lens: jax.Array) -> jax.Array:
    """NTK-aware scaling multiplies theta by stretch ** (D / (D - 2)); as a factor on each frequency
    this is stretch ** (-2i / (D - 2)), exactly 1 within the trained context. [T, D/2]"""
    num_freqs = rope.inv_freq.shape[0]
    exponents = np.arange(num_freqs, dtype=np.float32) / np.float32(num_freqs - 1)
    overshoot = rope_lens.astype(jnp.float32) / rope.max_position_embeddings - 1
    stretch = 1 + rope.dynamic_factor * jnp.maximum(overshoot, 0)  # [T]
    return jnp.exp(-jnp.log(stretch)[:, None] * exponents)


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns the heads of x [T, heads, D] by the tables [T, D/2]; float32 inside, x's dtype out."""
    cos, sin = cos[:, None, :], sin[:, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)  # [T, heads, D/2]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def rotated_heads(
    qkv: jax.Array, cos: jax.Array, sin: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries [T, H, D], keys and values [T, K, D] from groups of heads qkv [T, K, G+2, D], whose
    last is the value; queries and keys are turned by the tables [T, D/2]."""
    return lax.platform_dependent(qkv, cos, sin, tpu=turned_at_once, default=_turned_apart)


def _turned_apart(
    qkv: jax.Array, cos: jax.Array, sin: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    q, k, v = _split(qkv)
    return apply_rope(q, cos, sin), apply_rope(k, cos, sin), v


def turned_at_once(
    qkv: jax.Array, cos: jax.Array, sin: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The form of `rotated_heads` for TPU. Halves of a head are halves of a register there, and
    exchanging them costs its vector unit more than a product with a permutation costs the matrix
    unit; so do slices of few heads, which are therefore taken last."""
    half = qkv.shape[-1] // 2
    exchange = np.zeros((2 * half, 2 * half), np.float32)  # [first, second] -> [-second, first]
    exchange[range(half, 2 * half), range(half)] = -1
    exchange[range(half), range(half, 2 * half)] = 1
    precision = lax.Precision.HIGHEST if qkv.dtype == jnp.float32 else lax.Precision.DEFAULT
    exchanged = jnp.einsum(
        "tkgd,de->tkge", qkv, jnp.asarray(exchange, qkv.dtype),
        precision=precision, preferred_element_type=jnp.float32,
    )  # fmt: skip
    cos, sin = (jnp.concatenate([table, table], axis=-1)[:, None, None] for table in (cos, sin))
    wide = qkv.astype(jnp.float32)
    is_value = (np.arange(qkv.shape[2]) == qkv.shape[2] - 1)[:, None]
    return _split(jnp.where(is_value, wide, wide * cos + exchanged * sin).astype(qkv.dtype))


def _split(qkv: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    q = qkv[:, :, :-2].reshape(qkv.shape[0], -1, qkv.shape[-1])
    return q, qkv[:, :, -2], qkv[:, :, -1]
