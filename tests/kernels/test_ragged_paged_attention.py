"""Ragged paged attention: the oracle against jax's attention, implementations against it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cpu_variants import each_variant
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import native
from pallas_kernels.ragged_paged_attention.api import ragged_paged_attention
from pallas_kernels.ragged_paged_attention.layout import decode_pool, encode_pool

IMPLEMENTATIONS = ("xla", "reference")  # those that compute in float32
POOL_DTYPES = ("float32", "bfloat16", "uint16", "int8", "float8_e4m3fn", "float8_e5m2")


@dataclass
class Case:
    """A random ragged batch whose unused memory is NaN and whose blocks lie in random order."""

    lens: list[tuple[int, int]]  # (query tokens, tokens in all) of each sequence
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    block_size: int = 4
    num_layers: int = 2
    layer: int = 1
    padding_tokens: int = 3
    padding_seqs: int = 2
    pool_dtype: str = "float32"
    dtype: str = "float32"  # of queries, keys and values
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def build(self) -> None:
        rng = np.random.default_rng(self.seed)
        # Decoding sequences come first in a batch.
        self.lens = sorted(self.lens, key=lambda pair: pair[0] != 1)
        num_real = sum(n for n, _ in self.lens)
        num_tokens = num_real + self.padding_tokens
        num_seqs = len(self.lens) + self.padding_seqs
        needed = [-(-total // self.block_size) for _, total in self.lens]
        max_blocks = max(needed) + 1
        num_blocks = sum(needed) + 3
        order = rng.permutation(num_blocks)
        self.q, self.k, self.v = (
            rng.normal(size=(num_tokens, heads, self.head_dim)).astype(jnp.dtype(self.dtype))
            for heads in (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        )
        shape = (
            self.num_layers, num_blocks, self.block_size, 2 * self.num_kv_heads, self.head_dim,
        )  # fmt: skip
        dtype = jnp.dtype(self.pool_dtype)
        old = jnp.asarray(rng.normal(size=shape), jnp.float32)
        has_nan = not jnp.issubdtype(dtype, jnp.integer) or dtype == jnp.uint16
        used = np.zeros((num_blocks, self.block_size), bool)
        self.block_tables = rng.integers(0, num_blocks, (num_seqs, max_blocks)).astype(np.int32)
        first = 0
        for s, (num_query, total) in enumerate(self.lens):
            blocks = order[first : first + needed[s]]
            first += needed[s]
            self.block_tables[s, : needed[s]] = blocks
            for position in range(total - num_query):
                used[blocks[position // self.block_size], position % self.block_size] = True
        if has_nan:
            old = jnp.where(used[None, :, :, None, None], old, jnp.nan)
        self.pool = encode_pool(old, dtype)
        if dtype != jnp.uint16 and has_nan:
            self.pool = jnp.where(used[None, :, :, None, None], self.pool, jnp.nan).astype(dtype)
        self.seq_lens = np.zeros(num_seqs, np.int32)
        self.seq_lens[: len(self.lens)] = [total for _, total in self.lens]
        ends = np.cumsum([0] + [n for n, _ in self.lens] + [0] * self.padding_seqs)
        self.query_start = ends.astype(np.int32)
        num_decodes = sum(n == 1 for n, _ in self.lens)
        self.distribution = np.array([num_decodes, num_decodes, len(self.lens)], np.int32)

    def run(self, implementation: str) -> tuple[np.ndarray, np.ndarray]:
        call = jax.jit(
            ragged_paged_attention,
            static_argnames=("implementation", "scale", "soft_cap", "max_query_len"),
        )
        out, pool = call(
            self.q, self.k, self.v, self.pool, self.layer, self.seq_lens, self.block_tables,
            self.query_start, self.distribution,
            **{"scale": 0.25, "implementation": implementation, **self.options},
        )  # fmt: skip
        return np.asarray(out).astype(np.float32), np.asarray(decode_pool(pool))


def dense_attention(case: Case) -> np.ndarray:
    """The same batch through jax.nn.dot_product_attention, one sequence at a time."""
    out = np.zeros_like(case.q)
    pool = np.asarray(decode_pool(case.pool))[case.layer]  # [N, B, 2K, D]
    for s, (num_query, total) in enumerate(case.lens):
        rows = slice(case.query_start[s], case.query_start[s + 1])
        blocks = case.block_tables[s, : -(-total // case.block_size)]
        context = pool[blocks].reshape(-1, case.num_kv_heads, 2, case.head_dim)[:total].copy()
        context[total - num_query :, :, 0] = case.k[rows]
        context[total - num_query :, :, 1] = case.v[rows]
        position = np.arange(total - num_query, total)[:, None]
        mask = np.arange(total) <= position
        if window := case.options.get("window", 0):
            mask &= np.arange(total) > position - window
        out[rows] = jax.nn.dot_product_attention(
            case.q[rows][None], context[None, :, :, 0], context[None, :, :, 1],
            scale=case.options.get("scale", 0.25), mask=jnp.asarray(mask[None, None]),
        )[0]  # fmt: skip
    return out


MIXED = [(1, 9), (1, 1), (5, 5), (3, 14), (1, 30), (17, 21)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("window", [0, 1, 6])
def test_equals_jax_attention(implementation: str, window: int) -> None:
    case = Case(MIXED, options={"window": window})
    case.build()
    out, _ = case.run(implementation)
    np.testing.assert_allclose(out, dense_attention(case), atol=2e-5)


def test_soft_cap_and_sinks_of_the_oracle_follow_the_formula() -> None:
    case = Case([(1, 3)], num_heads=1, num_kv_heads=1, block_size=4, padding_tokens=0)
    case.options = {"soft_cap": 2.0, "sinks": np.array([0.7], np.float32)}
    case.build()
    pool = np.asarray(case.pool)[1, case.block_tables[0, 0]]  # [B, 2, D]
    keys = np.concatenate([pool[:2, 0], case.k[0]])
    values = np.concatenate([pool[:2, 1], case.v[0]])
    logits = 2.0 * np.tanh(0.25 * keys @ case.q[0, 0] / 2.0)
    weights = np.exp(logits) / (np.exp(logits).sum() + np.exp(0.7))
    out, _ = case.run("reference")
    np.testing.assert_allclose(out[0, 0], weights @ values, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_new_tokens_are_written_and_nothing_else_changes(implementation: str) -> None:
    case = Case(MIXED)
    case.build()
    expected = np.asarray(case.pool).copy()
    for s, (num_query, total) in enumerate(case.lens):
        for i, position in enumerate(range(total - num_query, total)):
            block = case.block_tables[s, position // 4]
            row = case.query_start[s] + i
            expected[1, block, position % 4, 0::2] = case.k[row]
            expected[1, block, position % 4, 1::2] = case.v[row]
    np.testing.assert_array_equal(case.run(implementation)[1], expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_padding_rows_give_zero(implementation: str) -> None:
    case = Case(MIXED, padding_tokens=5)
    case.build()
    assert not case.run(implementation)[0][-5:].any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_sequence_reads_blocks_that_another_fills_in_the_same_call(implementation: str) -> None:
    case = Case([(8, 8), (1, 9)], padding_tokens=0, padding_seqs=0)
    case.build()  # sorted: row 0 is the decoding sequence of 9 tokens
    case.block_tables[0, :2] = case.block_tables[1, :2]
    out, _ = case.run(implementation)
    alone = Case([(9, 9)], padding_tokens=0, padding_seqs=0)
    alone.build()
    order = [*range(1, 9), 0]
    alone.q, alone.k, alone.v = case.q[order], case.k[order], case.v[order]
    np.testing.assert_allclose(out[0], alone.run("reference")[0][-1], atol=2e-5)


def test_decode_only_promise_gives_the_same() -> None:
    case = Case([(1, 9), (1, 1), (1, 30)])
    case.build()
    expected, _ = case.run("xla")
    case.options["max_query_len"] = 1
    np.testing.assert_array_equal(case.run("xla")[0], expected)


RAGGED = {
    "lens": st.lists(
        st.tuples(st.integers(1, 12), st.integers(0, 40)).map(lambda p: (p[0], p[0] + p[1])),
        min_size=1, max_size=6,
    ),
    "heads": st.sampled_from([(1, 1), (4, 1), (4, 2), (3, 3), (9, 3)]),
    "block_size": st.sampled_from([1, 4, 16]),
    "window": st.sampled_from([0, 5]),
    "soft_cap": st.sampled_from([None, 3.0]),
    "sinks": st.booleans(),
    "seed": st.integers(0, 2**16),
}  # fmt: skip


@settings(max_examples=20, deadline=None)
@given(
    **RAGGED,
    head_dim=st.sampled_from([8, 64]),
    pool_dtype=st.sampled_from(POOL_DTYPES),
    scales=st.sampled_from(["none", "scalar", "heads"]),
)
def test_xla_equals_the_oracle(
    heads: tuple[int, int], pool_dtype: str, window: int, soft_cap: float | None, sinks: bool,
    scales: str, seed: int, **shape: Any,
) -> None:  # fmt: skip
    case = Case(
        num_heads=heads[0], num_kv_heads=heads[1], pool_dtype=pool_dtype, seed=seed, **shape
    )
    case.options = {"window": window, "soft_cap": soft_cap}
    add_sinks_and_scales(case, sinks, "heads" if pool_dtype == "int8" else scales)
    case.build()
    (out, pool), (expected_out, expected_pool) = case.run("xla"), case.run("reference")
    np.testing.assert_array_equal(pool, expected_pool)
    np.testing.assert_allclose(out, expected_out, atol=3e-5, rtol=3e-5)


def add_sinks_and_scales(case: Case, sinks: bool, scales: str) -> None:
    rng = np.random.default_rng(case.seed)
    if sinks:
        case.options["sinks"] = rng.normal(size=case.num_heads).astype(np.float32)
    if scales != "none":
        shape = () if scales == "scalar" else (case.num_kv_heads,)
        case.options["k_scale"] = np.asarray(0.02 + 0.03 * rng.random(shape), np.float32)
        case.options["v_scale"] = np.asarray(0.02 + 0.03 * rng.random(shape), np.float32)


needs_native = pytest.mark.skipif(not native.is_available(), reason="the kernels were not built")


def assert_every_variant_equals_the_oracle(case: Case) -> None:
    expected_out, expected_pool = case.run("reference")
    for name in each_variant():
        out, pool = case.run("cpu")
        np.testing.assert_array_equal(pool, expected_pool, name)
        # rtol: bfloat16's last place
        np.testing.assert_allclose(out, expected_out, atol=1e-6, rtol=1e-2, err_msg=name)


@needs_native
@settings(max_examples=20, deadline=None)
@given(
    **RAGGED,
    head_dim=st.sampled_from([2, 8, 64, 80, 96, 128, 256]),
    scales=st.sampled_from(["none", "scalar", "heads"]),
)
def test_cpu_kernel_equals_the_oracle(
    heads: tuple[int, int], window: int, soft_cap: float | None, sinks: bool, scales: str,
    seed: int, **shape: Any,
) -> None:  # fmt: skip
    case = Case(
        num_heads=heads[0], num_kv_heads=heads[1], seed=seed, pool_dtype="uint16",
        dtype="bfloat16", **shape,
    )  # fmt: skip
    case.options = {"window": window, "soft_cap": soft_cap}
    add_sinks_and_scales(case, sinks, scales)
    case.build()
    assert_every_variant_equals_the_oracle(case)


@needs_native
def test_cpu_kernel_over_many_chunks_and_tiles() -> None:
    case = Case([(1, 700), (300, 300), (130, 517)], 9, 3, head_dim=64, block_size=16)
    case.pool_dtype, case.dtype = "uint16", "bfloat16"
    case.build()
    assert_every_variant_equals_the_oracle(case)


@needs_native
def test_cpu_kernel_updates_the_pool_in_place() -> None:
    case = Case(MIXED, pool_dtype="uint16", dtype="bfloat16")
    case.build()

    def step(pool: jax.Array) -> jax.Array:
        return ragged_paged_attention(
            case.q, case.k, case.v, pool, 0, case.seq_lens, case.block_tables, case.query_start,
            case.distribution, scale=1.0,
        )[1]  # fmt: skip

    compiled = jax.jit(step, donate_argnums=0).lower(case.pool).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < case.pool.nbytes


def test_cpu_kernel_refuses_what_it_does_not_support() -> None:
    case = Case(MIXED)
    case.build()
    with pytest.raises(ValueError, match="'cpu' needs the built kernels, bfloat16 queries"):
        case.run("cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": np.zeros((4, 3, 16), np.float32)}, "do not fit q"),
        ({"q": np.zeros((4, 5, 16), np.float32)}, "not a multiple"),
        ({"seq_lens": np.zeros(1, np.int64)}, "int32"),
        ({"block_tables": np.zeros((7, 2), np.int32)}, "block_tables"),
        ({"soft_cap": -1.0}, "soft_cap must be positive"),
        ({"sinks": np.zeros(3, np.float32)}, "sinks"),
        ({"implementation": "magic"}, "unknown implementation"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "q": np.zeros((4, 4, 16), np.float32),
        "k": np.zeros((4, 2, 16), np.float32),
        "v": np.zeros((4, 2, 16), np.float32),
        "kv_pool": np.zeros((1, 3, 4, 4, 16), np.float32),
        "layer": 0,
        "seq_lens": np.zeros(1, np.int32),
        "block_tables": np.zeros((1, 2), np.int32),
        "query_start": np.zeros(2, np.int32),
        "distribution": np.zeros(3, np.int32),
        "scale": 1.0,
    }
    if "k" in change:
        change = {**change, "v": np.zeros((4, 2, 16), np.float32)}
    with pytest.raises(ValueError, match=message):
        ragged_paged_attention(**{**arguments, **change})
