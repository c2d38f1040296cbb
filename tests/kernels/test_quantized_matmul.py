"""Quantized products: the oracle against numpy, the others against the oracle, and the programs for
chips that are not there."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from tpu_topology import compile_for, needs_libtpu

from pallas_kernels.quantized_matmul import block_sizes as sizing
from pallas_kernels.quantized_matmul import tpu
from pallas_kernels.quantized_matmul.api import quantized_matmul
from pallas_kernels.quantized_matmul.block_sizes import BlockSizes, Problem
from pallas_kernels.quantized_matmul.layout import (
    QuantizedKernel,
    quantize_int4,
    quantize_int8,
    quantize_rows,
)

# What a case is, beside shapes: the group size (None: int8), zero points, int8 rows.
FORMS = [(None, False, False), (None, False, True)] + [
    (group_size, zeros, False) for group_size in (32, 64, 128) for zeros in (False, True)
]
forms = st.sampled_from(FORMS)


def wide(array: Any) -> np.ndarray:
    return np.asarray(array).astype(np.float64)


def quantized(seed: int, shape: tuple[int, ...], group_size: int | None, zeros: bool) -> Any:
    kernel = np.random.default_rng(seed).normal(0.3, 1.0, shape).astype(np.float32)
    if group_size is None:
        return kernel, jax.jit(quantize_int8)(kernel)
    return kernel, jax.jit(quantize_int4, static_argnums=(1, 2))(kernel, group_size, zeros)


def rows_of(seed: int, num_rows: int, k: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(num_rows, k)), jnp.bfloat16)


def formula(x: np.ndarray, q: QuantizedKernel, group_size: int | None) -> np.ndarray:
    """x [T, K] times the one kernel [K, N] in float64."""
    weights = wide(q.weights)
    if group_size is None:
        return x @ (weights * wide(q.scales))
    group = np.arange(weights.shape[0]) // group_size
    zeros = 0 if q.zeros is None else wide(q.zeros)[group]
    # bfloat16 rounds once: the float32 product of such short numbers is exact
    kernel = ((weights - zeros) * wide(q.scales)[group]).astype(np.float32)
    return x @ wide(kernel.astype(jnp.bfloat16))


@pytest.mark.parametrize(("group_size", "zeros"), [(f[0], f[1]) for f in FORMS if not f[2]])
def test_quantization_is_off_by_half_a_step_at_most(group_size: int | None, zeros: bool) -> None:
    kernel, q = quantized(0, (2, 200, 24), group_size, zeros)
    group = np.arange(200) // (group_size or 200)
    steps = wide(q.scales)[:, group]
    zero = 0 if q.zeros is None else wide(q.zeros)[:, group]
    error = np.abs((wide(q.weights) - zero) * steps - kernel) / steps
    # Rounding scales to bfloat16 (2**-9) and zero points to integers clips the outermost weights.
    assert error.max() <= 0.5 + (0.6 if zeros else 15 * 2**-9) + 1e-4
    assert np.mean(error <= 0.501) > 0.97
    assert len(np.unique(wide(q.weights))) > (200 if group_size is None else 14)


def test_zero_points_serve_kernels_of_one_sign() -> None:
    kernel = jnp.asarray(np.random.default_rng(0).uniform(1.0, 2.0, (64, 8)), jnp.float32)
    errors = []
    for zeros in (False, True):
        q = quantize_int4(kernel, 64, zeros)
        zero = 0 if q.zeros is None else wide(q.zeros)
        errors.append(np.abs((wide(q.weights) - zero) * wide(q.scales) - wide(kernel)).mean())
    assert errors[1] < 0.6 * errors[0]


def test_what_is_all_zero_stays_zero() -> None:
    nothing = jnp.zeros((64, 4))
    for q in (quantize_int8(nothing), quantize_int4(nothing, 32, False)):
        assert not wide(q.weights).any()
        assert (wide(q.scales) == 1).all()
    q = quantize_int4(nothing, 32, True)
    np.testing.assert_array_equal(wide(q.weights), np.repeat(wide(q.zeros), 32, axis=0))
    rows, scales = quantize_rows(jnp.zeros((2, 3)))
    assert not wide(rows).any()
    assert (wide(scales) == 1).all()


@settings(max_examples=10, deadline=None)
@given(
    form=forms,
    num_rows=st.sampled_from([1, 20]),
    k=st.sampled_from([1, 100, 300]),
    n=st.sampled_from([1, 50]),
    implementation=st.sampled_from(["reference", "xla"]),
    seed=st.integers(0, 2**16),
)
def test_equals_the_formula(
    form: tuple[int | None, bool, bool], num_rows: int, k: int, n: int, implementation: str,
    seed: int,
) -> None:  # fmt: skip
    group_size, zeros, int8_rows = form
    _, q = quantized(seed, (2, k, n), group_size, zeros)
    x = rows_of(seed, num_rows, k)
    out = quantized_matmul(
        x, q.weights, q.scales, jnp.int32(1), zeros=q.zeros, group_size=group_size,
        int8_rows=int8_rows, dtype=jnp.float32, implementation=implementation,
    )  # fmt: skip
    meant = wide(x)
    if int8_rows:
        rows, steps = quantize_rows(x)
        np.testing.assert_allclose(wide(steps)[:, 0], np.abs(meant).max(axis=1) / 127, rtol=1e-6)
        assert (np.abs(wide(rows) * wide(steps) - meant) <= 0.5001 * wide(steps)).all()
        meant = wide(rows) * wide(steps)
    one = jax.tree.map(lambda array: array[1], q)
    expected = formula(meant, one, group_size)
    np.testing.assert_allclose(wide(out), expected, rtol=1e-4, atol=1e-4 * np.sqrt(k))


# An example takes seconds in the interpreter, and would be shrunk for minutes.
@settings(max_examples=4, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    form=forms,
    num_rows=st.integers(1, 70),
    k=st.integers(1, 300),
    n=st.integers(1, 300),
    tile=st.sampled_from([(32, 128, 128, 128), (32, 256, 256, 128), None]),
    float32_units=st.booleans(),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    seed=st.integers(0, 2**16),
)
def test_the_tpu_kernel_equals_the_oracle(
    form: tuple[int | None, bool, bool], num_rows: int, k: int, n: int,
    tile: tuple[int, int, int, int] | None, float32_units: bool, dtype: str, seed: int,
) -> None:  # fmt: skip
    group_size, zeros, int8_rows = form
    _, q = quantized(seed, (3, k, n), group_size, zeros)
    x = rows_of(seed, num_rows, k)
    operands = (x, q.weights, q.scales, q.zeros, jnp.int32(2))
    options: dict[str, Any] = {"group_size": group_size, "int8_rows": int8_rows, "dtype": dtype}
    interpreter = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    with pytest.MonkeyPatch.context() as patch, pltpu.force_tpu_interpret_mode(interpreter):
        patch.setattr(tpu, "device_kind", lambda: "TPU v5 lite" if float32_units else "TPU v6e")
        sizes = None if tile is None else BlockSizes(*tile)
        out = tpu.matmul(*operands, **options, sizes=sizes)
    expected = quantized_matmul(
        *operands[:3], operands[4], zeros=q.zeros, **options, implementation="reference"
    )
    # Sums of another order; bfloat16 results may then round to the neighbour.
    rtol = 1e-4 if dtype == "float32" else 2**-7
    np.testing.assert_allclose(wide(out), wide(expected), rtol=rtol, atol=1e-4 * np.sqrt(k))


PROBLEMS = [
    Problem(rows, k, n, bits, 16)
    for rows in (1, 64, 300, 2048)
    for k, n in ((576, 49152), (14336, 4096), (53248, 16384), (1536, 151936), (7, 3))
    for bits in (4, 8)
]


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_heuristic_always_answers(problem: Problem) -> None:
    for sizes in sizing.candidates(problem):
        assert (
            sizes.rows % 32 == sizes.k % 128 == sizes.columns % 128 == sizes.n % sizes.columns == 0
        )
        tiles = -(-problem.k // sizes.k)
        assert tiles * sizes.k - problem.k < 128 * tiles  # hardly anything is computed in vain
        assert sizes.rows == 32 or sizes.rows * problem.k * 2 <= 16 << 20
    assert sizing.candidates(problem)[0] == sizing.heuristic(problem)


def test_what_was_measured_overrides_the_heuristic(tmp_path: Any, monkeypatch: Any) -> None:
    problem = Problem(50, 4096, 4096, 8, 16)
    (tmp_path / "TPU v6 lite.json").write_text('{"rows64-k4096-n4096-w8-x16": [64, 512, 256, 256]}')
    monkeypatch.setattr(sizing, "TUNED", tmp_path)
    assert sizing.block_sizes(problem, "TPU v6 lite") == BlockSizes(64, 512, 256, 256)
    assert sizing.block_sizes(problem, "TPU v5 lite") == sizing.heuristic(problem)
    other = problem._replace(num_rows=65)
    assert sizing.block_sizes(other, "TPU v6 lite") == sizing.heuristic(other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.zeros((2, 64))}, "x must be"),
        ({"x": jnp.zeros((2, 65), jnp.bfloat16)}, "with K = 65"),
        ({"weights": jnp.zeros((1, 64, 8), jnp.int4)}, "weights must be int8"),
        ({"scales": jnp.ones((1, 2, 8))}, "scales must be"),
        ({"scales": jnp.ones((1, 1, 8), jnp.bfloat16)}, "scales must be"),
        ({"zeros": jnp.zeros((1, 1, 8), jnp.int8)}, "zeros need a group_size"),
        ({"group_size": 64}, "weights must be int4"),
        ({"weights": jnp.zeros((1, 64, 8), jnp.int4), "group_size": 48}, "one of 32, 64, 128"),
        ({"weights": jnp.zeros((1, 64, 8), jnp.int4), "group_size": 64, "int8_rows": True,
              "scales": jnp.ones((1, 1, 8), jnp.bfloat16)}, "int8_rows needs int8 weights"),
        ({"weights": jnp.zeros((1, 64, 8), jnp.int4), "group_size": 64,
              "zeros": jnp.zeros((1, 2, 8), jnp.int8),
              "scales": jnp.ones((1, 1, 8), jnp.bfloat16)}, "zeros must be"),
        ({"dtype": jnp.float16}, "dtype must be"),
        ({"implementation": "gpu"}, "unknown implementation"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {
        "x": jnp.zeros((2, 64), jnp.bfloat16), "weights": jnp.zeros((1, 64, 8), jnp.int8),
        "scales": jnp.ones((1, 1, 8)), "layer": 0,
    }  # fmt: skip
    assert quantized_matmul(**good).shape == (2, 8)
    with pytest.raises(ValueError, match=message):
        quantized_matmul(**(good | change))


def compiled(
    chip: str, num_rows: int, k: int, n: int, form: tuple[int | None, bool, bool]
) -> jax.stages.Compiled:
    group_size, zeros, int8_rows = form
    num_groups = 1 if group_size is None else -(-k // group_size)
    shape = jax.ShapeDtypeStruct
    shapes = [
        shape((num_rows, k), jnp.bfloat16),
        shape((2, k, n), jnp.int8 if group_size is None else jnp.int4),
        shape((2, num_groups, n), jnp.float32 if group_size is None else jnp.bfloat16),
        shape((), jnp.int32),
    ]
    if zeros:
        shapes.append(shape((2, num_groups, n), jnp.int8))

    def product(x: Any, weights: Any, scales: Any, layer: Any, zeros: Any = None) -> jax.Array:
        return quantized_matmul(
            x, weights, scales, layer, zeros=zeros, group_size=group_size, int8_rows=int8_rows,
            implementation="tpu",
        )  # fmt: skip

    return compile_for(chip, product, *shapes)


@needs_libtpu
@pytest.mark.parametrize("chip", ["v5e", "v6e", "v7x"])
@pytest.mark.parametrize(
    ("num_rows", "k", "n", "form"),
    [
        (64, 14336, 4096, (None, False, False)),
        (64, 14336, 4096, (128, False, False)),
        (5, 576, 49152, (32, True, False)),
        (3, 1536, 1000, (None, False, True)),
    ],
)
def test_compiles_and_copies_no_weights(
    chip: str, num_rows: int, k: int, n: int, form: tuple[int | None, bool, bool]
) -> None:
    if chip == "v7x" and form[2]:
        with pytest.raises(ValueError, match="no int8 rows"):
            compiled(chip, num_rows, k, n, form)
        return
    memory = compiled(chip, num_rows, k, n, form).memory_analysis()
    bits = 8 if form[0] is None else 4
    assert memory.temp_size_in_bytes <= 4 * num_rows * max(k, n) + (1 << 20)
    weights = 2 * k * n * bits // 8
    assert weights <= memory.argument_size_in_bytes <= 1.5 * weights + (1 << 20)  # not padded


@needs_libtpu
@pytest.mark.long
@pytest.mark.parametrize("chip", ["v5e", "v6e", "v7x"])
@pytest.mark.parametrize("form", [(None, False, False), (32, True, False)])
def test_compiles_for_many_rows(chip: str, form: tuple[int | None, bool, bool]) -> None:
    memory = compiled(chip, 2048, 4096, 4096, form).memory_analysis()
    assert memory.temp_size_in_bytes <= 1 << 20
