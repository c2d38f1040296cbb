"""Masks of allowed tokens, read and made without the code that they test."""

from __future__ import annotations

import numpy as np


def allowed(mask: np.ndarray, vocab_size: int | None = None) -> np.ndarray:
    """[V] bool, of a constraint's mask [ceil(V / 32)]; V: all bits of it."""
    bits = [(int(word) >> bit) & 1 for word in mask for bit in range(32)]
    return np.asarray(bits[:vocab_size], bool)


def mask_of(allowed: np.ndarray) -> np.ndarray:
    """The inverse, for the last axis of an array [..., V]."""
    *rows, vocab_size = allowed.shape
    padded = np.zeros((*rows, -(-vocab_size // 32) * 32), np.int64)
    padded[..., :vocab_size] = allowed
    words = (padded.reshape(*rows, -1, 32) << np.arange(32)).sum(axis=-1)
    return words.astype(np.uint32).view(np.int32)
