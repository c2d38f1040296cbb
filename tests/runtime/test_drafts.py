"""Verification on the device: what a sequence says has the same distribution with drafts, whatever
they are, and what is counted of it is what it says."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampling_reference import changed_logits, probabilities
from scipy import stats

from jaxllm.engine.batch import INT_FIELDS, IS_STOP
from jaxllm.engine.sequence import NO_TOKEN
from jaxllm.runtime import sampler
from jaxllm.runtime.drafts import DraftChains
from jaxllm.runtime.sampler import SamplingInputs

VOCAB, MAX_DRAFTS = 5, 3
P_VALUE = 1e-4  # of a test that fails by chance
DEFAULTS: dict[str, float] = {"top_p": 1.0, "repetition_penalty": 1.0, "temperature": 1.0}
TABLE = np.random.default_rng(1).normal(size=(VOCAB, VOCAB)).astype(np.float32) * 1.5
LAST = 2  # the last known token of each sequence
NUM_SEQS = 20_000  # in all tests, so that one program does
STOP = 4

sample, draw = jax.jit(sampler.sample), jax.jit(sampler.draw)


def chains_of(drafts: np.ndarray) -> tuple[DraftChains, np.ndarray]:
    """Of sequences with drafts [N, MAX_DRAFTS]: first a row for each, then those of their drafts.
    Also the last token before each row."""
    num_seqs = len(drafts)
    rows = np.arange(num_seqs * (MAX_DRAFTS + 1)).reshape(MAX_DRAFTS + 1, num_seqs)
    verified = np.full(rows.size, NO_TOKEN)
    previous = np.arange(rows.size)
    before = np.full(rows.size, LAST)
    for index in range(MAX_DRAFTS):
        verified[rows[index]] = drafts[:, index]
        previous[rows[index + 1]] = rows[index]
        before[rows[index + 1]] = drafts[:, index]
    batch = {"drafts": jnp.asarray(verified), "previous_rows": jnp.asarray(previous)}
    return DraftChains.of(batch, MAX_DRAFTS), before


def inputs_of(seeds: np.ndarray, depth: Any, options: dict[str, Any]) -> SamplingInputs:
    """Of rows with these seeds, so many tokens after the last known one."""
    fields = {name: options.get(name, DEFAULTS.get(name, 0)) for name in SamplingInputs._fields}
    fields |= {"seed_low": seeds, "output_lens": depth, "uses_table": 1}
    kinds = {name: jnp.int32 if name in INT_FIELDS else jnp.float32 for name in fields}
    return SamplingInputs(
        *(jnp.broadcast_to(jnp.asarray(fields[n], kinds[n]), len(seeds)) for n in fields)
    )


def says(drafts: np.ndarray, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """What N sequences with seeds 0 .. N - 1 say in one step, [N, 1 + MAX_DRAFTS], NO_TOKEN where
    it is less; and how often that was counted, [N, V]. The model's next logits depend on the last
    token alone."""
    num_seqs = len(drafts)
    chains, before = chains_of(drafts)
    num_rows = len(before)
    depth = np.arange(num_rows) // num_seqs
    slots = np.arange(num_rows) % num_seqs
    inputs = inputs_of(slots, depth, options)
    info = np.zeros((num_seqs, VOCAB), np.int32)
    info[:, STOP] |= IS_STOP
    bias = np.zeros((num_seqs, VOCAB), np.float32)
    bias[:, list(options.get("logit_bias", {}))] = list(options.get("logit_bias", {}).values())
    everything = np.full((len(info), 1), -1, np.int32)  # masks that no row applies
    tables = sampler.SamplingTables(info, bias, everything)
    tokens = sample(TABLE[before], inputs, tables, slots, chains.tokens_before)
    valid, is_last = chains.verify(tokens, jnp.ones(num_rows, bool))
    counted = np.asarray(sampler.count_tokens(jnp.asarray(info), slots, tokens, valid)) - info
    said = np.where(valid, tokens, NO_TOKEN).reshape(-1, num_seqs).T
    lens = (said != NO_TOKEN).sum(axis=1)
    assert (np.asarray(is_last).reshape(-1, num_seqs).T.argmax(axis=1) == lens - 1).all()
    assert np.asarray(is_last).sum() == num_seqs
    return said, counted


def likely_drafts(seed: int) -> np.ndarray:
    """[NUM_SEQS, MAX_DRAFTS], each drawn by about its likelihood, so that many are accepted."""
    rng = np.random.default_rng(seed)
    drafts, last = [], np.full(NUM_SEQS, LAST)
    for _ in range(MAX_DRAFTS):
        last = (TABLE[last] + rng.gumbel(size=(NUM_SEQS, VOCAB))).argmax(axis=1)
        drafts.append(last)
    return np.stack(drafts, axis=1)


def drawn_drafts(table: np.ndarray) -> np.ndarray:
    """[NUM_SEQS, MAX_DRAFTS], what a draft model with this table says of the same seeds."""
    seeds, last = np.arange(NUM_SEQS), np.full(NUM_SEQS, LAST)
    drafts = []
    for depth in range(MAX_DRAFTS):
        last = np.asarray(draw(table[last], inputs_of(seeds, depth, {})))
        drafts.append(last)
    return np.stack(drafts, axis=1)


SIMILAR = TABLE + np.random.default_rng(2).normal(size=TABLE.shape).astype(np.float32) / 2


def expected(context: list[int], **options: Any) -> np.ndarray:
    names = ("temperature", "top_k", "top_p", "min_p")
    filters = {name: options[name] for name in names if name in options}
    changes = {name: value for name, value in options.items() if name not in names}
    last = context[-1] if context else LAST
    logits = changed_logits(TABLE[last], output=context, stops=(STOP,), **changes)
    return probabilities(logits, **({"temperature": 1.0} | filters))


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top_p": {"temperature": 1.2, "top_p": 0.8},
    "top_k and min_p": {"top_k": 4, "min_p": 0.05},
    "penalties": {
        "presence_penalty": 0.4, "frequency_penalty": 0.9, "repetition_penalty": 1.3, "top_p": 0.95,
    },
    "bias and min_tokens": {"logit_bias": {1: 1.0, 3: -0.5}, "min_tokens": 2},
}  # fmt: skip


@pytest.mark.parametrize("drafts", [likely_drafts(0), drawn_drafts(SIMILAR)], ids=["any", "drawn"])
@pytest.mark.parametrize("name", OPTIONS)
def test_the_distribution_is_that_of_the_model(name: str, drafts: np.ndarray) -> None:
    """For each text so far that drafts can lead to, the next token is drawn from the model's
    distribution after it, computed from the formulas. Even where drafts were drawn with the same
    random numbers, from a similar distribution."""
    options = OPTIONS[name]
    said, _ = says(drafts, **options)
    num_contexts = 0
    for depth in range(3):
        for context in np.unique(said[:, :depth], axis=0).tolist():
            after = said[(said[:, :depth] == context).all(axis=1), depth]
            after = after[after != NO_TOKEN]
            wanted = expected(context, **options)
            observed = np.bincount(after, minlength=VOCAB)
            assert not observed[wanted == 0].any()
            possible = wanted > 0
            if len(after) < 100 or possible.sum() == 1:
                continue
            num_contexts += 1
            result = stats.chisquare(observed[possible], wanted[possible] * len(after))
            assert result.pvalue > P_VALUE, context
    assert num_contexts > 6


def test_a_draft_is_accepted_as_often_as_it_is_likely() -> None:
    said, _ = says(np.full((NUM_SEQS, MAX_DRAFTS), 3))
    wanted = expected([])[3]
    assert abs((said[:, 1] != NO_TOKEN).mean() - wanted) < 4 * np.sqrt(wanted / NUM_SEQS)


def test_drafts_drawn_with_the_same_random_numbers_are_accepted_more_often() -> None:
    accepted = [
        (says(drafts)[0][:, 1] != NO_TOKEN).mean()
        for drafts in (drawn_drafts(TABLE), drawn_drafts(SIMILAR), likely_drafts(0))
    ]
    assert accepted[0] == 1
    assert 0.99 > accepted[1] > accepted[2] + 0.2


@pytest.mark.parametrize("name", OPTIONS)
def test_a_seed_says_the_same_whatever_the_drafts_are(name: str) -> None:
    one, counted = says(likely_drafts(1), **OPTIONS[name])
    other, _ = says(likely_drafts(2), **OPTIONS[name])
    both = (one != NO_TOKEN) & (other != NO_TOKEN)
    assert both[:, 1:].sum() > 1000
    np.testing.assert_array_equal(one[both], other[both])
    for token in range(VOCAB):
        np.testing.assert_array_equal(counted[:, token], (one == token).sum(axis=1))


def test_greedy_says_the_most_likely_tokens() -> None:
    best, last = [], LAST
    for _ in range(MAX_DRAFTS + 1):
        last = int(TABLE[last].argmax())
        best.append(last)
    wrong = (best[1] + 1) % VOCAB
    drafts = np.array([best[:3], [best[0], wrong, best[2]], [(best[0] + 1) % VOCAB] * 3])
    said, _ = says(np.resize(drafts, (NUM_SEQS, MAX_DRAFTS)), temperature=0.0)
    n = NO_TOKEN
    assert said[:3].tolist() == [best, [*best[:2], n, n], [best[0], n, n, n]]


def test_without_drafts_every_row_that_samples_counts() -> None:
    samples = jnp.asarray([True, False])
    valid, last = DraftChains.of({}, 0).verify(jnp.asarray([1, 2]), samples)
    assert (valid == samples).all()
    assert (last == samples).all()
