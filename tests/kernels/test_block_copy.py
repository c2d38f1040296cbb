"""Copies of blocks against numpy's assignment, and the programs for chips that are not there."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from tpu_topology import compile_for, needs_libtpu

from pallas_kernels.block_copy.api import IMPLEMENTATIONS, check_pairs, copy_blocks

NUM_BLOCKS, NUM_SOURCES = 30, 24


def random_pairs(rng: np.random.Generator, num_pairs: int, within_one_pool: bool) -> np.ndarray:
    """No block is written twice; within one pool even ones are read and odd ones written."""
    if within_one_pool:
        read = 2 * rng.integers(0, NUM_BLOCKS // 2, num_pairs)
        write = 2 * rng.permutation(NUM_BLOCKS // 2)[:num_pairs] + 1
    else:
        read, write = rng.integers(0, NUM_SOURCES, num_pairs), rng.permutation(NUM_BLOCKS)
    pairs = np.stack([read, write[:num_pairs]], axis=1).astype(np.int32)
    outside = rng.random(pairs.shape) < 0.1
    wrong = np.where(rng.random(pairs.shape) < 0.5, -1, NUM_BLOCKS + rng.integers(0, 9))
    return np.where(outside, wrong, pairs).astype(np.int32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=4, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    num_pairs=st.sampled_from([1, 11]),
    within_one_pool=st.booleans(),
    block=st.sampled_from([(4, 2, 8), (16, 128)]),
    dtype=st.sampled_from(["bfloat16", "int8"]),
    seed=st.integers(0, 2**16),
)
def test_equals_assignment(
    implementation: str, num_pairs: int, within_one_pool: bool, block: tuple[int, ...], dtype: str,
    seed: int,
) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)
    pool = rng.integers(-99, 99, (2, NUM_BLOCKS, *block)).astype(jnp.dtype(dtype))
    source = rng.integers(-99, 99, (2, NUM_SOURCES, *block)).astype(jnp.dtype(dtype))
    pairs = random_pairs(rng, num_pairs, within_one_pool)
    copy = partial(copy_blocks, implementation=implementation)
    operands = (pool, pairs) if within_one_pool else (pool, pairs, source)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        out = jax.jit(copy)(*operands)
    source = pool.copy() if within_one_pool else source
    for read, write in pairs:
        if 0 <= read < source.shape[1] and 0 <= write < NUM_BLOCKS:
            pool[:, write] = source[:, read]
    np.testing.assert_array_equal(np.asarray(out), pool)


def test_pairs_that_get_into_each_others_way_are_found() -> None:
    check_pairs(np.array([[0, 1], [0, 2], [-1, 0], [1, -1]]), within_one_pool=True)
    with pytest.raises(ValueError, match=r"blocks \[1\] would be read and written"):
        check_pairs(np.array([[0, 1], [1, 2]]), within_one_pool=True)
    check_pairs(np.array([[0, 1], [1, 2]]), within_one_pool=False)
    with pytest.raises(ValueError, match=r"blocks \[7\] would be written twice"):
        check_pairs(np.array([[0, 7], [1, 7]]), within_one_pool=False)


def test_what_does_not_fit_is_refused() -> None:
    pool, pairs = jnp.zeros((1, 4, 8, 8)), jnp.zeros((1, 2), jnp.int32)
    with pytest.raises(ValueError, match="pool must be"):
        copy_blocks(pool[0], pairs)
    with pytest.raises(ValueError, match="pairs must be"):
        copy_blocks(pool, pairs.astype(jnp.int8))
    with pytest.raises(ValueError, match="differ in more than"):
        copy_blocks(pool, pairs, jnp.zeros((1, 4, 8, 9)))
    with pytest.raises(ValueError, match="unknown implementation"):
        copy_blocks(pool, pairs, implementation="gpu")


@needs_libtpu
@pytest.mark.parametrize("chip", ["v5e", "v6e", "v7x"])
@pytest.mark.parametrize("block", [(16, 16, 128), (8, 8, 256)])
def test_compiles_in_place(chip: str, block: tuple[int, ...]) -> None:
    pool = jax.ShapeDtypeStruct((4, 512, *block), jnp.bfloat16)
    pairs = jax.ShapeDtypeStruct((64, 2), jnp.int32)
    for operands in ((pool, pairs), (pool, pairs, pool)):
        copy = partial(copy_blocks, implementation="tpu")
        memory = compile_for(chip, copy, *operands, donate=0).memory_analysis()
        assert memory.alias_size_in_bytes == np.prod(pool.shape) * 2
        assert memory.temp_size_in_bytes < 1 << 16
