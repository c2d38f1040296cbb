"""The TPU kernel of ragged paged attention: in the TPU interpreter against the oracle, and through
TPU compilers."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from test_ragged_paged_attention import Case, add_sinks_and_scales
from tpu_topology import compile_for

from pallas_kernels.ragged_paged_attention import tpu
from pallas_kernels.ragged_paged_attention.api import ragged_paged_attention
from pallas_kernels.ragged_paged_attention.block_sizes import BlockSizes, block_sizes
from pallas_kernels.ragged_paged_attention.layout import decode_pool
from pallas_kernels.ragged_paged_attention.tpu_layout import (
    physical_shape,
    pool_layout,
    to_logical,
    to_physical,
    values_of,
    words_of,
)

SMALL = BlockSizes(  # several items a sequence, parts an item, units a part
    fetch_tokens=64,
    decode_tokens=32,
    decode_heads=1,
    prefill_tokens=32,
    query_tokens=8,
    unit_rows=16,
)
MIXED = [(1, 9), (1, 1), (5, 5), (3, 70), (1, 130), (17, 81)]
DECODES = [(1, 9), (1, 130), (1, 1), (1, 64)]
LONG = [(1, 130), (5, 200), (3, 70), (20, 260)]
FEW = [(1, 9), (8, 70), (1, 130), (2, 2)]


def run_kernel(
    case: Case,
    *,
    sizes: BlockSizes | None = SMALL,
    max_query_len: int | None = None,
    detect_races: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """What Case.run gives, of the kernel in the interpreter, whose unused memory is NaN."""
    interpret = pltpu.InterpretParams(detect_races=detect_races, uninitialized_memory="nan")
    options = {"scale": 0.25, **case.options}
    static = {name: options.pop(name) for name in ("scale", "soft_cap") if name in options}
    if isinstance(options.get("window"), int):
        static["window"] = options.pop("window")
    call = jax.jit(
        partial(
            tpu.ragged_paged_attention,
            interpret=interpret, sizes=sizes, max_query_len=max_query_len, **static,
        )
    )  # fmt: skip
    out, pool = call(
        case.q, case.k, case.v, to_physical(jnp.asarray(case.pool)), case.layer, case.seq_lens,
        case.block_tables, case.query_start, case.distribution, **options,
    )  # fmt: skip
    pool = np.asarray(decode_pool(to_logical(pool, case.head_dim)))
    if detect_races:
        assert not interpret_pallas_call.races.races_found
    return np.asarray(out).astype(np.float32), pool


def check(case: Case, **options: Any) -> None:
    """The kernel against the oracle: the pool to the bit, the output to the type's rounding."""
    out, pool = run_kernel(case, **options)
    expected_out, expected_pool = case.run("reference")
    np.testing.assert_array_equal(pool, expected_pool)
    tolerance = 2e-5 if case.dtype == "float32" else 2e-2
    np.testing.assert_allclose(out, expected_out, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
def test_the_layout_holds_each_element_once(head_dim: int) -> None:
    logical = (2, 3, 16, 2 * 3, head_dim)
    numbers = jnp.arange(math.prod(logical), dtype=jnp.int32).reshape(logical)
    physical = to_physical(numbers)
    assert physical.shape == physical_shape(2, 3, 16, 3, head_dim)
    assert physical.size == numbers.size
    assert physical.shape[-1] % 128 == 0  # no tile has a lane that is not used
    np.testing.assert_array_equal(to_logical(physical, head_dim), numbers)


def test_a_row_has_the_keys_of_its_tokens_and_then_their_values() -> None:
    pool = jnp.zeros((1, 1, 4, 2, 64), jnp.float32).at[0, 0, 3, 0, 5].set(1.0)
    assert np.argwhere(to_physical(pool)).tolist() == [[0, 0, 0, 1, 64 + 5]]
    pool = jnp.zeros((1, 1, 4, 2, 64), jnp.float32).at[0, 0, 2, 1, 5].set(1.0)
    assert np.argwhere(to_physical(pool)).tolist() == [[0, 0, 0, 1, 128 + 5]]


def test_blocks_that_are_no_whole_rows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"block_size 6 .* holds 4 tokens"):
        physical_shape(1, 1, 6, 1, 80)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_words_are_undone(dtype: Any) -> None:
    values = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 5)), dtype)
    np.testing.assert_array_equal(values_of(words_of(values, 1), dtype, 1), values)


def test_segments_of_new_tokens_are_written_down() -> None:
    # a decoding sequence of 20 tokens; 6 new ones of 10; blocks of 8, segments of 4
    seq_lens, query_start = jnp.array([20, 10, 0]), jnp.array([0, 1, 7, 7])
    tables = jnp.array([[5, 6, 7], [8, 9, 9], [0, 0, 0]])
    segments, count = tpu.write_segments(
        9, seq_lens, tables, query_start, jnp.array([1, 1, 2]), 8, 4, 1, single_only=False
    )
    assert count.tolist() == [1, 3]
    assert segments[:, :3].T.tolist() == [
        [7, 0, 0 - 3 + 4, 3, 4],  # token 19: the fourth of its segment
        [8, 4, 1 + 4, 0, 4],  # tokens 4 to 7
        [9, 0, 5 + 4, 0, 2],  # tokens 8 and 9
    ]


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # (of Case, of run_kernel)
    "mixed": ({"lens": MIXED, "head_dim": 128}, {"detect_races": True}),
    "mixed, several stretches of an item, window": (
        {"lens": LONG, "head_dim": 128, "options": {"window": 150}},
        {"sizes": SMALL._replace(prefill_tokens=16)},
    ),
    "mixed, items of five blocks": (
        {"lens": LONG, "num_kv_heads": 1, "head_dim": 128},
        {"sizes": SMALL._replace(fetch_tokens=80, prefill_tokens=32)},
    ),
    "decode bfloat16, own sizes, races": (
        {"lens": DECODES, "num_heads": 8, "num_kv_heads": 4, "head_dim": 128,
         "dtype": "bfloat16", "pool_dtype": "bfloat16"},
        {"sizes": None, "max_query_len": 1, "detect_races": True},
    ),
    "64, window, cap, sinks, scales": (
        {"lens": FEW, "num_heads": 9, "num_kv_heads": 3, "head_dim": 64,
         "options": {"window": 40, "soft_cap": 3.0}},
        {"max_query_len": 8},
    ),
    "80, window of few": (
        {"lens": FEW, "head_dim": 80, "options": {"window": np.int32(5)}}, {"max_query_len": 8},
    ),
    "96, int8, sinks, scales": (
        {"lens": DECODES, "num_heads": 6, "head_dim": 96, "block_size": 32, "dtype": "bfloat16",
         "pool_dtype": "int8"},
        {"max_query_len": 1},
    ),
    "256, float8, scales": (
        {"lens": DECODES, "num_kv_heads": 1, "head_dim": 256, "block_size": 32,
         "dtype": "bfloat16", "pool_dtype": "float8_e4m3fn"},
        {"max_query_len": 1},
    ),
    "one head, float8": (
        {"lens": DECODES, "num_kv_heads": 1, "head_dim": 128, "dtype": "bfloat16",
         "pool_dtype": "float8_e5m2"},
        {"max_query_len": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_equals_the_oracle(name: str) -> None:
    of_case, of_run = CASES[name]
    case = Case(**{"block_size": 16, **of_case})
    add_sinks_and_scales(case, "sinks" in name, "heads" if "scales" in name else "none")
    case.build()
    check(case, **of_run)


def test_a_sequence_reads_blocks_that_another_fills_in_the_same_call() -> None:
    case = Case(
        [(32, 32), (1, 33)], num_heads=2, num_kv_heads=1, head_dim=128, block_size=16,
        padding_tokens=0, padding_seqs=0,
    )  # fmt: skip
    case.build()
    case.block_tables[0, :2] = case.block_tables[1, :2]
    check(case)


@pytest.mark.long
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_random_ragged_batches_equal_the_oracle(data: st.DataObject) -> None:
    """Shapes stay the same, so that all examples run one program."""
    lens = data.draw(
        st.lists(st.tuples(st.integers(1, 12), st.integers(0, 60)), min_size=1, max_size=4)
    )
    case = Case([(n, n + old) for n, old in lens], num_heads=6, head_dim=64, block_size=16)
    case.seed = data.draw(st.integers(0, 2**16))
    case.padding_seqs = 4 - len(lens)
    case.padding_tokens = 48 - sum(n for n, _ in lens)
    case.options = {"window": np.int32(data.draw(st.sampled_from([0, 1, 20]))), "soft_cap": 3.0}
    add_sinks_and_scales(case, True, "heads")
    case.build()
    _pad_memory(case, num_blocks=24, max_blocks=6)
    out, pool = _RANDOM(
        case.q, case.k, case.v, to_physical(jnp.asarray(case.pool)), case.layer, case.seq_lens,
        case.block_tables, case.query_start, case.distribution,
        **{name: value for name, value in case.options.items() if name != "soft_cap"},
    )  # fmt: skip
    expected_out, expected_pool = case.run("reference")
    np.testing.assert_array_equal(to_logical(pool, 64), expected_pool)
    np.testing.assert_allclose(out, expected_out, atol=3e-5, rtol=3e-5)


_RANDOM = jax.jit(
    partial(
        tpu.ragged_paged_attention, scale=0.25, soft_cap=3.0, sizes=SMALL,
        interpret=pltpu.InterpretParams(uninitialized_memory="nan"),
    )
)  # fmt: skip


def _pad_memory(case: Case, num_blocks: int, max_blocks: int) -> None:
    """Gives a case's pool and block tables a fixed size."""
    more = num_blocks - case.pool.shape[1]
    case.pool = jnp.pad(
        case.pool, ((0, 0), (0, more), (0, 0), (0, 0), (0, 0)), constant_values=jnp.nan
    )
    more = max_blocks - case.block_tables.shape[1]
    case.block_tables = np.pad(case.block_tables, ((0, 0), (0, more)))


# ---- the API


def arguments(**change: Any) -> dict[str, Any]:
    shapes = {"q": (4, 4, 128), "k": (4, 2, 128), "v": (4, 2, 128)}
    given = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    numbers = {"seq_lens": 1, "query_start": 2, "distribution": 3}
    given |= {name: np.zeros(length, np.int32) for name, length in numbers.items()}
    pool = np.zeros(physical_shape(1, 3, 16, 2, 128), np.float32)
    tables = np.zeros((1, 2), np.int32)
    return {**given, "kv_pool": pool, "layer": 0, "block_tables": tables, "scale": 1.0, **change}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"implementation": "xla"}, r"is not \[L, N, B, 4, 128\], which 'xla' takes"),
        (
            {"implementation": "tpu", "kv_pool": np.zeros((1, 3, 16, 4, 128), np.float32)},
            r"'tpu': the pool .* is not \[L, N, 2, B / R, 256\]",
        ),
        (
            {"kv_pool": np.zeros(physical_shape(1, 3, 16, 2, 128), np.uint16)},
            "the pool must be one of float32, bfloat16",
        ),
        ({"kv_pool": np.zeros((1, 3, 16, 2, 128), np.float32)}, r"neither .* nor, for TPU"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ragged_paged_attention(**arguments(**change))


@pytest.mark.parametrize("num_kv_heads", [1, 3, 8, 32, 128])
@pytest.mark.parametrize("query_rows", [2, 4, 8, 16, 64])
def test_the_heuristic_always_answers(num_kv_heads: int, query_rows: int) -> None:
    for head_dim in (64, 80, 128, 256):
        layout = pool_layout(head_dim)
        token_bytes = 1024 * num_kv_heads * query_rows
        sizes = block_sizes(
            num_kv_heads, query_rows, layout.fold, layout.lanes * 2, token_bytes, "unknown"
        )
        assert sizes.query_tokens == 8 or sizes.query_tokens * token_bytes <= 28 << 20
        assert num_kv_heads % sizes.decode_heads == 0
        assert sizes.fetch_tokens * num_kv_heads * 4 * head_dim <= 32 << 20  # bytes of an item
        assert sizes.fetch_tokens % sizes.decode_tokens == 0
        assert sizes.fetch_tokens % sizes.prefill_tokens == 0


# ---- compilers

COMPILED: dict[str, tuple[int, int, int, int, str, int | None]] = {
    # H, K, D, B, the pool's type, max_query_len
    "decode of Llama 3 8B": (32, 8, 128, 32, "bfloat16", 1),
    "decode of SmolLM2, int8": (9, 3, 64, 16, "int8", 1),
    "one head a chip": (8, 1, 128, 16, "bfloat16", 1),
    "80": (4, 4, 80, 16, "bfloat16", 1),
    "96, float8": (8, 2, 96, 32, "float8_e4m3fn", 1),
    "256, float32": (4, 2, 256, 16, "float32", 1),
    "128 heads": (128, 128, 128, 16, "bfloat16", 1),
    "mixed of Llama 3 8B": (32, 8, 128, 32, "bfloat16", None),
    "mixed of 40 heads of 80": (40, 40, 80, 16, "bfloat16", None),  # large tiles do not fit
}
ON_ALL_CHIPS = (
    "decode of Llama 3 8B", "one head a chip", "96, float8", "mixed of 40 heads of 80",
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "chip"),
    [(name, "v5e") for name in COMPILED]
    + [(name, chip) for name in ON_ALL_CHIPS for chip in ("v6e", "v7x")],
)
def test_compiles_and_updates_the_pool_in_place(name: str, chip: str) -> None:
    num_heads, num_kv_heads, head_dim, block_size, pool_dtype, max_query_len = COMPILED[name]
    num_tokens, num_seqs, num_layers, num_blocks = 64, 64, 4, 256
    pool_shape = physical_shape(num_layers, num_blocks, block_size, num_kv_heads, head_dim)
    dtype = jnp.float32 if pool_dtype == "float32" else jnp.bfloat16
    new = jax.ShapeDtypeStruct((num_tokens, num_kv_heads, head_dim), dtype)
    shapes = [
        jax.ShapeDtypeStruct((num_tokens, num_heads, head_dim), dtype), new, new,
        jax.ShapeDtypeStruct(pool_shape, jnp.dtype(pool_dtype)),
        *(jax.ShapeDtypeStruct(shape, jnp.int32)
          for shape in ((), (num_seqs,), (num_seqs, 256), (num_seqs + 1,), (3,))),
    ]  # fmt: skip
    call = partial(ragged_paged_attention, scale=0.1, max_query_len=max_query_len)
    memory = compile_for(chip, call, *shapes, donate=3).memory_analysis()
    size = num_layers * num_blocks * block_size * 2 * num_kv_heads * head_dim
    assert memory.alias_size_in_bytes == size * jnp.dtype(pool_dtype).itemsize
    assert memory.temp_size_in_bytes < memory.alias_size_in_bytes // 2
