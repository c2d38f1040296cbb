"""Packed products against numpy in float64."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cpu_variants import each_variant
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import native
from pallas_kernels.packed_matmul.api import IMPLEMENTATIONS, packed_matmul
from pallas_kernels.packed_matmul.layout import columns, pack, pack_gated, unpack

AVAILABLE = [
    pytest.param(name, marks=pytest.mark.skipif(name == "cpu" and not native.is_available(),
                                                reason="the kernels were not built"))
    for name in IMPLEMENTATIONS
]  # fmt: skip


def bfloat16(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(jnp.bfloat16)


def wide(array: Any) -> np.ndarray:
    return np.asarray(array).astype(np.float64)


def test_the_kernels_are_built_where_there_is_a_compiler() -> None:
    import shutil

    if shutil.which("g++") is None:
        pytest.skip("no compiler")
    assert native.is_available()


@pytest.mark.parametrize("num_columns", [1, 31, 32, 33, 100])
def test_packing_loses_nothing(num_columns: int) -> None:
    kernel = bfloat16(np.random.default_rng(0), 6, num_columns)
    packed = jnp.asarray(pack(kernel))
    np.testing.assert_array_equal(unpack(packed, num_columns), kernel)
    chosen = np.array([0, num_columns - 1, num_columns // 2])
    np.testing.assert_array_equal(columns(packed, jnp.asarray(chosen)), kernel[:, chosen].T)


def test_indices_outside_read_the_nearest_column() -> None:
    packed = jnp.asarray(pack(bfloat16(np.random.default_rng(0), 2, 32)))
    outside = columns(packed, jnp.asarray([-5, 99]))
    np.testing.assert_array_equal(outside, columns(packed, jnp.asarray([0, 31])))


@pytest.mark.parametrize("implementation", AVAILABLE)
@settings(max_examples=40, deadline=None)
@given(
    num_tokens=st.integers(1, 130),
    missing=st.integers(0, 140),
    num_pairs=st.integers(1, 40) | st.sampled_from([16, 32, 64]),  # whole tiles
    num_columns=st.integers(1, 100),
    gated=st.booleans(),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    layer=st.integers(0, 1),
    seed=st.integers(0, 2**16),
)
def test_equals_the_formula(
    implementation: str, num_tokens: int, missing: int, num_pairs: int, num_columns: int,
    gated: bool, dtype: str, layer: int, seed: int,
) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)
    num_rows = max(0, num_tokens - missing)
    x = bfloat16(rng, num_tokens, 2 * num_pairs)
    shape = (2, 2 * num_pairs, 2, num_columns) if gated else (2, 2 * num_pairs, num_columns)
    kernels = bfloat16(rng, *shape)
    packed = np.stack([(pack_gated if gated else pack)(kernel) for kernel in kernels])
    x[num_rows:] = np.nan  # padding must not be looked at
    call = jax.jit(
        lambda x, packed, layer, num_rows: packed_matmul(
            x, packed, layer, num_rows, num_columns=num_columns, gated=gated, dtype=dtype,
            implementation=implementation,
        )
    )  # fmt: skip
    product = np.einsum("tk,k...->t...", wide(x[:num_rows]), wide(kernels[layer]))
    if gated:
        product = product[:, 0] / (1 + np.exp(-product[:, 0])) * product[:, 1]
    tolerance = 1e-4 if dtype == "float32" else 1e-2
    for variant in each_variant() if implementation == "cpu" else [""]:
        out = wide(call(x, packed, layer, num_rows))
        np.testing.assert_allclose(
            out[:num_rows], product, rtol=tolerance, atol=tolerance, err_msg=variant
        )
        assert not out[num_rows:].any()


@pytest.mark.parametrize("implementation", AVAILABLE)
def test_not_a_number_and_infinity_are_passed_on(implementation: str) -> None:
    x = np.ones((3, 2), jnp.bfloat16)
    x[1, 0], x[2, 0] = np.nan, np.inf
    kernel = pack(np.ones((2, 4), jnp.bfloat16))[None]
    for dtype in ("float32", "bfloat16"):
        out = wide(
            packed_matmul(x, kernel, 0, 3, num_columns=4, dtype=dtype,
                          implementation=implementation)
        )  # fmt: skip
        assert np.isfinite(out[0]).all()
        assert np.isnan(out[1]).all()
        assert np.isposinf(out[2]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.ones((3, 4), np.float32)}, "bfloat16"),
        ({"kernels": np.zeros((1, 1, 3, 32), np.uint32)}, "are not"),
        ({"kernels": np.zeros((1, 1, 2, 32), np.int32)}, "uint32"),
        ({"num_columns": 33}, "are not"),
        ({"dtype": "float16"}, "dtype"),
        ({"implementation": "magic"}, "unknown implementation"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "x": np.ones((3, 4), jnp.bfloat16),
        "kernels": np.zeros((1, 1, 2, 32), np.uint32),
        "layer": 0,
        "num_rows": 3,
        "num_columns": 32,
    }
    arguments |= change
    positional = [arguments.pop(name) for name in ("x", "kernels", "layer", "num_rows")]
    with pytest.raises(ValueError, match=message):
        packed_matmul(*positional, **arguments)


def test_a_variant_that_is_none() -> None:
    with pytest.raises(ValueError, match="the processor has no avx9"):
        native.use_variant("avx9")


def test_an_odd_number_of_rows_cannot_be_packed() -> None:
    with pytest.raises(ValueError, match="even number of rows, got 3"):
        pack(np.ones((3, 4), jnp.bfloat16))
