"""Sampling in plain numpy, float64, from the definitions: what the sampler is compared with."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

Array = np.ndarray


def changed_logits(
    logits: Array,  # [V]
    *,
    prompt: Collection[int] = (),
    output: list[int] | None = None,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    logit_bias: Mapping[int, float] | None = None,
    allowed: Collection[int] | None = None,
    banned: Collection[int] = (),
    stops: Collection[int] = (),
    min_tokens: int = 0,
) -> Array:
    """Bias, bans and min_tokens, then penalties; one token at a time."""
    output = output or []
    result = np.array(logits, np.float64)
    for token in range(len(result)):
        value = result[token] + (logit_bias or {}).get(token, 0.0)
        if allowed is not None and token not in allowed:
            value = -np.inf
        if token in banned or (token in stops and len(output) < min_tokens):
            value = -np.inf
        if token in prompt or token in output:
            value = value / repetition_penalty if value > 0 else value * repetition_penalty
        value -= frequency_penalty * output.count(token)
        value -= presence_penalty * (token in output)
        result[token] = value
    return result


def probabilities(
    logits: Array,  # [V]
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Array:
    """Softmax, then min_p, top_k and top_p, each on the renormalised rest of the one before."""
    scaled = np.array(logits, np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    result = weights / weights.sum()
    result = _keep(result, result >= min_p * result.max())
    if 0 < top_k < len(result):
        result = _keep(result, result >= np.sort(result)[-top_k])
    if top_p < 1:
        descending = np.sort(result)[::-1]
        needed = np.argmax(np.cumsum(descending) >= top_p * (1 - 1e-12))
        result = _keep(result, result >= descending[needed])
    return result


def _keep(values: Array, kept: Array) -> Array:
    values = np.where(kept, values, 0.0)
    return values / values.sum()


def log_softmax(logits: Array) -> Array:
    """Over the last axis."""
    shifted = np.array(logits, np.float64) - np.max(logits, axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
