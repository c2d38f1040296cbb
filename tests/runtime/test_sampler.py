"""The sampler against numpy formulas, and its draws against chi-squared."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.random import threefry_2x32
from sampling_reference import changed_logits, log_softmax, probabilities
from scipy import stats

from jaxllm.engine.batch import IN_PROMPT, INT_FIELDS, IS_STOP
from jaxllm.engine.request_state import token_logprobs
from jaxllm.engine.sequence import LogprobRows
from jaxllm.runtime import sampler
from jaxllm.runtime.sampler import SamplingInputs
from jaxllm.sampling_params import MAX_LOGPROBS

DEFAULTS = {"top_p": 1.0, "repetition_penalty": 1.0}

sample = jax.jit(sampler.sample)
token_weights = jax.jit(sampler.token_weights)
apply_table = jax.jit(sampler.apply_table)
threefry = jax.jit(sampler._threefry)


def inputs_of(rows: list[dict[str, Any]]) -> SamplingInputs:
    def column(name: str) -> jax.Array:
        values = [row.get(name, DEFAULTS.get(name, 0)) for row in rows]
        return jnp.asarray(values, jnp.int32 if name in INT_FIELDS else jnp.float32)

    return SamplingInputs(*map(column, SamplingInputs._fields))


def same_for_all(num_rows: int, **options: Any) -> SamplingInputs:
    return inputs_of([options] * num_rows)


def draw_tokens(
    logits: np.ndarray, inputs: SamplingInputs, info: Any = None, bias: Any = None
) -> np.ndarray:
    """Row i of at most 64 reads row i of the table; a table that is not given is empty."""
    num_rows, vocab_size = logits.shape
    num_slots = min(num_rows, 64)
    info = np.zeros((num_slots, vocab_size), np.int32) if info is None else info
    bias = np.zeros((num_slots, vocab_size), np.float32) if bias is None else bias
    slots = (np.arange(num_rows) % num_slots).astype(np.int32)
    return np.asarray(sample(logits.astype(np.float32), inputs, info, bias, slots))


def filtered(logits: list[float], **options: Any) -> list[float]:
    """The distribution of one row."""
    options = {"temperature": 1.0, **options}
    weights = np.asarray(
        token_weights(np.asarray([logits], np.float32), same_for_all(1, **options))
    )
    return (weights[0] / weights[0].sum()).tolist()


# ---- filters

LOGITS = np.log([0.4, 0.3, 0.2, 0.1]).tolist()


def test_temperature_sharpens() -> None:
    expected = np.array([16, 9, 4, 1]) / 30
    np.testing.assert_allclose(filtered(LOGITS, temperature=0.5), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.4, 0.3, 0.2, 0.1]),
        ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_k": 1}, [1, 0, 0, 0]),
        ({"top_k": 4}, [0.4, 0.3, 0.2, 0.1]),
        ({"top_k": 2**31 - 1}, [0.4, 0.3, 0.2, 0.1]),
        ({"top_p": 0.39}, [1, 0, 0, 0]),
        ({"top_p": 0.41}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_p": 1e-30}, [1, 0, 0, 0]),
        ({"min_p": 0.45}, [4 / 9, 3 / 9, 2 / 9, 0]),
        ({"min_p": 1.0}, [1, 0, 0, 0]),
        # 0.4 / 0.9 = 0.44 alone would reach 0.43; without renormalising, 0.4 would not.
        ({"min_p": 0.45, "top_p": 0.43}, [1, 0, 0, 0]),
        # 4/7 reaches 0.55 after top_k; of all four, 0.4 would not.
        ({"top_k": 2, "top_p": 0.55}, [1, 0, 0, 0]),
        ({"min_p": 0.6, "top_k": 3, "top_p": 0.99}, [4 / 7, 3 / 7, 0, 0]),
    ],
)
def test_filters_by_hand(options: dict[str, Any], expected: list[float]) -> None:
    np.testing.assert_allclose(filtered(LOGITS, **options), expected, rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"top_k": 2}, [0.5, 0.25, 0.25, 0]),  # two tie for the second place
        ({"top_p": 0.5}, [0.5, 0.25, 0.25, 0]),
        ({"min_p": 0.5}, [0.5, 0.25, 0.25, 0]),
    ],
)
def test_ties_at_the_border_are_kept(options: dict[str, Any], expected: list[float]) -> None:
    logits = [np.log(2), 0.0, -0.0, -2.0]
    options = {"temperature": 1.0, **options}
    np.testing.assert_allclose(filtered(logits, **options), expected, rtol=1e-6)


def test_signed_zeros_are_the_same_logit() -> None:
    np.testing.assert_allclose(filtered([-0.0, 0.0, -0.0, -1.0], top_k=1), [1 / 3] * 3 + [0])


@pytest.mark.parametrize("vocab_size", [1, 128, 1000, 49152])
def test_filters_at_vocabulary_sizes(vocab_size: int) -> None:
    rng = np.random.default_rng(vocab_size)
    logits = (rng.normal(size=(4, vocab_size)) * 3).astype(np.float32)
    rows: list[dict[str, Any]] = [
        {"temperature": 0.7, "top_k": 50},
        {"temperature": 1.3, "top_p": 0.9},
        {"temperature": 1.0, "min_p": 0.02, "top_k": 30, "top_p": 0.8},
        {"temperature": 2.0},
    ]
    weights = np.asarray(token_weights(logits, inputs_of(rows)))
    for row, options in enumerate(rows):
        expected = probabilities(logits[row], **options)
        actual = weights[row] / weights[row].sum()
        np.testing.assert_allclose(actual, expected, rtol=2e-4, atol=1e-12)


VOCAB = 37
ROWS = 6

shapes = st.sampled_from(["normal", "peaked", "flat", "tied", "holes", "huge"])
options_of_row = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 1e-5, 1e-3, 0.3, 1.0, 2.0]),
        "top_k": st.sampled_from([0, 1, 2, 5, 36, 37, 38, 10**9]),
        "top_p": st.sampled_from([1e-9, 0.1, 0.5, 0.9, 0.999, 1.0]),
        "min_p": st.sampled_from([0.0, 1e-6, 0.05, 0.5, 1.0]),
    }
)


def random_logits(shape: str, rng: np.random.Generator) -> np.ndarray:
    logits = rng.normal(size=VOCAB)
    match shape:
        case "peaked":
            logits[rng.integers(VOCAB)] += 30
        case "flat":
            logits[:] = 1.25
        case "tied":
            logits = rng.integers(0, 3, VOCAB).astype(float)
        case "holes":
            logits[rng.permutation(VOCAB)[: rng.integers(1, VOCAB)]] = -np.inf
        case "huge":
            logits = rng.uniform(-1e4, 1e4, VOCAB)
    return logits.astype(np.float32)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.tuples(shapes, options_of_row), min_size=ROWS, max_size=ROWS),
    seed=st.integers(0, 2**32),
)
def test_any_mixture_of_rows(rows: list[tuple[str, dict[str, Any]]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = np.stack([random_logits(shape, rng) for shape, _ in rows])
    inputs = inputs_of([options for _, options in rows])
    tokens = draw_tokens(logits, inputs._replace(seed_low=jnp.full(ROWS, seed % 1000)))
    weights = np.asarray(token_weights(logits, inputs))
    for row, (_, options) in enumerate(rows):
        if options["temperature"] == 0:
            assert tokens[row] == np.argmax(logits[row])
        else:
            assert weights[row, tokens[row]] > 0
            check_row(logits[row], weights[row], options)


def check_row(logits: np.ndarray, weights: np.ndarray, options: dict[str, Any]) -> None:
    """The row's distribution is the formula's, but for tokens so near a border that float32
    cannot tell: those of options a little stricter are in, those of a little laxer alone are."""
    scaled = (logits / np.float32(options["temperature"])).astype(np.float64)
    options = {**options, "temperature": 1.0}
    nudge = 1e-5
    strict = {**options, "top_p": options["top_p"] * (1 - nudge)}
    strict["min_p"] = min(1.0, options["min_p"] * (1 + nudge))
    lax = {**options, "min_p": options["min_p"] * (1 - nudge)}
    lax["top_p"] = min(1.0, options["top_p"] * (1 + nudge))
    kept = weights > 0
    best = scaled.max()
    tiny = scaled - best < -80  # exp underflows in float32
    spacing = np.spacing(np.float32(np.abs(best)))  # of distances from the best
    lowest_allowed = scaled[probabilities(scaled, **lax) > 0].min() - 2 * spacing
    assert kept[(probabilities(scaled, **strict) > 0) & ~tiny].all()
    assert not kept[scaled < lowest_allowed].any()
    expected = np.where(kept, np.exp(scaled - best), 0.0)
    np.testing.assert_allclose(weights, expected, rtol=1e-5 + 4 * spacing, atol=1e-30)


# ---- penalties, bias, bans


@settings(max_examples=25, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_table_options(data: st.DataObject, seed: int) -> None:
    rng = np.random.default_rng(seed)
    ids = st.lists(st.integers(0, VOCAB - 1), max_size=8)
    logits = np.stack([random_logits("normal", rng) * 4 for _ in range(ROWS)])
    info = np.zeros((ROWS, VOCAB), np.int32)
    bias = np.zeros((ROWS, VOCAB), np.float32)
    rows: list[dict[str, Any]] = []
    expected = []
    for row in range(ROWS):
        prompt, output, stops, banned = (data.draw(ids) for _ in range(4))
        options = {
            "repetition_penalty": data.draw(st.sampled_from([0.01, 0.8, 1.0, 1.3, 50.0])),
            "presence_penalty": data.draw(st.sampled_from([-2.0, 0.0, 0.5])),
            "frequency_penalty": data.draw(st.sampled_from([-1.0, 0.0, 2.0])),
            "min_tokens": data.draw(st.integers(0, 9)),
        }
        added = {token: float(rng.uniform(-100, 100)) for token in data.draw(ids)}
        expected.append(
            changed_logits(logits[row], prompt=prompt, output=output, stops=stops,
                           banned=banned, logit_bias=added, **options)
        )  # fmt: skip
        for token, value in added.items():
            bias[row, token] = value
        bias[row, banned] = -np.inf
        np.add.at(info[row], output, 1)
        info[row, prompt] |= IN_PROMPT
        info[row, stops] |= IS_STOP
        rows.append({**options, "output_lens": len(output), "uses_table": 1})
    actual = apply_table(logits, inputs_of(rows), info, bias)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-4)


def test_only_rows_that_ask_use_their_slots_table() -> None:
    logits = np.array([[3.0, 2.0, 1.0]] * 3)
    bias = np.array([[-np.inf, 0, 0], [-np.inf, -np.inf, 0]], np.float32)
    inputs = inputs_of([{"uses_table": 1}, {}, {"uses_table": 1}])
    slots = np.array([1, 0, 0], np.int32)
    tokens = sample(logits.astype(np.float32), inputs, np.zeros((2, 3), np.int32), bias, slots)
    assert tokens.tolist() == [2, 0, 1]


def test_table_comes_before_filters() -> None:
    # Token 0 is banned, so top_k = 1 is left with token 1; were it filtered first, nothing would.
    logits = np.tile(np.linspace(9, -9, 300), (8, 1))
    bias = np.zeros((8, 300), np.float32)
    bias[:, 0] = -np.inf
    inputs = same_for_all(8, temperature=2.0, top_k=1, uses_table=1)
    assert (draw_tokens(logits, inputs, bias=bias) == 1).all()


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"temperature": 2.0}, {"temperature": 1.0, "top_p": 0.01}]
)
def test_the_only_allowed_token_is_taken(options: dict[str, Any]) -> None:
    rng = np.random.default_rng(5)
    logits = rng.uniform(-1e4, 1e4, (8, 300))
    allowed = rng.integers(0, 300, 8)
    bias = np.full((8, 300), -np.inf, np.float32)
    bias[np.arange(8), allowed] = 0
    inputs = same_for_all(8, **options, top_k=7, min_p=0.5, uses_table=1)
    np.testing.assert_array_equal(draw_tokens(logits, inputs, bias=bias), allowed)


def test_a_penalty_that_overflows_leaves_the_best_token() -> None:
    logits = np.tile(np.linspace(1, 30, 300), (8, 1))
    info = np.zeros((8, 300), np.int32)
    info[:, 299] = IN_PROMPT
    options = {"repetition_penalty": 1e-38, "temperature": 1.0, "uses_table": 1}
    assert (draw_tokens(logits, same_for_all(8, **options), info) == 299).all()


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_logits_without_any_number_still_give_a_token_of_the_vocabulary(value: float) -> None:
    logits = np.full((8, 300), value)
    for options in ({"temperature": 0.0}, {"temperature": 1.0, "top_k": 5, "top_p": 0.5}):
        tokens = draw_tokens(logits, same_for_all(8, **options))
        assert ((tokens >= 0) & (tokens < 300)).all()


def test_count_tokens_counts_where_asked() -> None:
    info = np.array([[0, 5, 0], [1, 0, IN_PROMPT]], np.int32)
    count = jax.jit(sampler.count_tokens, donate_argnums=0)
    slots, tokens = np.array([1, 0, 2]), np.array([2, 1, 0])
    result = count(jnp.asarray(info), slots, tokens, np.array([True, False, True]))
    assert result.tolist() == [[0, 5, 0], [1, 0, IN_PROMPT + 1]]


def test_count_tokens_updates_a_donated_table_in_place() -> None:
    info = jax.ShapeDtypeStruct((64, 49152), jnp.int32)
    row = jax.ShapeDtypeStruct((64,), jnp.int32)
    counted = jax.ShapeDtypeStruct((64,), jnp.bool_)
    count = jax.jit(sampler.count_tokens, donate_argnums=0)
    analysis = count.lower(info, row, row, counted).compile().memory_analysis()
    assert analysis.alias_size_in_bytes == 64 * 49152 * 4
    assert analysis.temp_size_in_bytes < 100_000


# ---- drawing

NUM_DRAWS = 20_000
P_VALUE = 1e-4


def draws(logits: np.ndarray, **options: Any) -> np.ndarray:
    """NUM_DRAWS tokens of one row of logits, by seed and position."""
    index = np.arange(NUM_DRAWS, dtype=np.int32)
    inputs = same_for_all(NUM_DRAWS, **options)
    inputs = inputs._replace(
        seed_low=jnp.asarray(index // 100), output_lens=jnp.asarray(index % 100)
    )
    return draw_tokens(np.broadcast_to(logits, (NUM_DRAWS, len(logits))), inputs)


def assert_drawn_from(tokens: np.ndarray, expected: np.ndarray) -> None:
    counts = np.bincount(tokens, minlength=len(expected))
    assert (counts[expected == 0] == 0).all()
    order = np.argsort(expected)
    order = order[expected[order] > 0]
    # The rarest together until each cell expects five.
    split = int(np.searchsorted(np.cumsum(expected[order]) * len(tokens), 5.0)) + 1
    split = max(split, int(np.searchsorted(expected[order] * len(tokens), 5.0)))
    observed = [counts[order[:split]].sum(), *counts[order[split:]]]
    wanted = [expected[order[:split]].sum(), *expected[order[split:]]]
    wanted = np.array(wanted) / sum(wanted) * len(tokens)
    assert len(wanted) > 1
    assert stats.chisquare(observed, wanted).pvalue > P_VALUE


ALL_FILTERS = {"temperature": 1.5, "min_p": 0.01, "top_k": 25, "top_p": 0.95}


@pytest.mark.parametrize(
    ("vocab_size", "options"),
    [
        (40, {"temperature": 1.0}),
        (40, {"temperature": 0.4}),
        (40, {"temperature": 2.0}),
        (40, {"temperature": 1.0, "top_k": 7}),
        (40, {"temperature": 1.0, "top_p": 0.8}),
        (40, {"temperature": 1.0, "min_p": 0.1}),
        (40, ALL_FILTERS),
        (300, {"temperature": 1.0}),
        (300, ALL_FILTERS),
    ],
    ids=str,
)
def test_draws_follow_the_distribution(vocab_size: int, options: dict[str, Any]) -> None:
    logits = np.random.default_rng(vocab_size).normal(size=vocab_size) * 1.5
    expected = probabilities(logits.astype(np.float32), **options)
    assert_drawn_from(draws(logits, **options), expected)


def test_a_flat_distribution_reaches_every_token() -> None:
    assert_drawn_from(draws(np.zeros(40), temperature=1.0), np.full(40, 1 / 40))


def test_threefry_is_that_of_jax() -> None:
    words = np.random.default_rng(0).integers(0, 2**32, (3, 50), dtype=np.uint32)
    words[:, :2] = [[0, 2**32 - 1]] * 3
    for high, low, counter in words.T:
        expected = threefry_2x32((high, low), np.array([counter, 0], np.uint32))
        np.testing.assert_array_equal(threefry(high, low, counter), expected)


def test_successive_positions_and_seeds_are_independent() -> None:
    tokens = draws(np.zeros(40), temperature=1.0).reshape(200, 100) // 8  # [seed, position], 5 bins
    for pairs in (
        (tokens[:, :-1], tokens[:, 1:]),  # neighbouring positions
        (tokens[:-1], tokens[1:]),  # neighbouring seeds: the n answers of a request
    ):
        table = np.zeros((5, 5))
        np.add.at(table, tuple(p.ravel() for p in pairs), 1)
        assert stats.chi2_contingency(table).pvalue > P_VALUE


def test_the_high_half_of_a_seed_counts() -> None:
    inputs = same_for_all(64, temperature=1.0)
    low = draw_tokens(np.zeros((64, 300)), inputs._replace(seed_low=jnp.arange(64)))
    high = draw_tokens(np.zeros((64, 300)), inputs._replace(seed_high=jnp.arange(64)))
    assert (low != high).mean() > 0.9
    assert len(set(high.tolist())) > 40


@pytest.mark.parametrize("num_rows", [5, 8, 16])
def test_a_row_does_not_depend_on_its_batch(num_rows: int) -> None:
    """Tiled (multiples of 8) or not, in any row, among rows with any options."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(64, 300)).astype(np.float32)
    rows = [
        {"temperature": (0.0, 0.7, 1.5)[i % 3], "top_k": (0, 20)[i % 2], "seed_low": -i,
         "top_p": (1.0, 0.9)[i // 2 % 2], "output_lens": 3 * i, "seed_high": i % 7}
        for i in range(64)
    ]  # fmt: skip
    expected = draw_tokens(logits, inputs_of(rows))
    chosen = rng.permutation(64)[:num_rows]
    tokens = draw_tokens(logits[chosen], inputs_of([rows[i] for i in chosen]))
    np.testing.assert_array_equal(tokens, expected[chosen])


def test_greedy_takes_the_first_of_equals() -> None:
    logits = np.zeros((8, 300))
    logits[:, [250, 17, 130]] = 2.5
    assert (draw_tokens(logits, same_for_all(8)) == 17).all()


def test_a_filtered_token_is_not_drawn_at_the_ends_of_the_unit_interval() -> None:
    # Tiny steps after large ones: a prefix sum may round differently from one index to the next.
    rng = np.random.default_rng(1)
    weights = rng.random((4, 1000)).astype(np.float32)
    weights[:, rng.permutation(1000)[:900]] = 0
    running = np.cumsum(weights.reshape(4, -1), axis=1)
    pick = jax.jit(jax.vmap(sampler._pick, in_axes=(None, 1)))
    ends = np.array([0.0, 1 - 2.0**-24, 0.5], np.float32)
    uniforms = np.concatenate(
        [np.tile(ends, (4, 1)), (running / running[:, -1:])[:, ::7]], axis=1
    ).astype(np.float32)
    index = np.asarray(pick(weights, uniforms))  # [n, 4]
    assert (np.take_along_axis(weights, index.T, axis=1) > 0).all()


# ---- log-probabilities


@pytest.mark.parametrize("vocab_size", [5, 20, 1000])
def test_raw_logprobs_and_ranks(vocab_size: int) -> None:
    rng = np.random.default_rng(vocab_size)
    logits = (rng.normal(size=(6, vocab_size)) * 5).astype(np.float32)
    tokens = rng.integers(0, vocab_size, 6).astype(np.int32)
    result = jax.jit(sampler.raw_logprobs)(logits, tokens)
    expected = log_softmax(logits)
    rows = np.arange(6)
    np.testing.assert_allclose(result.logprobs, expected[rows, tokens], rtol=1e-5, atol=1e-5)
    order = np.argsort(-logits, axis=1)
    ranks = 1 + np.argmax(order == tokens[:, None], axis=1)
    np.testing.assert_array_equal(result.ranks, ranks)
    num_top = min(vocab_size, MAX_LOGPROBS)
    assert result.top_token_ids.shape == result.top_logprobs.shape == (6, MAX_LOGPROBS)
    np.testing.assert_array_equal(result.top_token_ids[:, :num_top], order[:, :num_top])
    top = np.take_along_axis(expected, order[:, :num_top], axis=1)
    np.testing.assert_allclose(result.top_logprobs[:, :num_top], top, rtol=1e-5, atol=1e-5)
    assert np.isneginf(result.top_logprobs[:, num_top:]).all()


@pytest.mark.parametrize("chosen", [0, 1])
def test_all_log_probabilities_of_a_vocabulary_smaller_than_asked_for(chosen: int) -> None:
    logits = np.array([[3.0, 1.0, 2.0]], np.float32)
    found = sampler.raw_logprobs(logits, np.array([chosen]))
    rows = LogprobRows(*(np.asarray(array) for array in found))
    entries = token_logprobs(rows, 0, chosen, MAX_LOGPROBS, None)
    assert {token_id: entry.rank for token_id, entry in entries.items()} == {0: 1, 1: 3, 2: 2}
    logprobs = [entries[token_id].logprob for token_id in range(3)]
    np.testing.assert_allclose(logprobs, log_softmax(logits)[0], rtol=1e-5)


def test_equal_logits_share_a_rank() -> None:
    logits = np.array([[1.0, 3.0, 3.0, 0.0]] * 4, np.float32)
    assert sampler.raw_logprobs(logits, np.arange(4)).ranks.tolist() == [3, 1, 1, 4]
