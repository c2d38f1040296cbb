"""The largest entries of rows as each platform finds them, beside jax.lax.top_k."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from jaxllm.runtime import ranking


@pytest.mark.parametrize(("size", "k"), [(31, 20), (500, 5), (5000, 20), (5000, 256)])
def test_the_largest_with_ties_and_minus_infinity(size: int, k: int) -> None:
    x = np.random.default_rng(size + k).integers(0, 50, (3, size)).astype(np.float32)
    x[0, : size // 2] = -np.inf
    x[1] = -np.inf
    expected = jax.lax.top_k(x, k)
    for num_wanted in (k, k // 2):
        on_tpu: Any = ranking._from_strided_blocks(x, num_wanted, k=k)  # type: ignore[arg-type]
        for found, right in zip(on_tpu, expected, strict=True):
            np.testing.assert_array_equal(found[:, :num_wanted], right[:, :num_wanted])
    for found, right in zip(ranking.top_k(x, k), expected, strict=True):  # type: ignore[arg-type]
        np.testing.assert_array_equal(found, right)
