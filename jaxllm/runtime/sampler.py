"""From logits to tokens, on the device, each row with its own options.

Filters (min_p, top_k, top_p) each keep the tokens whose logit is within some distance of the row's
best one. Distances of top_k and top_p are found by bisection, so the vocabulary is never sorted;
of tokens with equal logits at the border all are kept. What no row of a batch asks for is skipped.
A token that a filter or a ban excludes is never drawn, whatever rounding does.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.engine.batch import IN_PROMPT, IS_STOP
from jaxllm.engine.sequence import NO_TOKEN
from jaxllm.runtime.ranking import top_k
from jaxllm.sampling_params import MAX_LOGPROBS

COUNT_MASK = IS_STOP - 1
DRAW_BLOCK = 128  # tokens of a block when drawing: first the block, then the token in it
ROW_TILE = 8  # rows at a time on CPU
Carry = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


class SamplingInputs(NamedTuple):
    """The options of each of S rows; see SamplingParams and batch.INT_FIELDS."""

    temperature: jax.Array  # [S] float32, 0: greedy
    top_k: jax.Array  # [S] int32, 0: off
    top_p: jax.Array  # [S] float32, 1: off
    min_p: jax.Array  # [S] float32, 0: off
    repetition_penalty: jax.Array  # [S] float32, 1: off
    presence_penalty: jax.Array  # [S] float32
    frequency_penalty: jax.Array  # [S] float32
    min_tokens: jax.Array  # [S] int32
    output_lens: jax.Array  # [S] int32, tokens generated so far
    seed_low: jax.Array  # [S] int32
    seed_high: jax.Array  # [S] int32
    uses_table: jax.Array  # [S] int32
    is_constrained: jax.Array  # [S] int32


class SamplingTables(NamedTuple):
    """What is kept for each slot, or given for each row, with a number or a bit for each token."""

    token_info: jax.Array  # [num_slots, V] int32, see batch.table_row
    logit_bias: jax.Array  # [num_slots, V] float32
    masks: jax.Array  # [S, ceil(V / 32)] int32, of each row; see engine.sequence.Constraint


class Logprobs(NamedTuple):
    """Raw log-probabilities of R rows, as in engine.sequence.LogprobRows."""

    logprobs: jax.Array  # [R] float32
    ranks: jax.Array  # [R] int32
    top_token_ids: jax.Array  # [R, MAX_LOGPROBS] int32
    top_logprobs: jax.Array  # [R, MAX_LOGPROBS] float32


def sample(
    logits: jax.Array,  # [S, V] float32
    inputs: SamplingInputs,
    tables: SamplingTables,
    slots: jax.Array,  # [S] int32
    tokens_before: jax.Array | None = None,  # [S, D] int32
) -> jax.Array:
    """The next token of each row, [S] int32. If options leave a row no token at all, which the
    engine refuses beforehand, it is some token of the vocabulary. tokens_before: drafts that a row
    comes after, which token_info does not count yet; NO_TOKEN where they are fewer.

    On CPU a tile of rows at a time: what is computed between stays in the processor's cache, and
    the pages of large temporaries cost more there than the arithmetic (64 rows: 10 times more).
    """
    num_rows = logits.shape[0]
    row_numbers = jnp.arange(num_rows)

    def whole() -> jax.Array:
        return _sample_rows(logits, inputs, tables, row_numbers, slots, tokens_before)

    def tiled() -> jax.Array:
        def tile(start: jax.Array) -> jax.Array:
            rows, row_inputs, *others = jax.tree.map(
                lambda x: jax.lax.dynamic_slice_in_dim(x, start, ROW_TILE),
                (logits, inputs, row_numbers, slots, tokens_before),
            )
            return _sample_rows(rows, row_inputs, tables, *others)

        return jax.lax.map(tile, jnp.arange(0, num_rows, ROW_TILE)).reshape(num_rows)

    if num_rows <= ROW_TILE or num_rows % ROW_TILE:
        return whole()
    return jax.lax.platform_dependent(cpu=tiled, default=whole)


def _sample_rows(
    logits: jax.Array,
    inputs: SamplingInputs,
    tables: SamplingTables,
    row_numbers: jax.Array,
    slots: jax.Array,
    tokens_before: jax.Array | None,
) -> jax.Array:
    def with_table(logits: jax.Array) -> jax.Array:
        info = _rows_of(tables.token_info, slots)  # [S, V]
        if tokens_before is not None:
            rows = jnp.arange(slots.shape[0])
            for tokens in tokens_before.T:
                info = count_tokens(info, rows, tokens, tokens != NO_TOKEN)
        changed = apply_table(logits, inputs, info, _rows_of(tables.logit_bias, slots))
        return jnp.where(inputs.uses_table[:, None] > 0, changed, logits)

    def with_mask(logits: jax.Array) -> jax.Array:
        return apply_masks(logits, inputs.is_constrained, tables.masks[row_numbers])

    logits = jax.lax.cond(jnp.any(inputs.uses_table > 0), with_table, lambda x: x, logits)
    logits = jax.lax.cond(jnp.any(inputs.is_constrained > 0), with_mask, lambda x: x, logits)
    best = _argmax(logits)
    return jax.lax.cond(
        jnp.any(inputs.temperature > 0),
        lambda: jnp.where(inputs.temperature > 0, draw(logits, inputs), best),
        lambda: best,
    )


def _rows_of(table: jax.Array, slots: jax.Array) -> jax.Array:
    """The rows [S, V] of a table [num_slots, V]. For TPU one by one: the compiler takes seconds of
    processor time over a gather of rows this long."""

    def one_by_one() -> jax.Array:
        return jax.lax.map(lambda slot: jax.lax.dynamic_index_in_dim(table, slot, 0, False), slots)

    return jax.lax.platform_dependent(tpu=one_by_one, default=lambda: table[slots])


def apply_table(
    logits: jax.Array,  # [S, V]
    inputs: SamplingInputs,
    token_info: jax.Array,  # [S, V]
    logit_bias: jax.Array,  # [S, V]
) -> jax.Array:
    """Logits with bias, bans, min_tokens and penalties. Repetition: Keskar et al. 2019, section
    4.1, over prompt and output; presence and frequency: over the output, as OpenAI defines them."""

    def column(x: jax.Array) -> jax.Array:
        return x[:, None]

    too_early = column(inputs.output_lens < inputs.min_tokens) & (token_info & IS_STOP > 0)
    logits = jnp.where(too_early, -jnp.inf, logits + logit_bias)
    count = (token_info & COUNT_MASK).astype(jnp.float32)
    seen = (count > 0) | (token_info & IN_PROMPT > 0)
    penalty = column(inputs.repetition_penalty)
    repeated = jnp.where(logits > 0, logits / penalty, logits * penalty)
    logits = jnp.where(seen, repeated, logits)
    logits -= column(inputs.frequency_penalty) * count
    return logits - column(inputs.presence_penalty) * (count > 0)


def apply_masks(
    logits: jax.Array,  # [S, V]
    is_constrained: jax.Array,  # [S] int32
    masks: jax.Array,  # [S, ceil(V / 32)] int32
) -> jax.Array:
    """Logits, in constrained rows minus infinity where the token's bit is 0."""
    words = jnp.where((is_constrained > 0)[:, None], masks, -1)
    bits = (words[:, :, None] >> jnp.arange(32)) & 1  # [S, ceil(V / 32), 32]
    masked = jnp.where(bits.reshape(words.shape[0], -1)[:, : logits.shape[1]], logits, -jnp.inf)
    # Else a compiler for TPU has all logits lie as this reshape would have them, rows innermost.
    return jax.lax.optimization_barrier(masked)


def draw(logits: jax.Array, inputs: SamplingInputs) -> jax.Array:
    """A token of each row [S, V] by temperature, min_p, top_k and top_p."""
    return _draw_from(token_weights(logits, inputs), _uniforms(inputs))


def token_weights(logits: jax.Array, inputs: SamplingInputs) -> jax.Array:
    """[S, V]: what each token's probability of being drawn is proportional to."""
    temperature = jnp.where(inputs.temperature > 0, inputs.temperature, 1.0)
    logits = logits / temperature[:, None]
    best = logits.max(axis=-1, keepdims=True)
    # [S, V], inf: banned. The best is at 0 even if it overflowed: inf - inf is no number.
    distance = jnp.where(logits == best, 0.0, best - logits)
    border = filter_border(distance, inputs)
    return jnp.where(distance <= border[:, None], jnp.exp(-distance), 0.0)


def filter_border(distance: jax.Array, inputs: SamplingInputs) -> jax.Array:
    """[S]: tokens [S, V] farther than this from the best one are filtered out."""
    border = -jnp.log(inputs.min_p)  # inf where min_p is 0
    draws = inputs.temperature > 0
    cuts_k = draws & (inputs.top_k > 0) & (inputs.top_k < distance.shape[1])
    cuts_p = draws & (inputs.top_p < 1)

    def by_top_k(border: jax.Array) -> jax.Array:
        found = _smallest_border(distance, None, inputs.top_k.astype(jnp.float32), cuts_k)
        return jnp.where(cuts_k, jnp.minimum(border, found), border)

    def by_top_p(border: jax.Array) -> jax.Array:
        weights = jnp.where(distance <= border[:, None], jnp.exp(-distance), 0.0)
        found = _smallest_border(distance, weights, inputs.top_p * weights.sum(axis=-1), cuts_p)
        return jnp.where(cuts_p, jnp.minimum(border, found), border)

    border = jax.lax.cond(jnp.any(cuts_k), by_top_k, lambda b: b, border)
    return jax.lax.cond(jnp.any(cuts_p), by_top_p, lambda b: b, border)


def _smallest_border(
    distance: jax.Array, weights: jax.Array | None, target: jax.Array, wanted: jax.Array
) -> jax.Array:
    """[S]: the smallest b such that the weights (None: 1 each) of the tokens with distance <= b
    reach the target, infinity where all together do not; nothing of use in rows not wanted.

    Bisection over the bit patterns of non-negative floats, which are ordered as the floats are: at
    most 31 passes, and done once a single token is left between what suffices and what does not.
    """
    key = jax.lax.bitcast_convert_type(distance, jnp.int32)  # [S, V] >= 0

    def measure(border: jax.Array) -> tuple[jax.Array, jax.Array]:
        inside = key <= border[:, None]
        count = inside.sum(axis=-1, dtype=jnp.int32)
        if weights is None:
            return count.astype(jnp.float32), count
        return jnp.where(inside, weights, 0.0).sum(axis=-1), count

    def unfinished(carry: Carry) -> jax.Array:
        low, high, low_count, high_count = carry
        return jnp.any((high - low > 1) & (high_count - low_count > 1))

    def halve(carry: Carry) -> Carry:
        low, high, low_count, high_count = carry
        middle = low + (high - low) // 2
        mass, count = measure(middle)
        enough = mass >= target
        return (
            jnp.where(enough, low, middle), jnp.where(enough, middle, high),
            jnp.where(enough, low_count, count), jnp.where(enough, count, high_count),
        )  # fmt: skip

    num_rows, vocab_size = distance.shape
    infinity = jax.lax.bitcast_convert_type(jnp.float32(jnp.inf), jnp.int32)
    _, high, _, _ = jax.lax.while_loop(
        unfinished,
        halve,
        (
            jnp.full(num_rows, -1), jnp.where(wanted, infinity, -1),
            jnp.zeros(num_rows, jnp.int32), jnp.full(num_rows, vocab_size),
        ),
    )  # fmt: skip
    return jax.lax.bitcast_convert_type(high, jnp.float32)


def _uniforms(inputs: SamplingInputs) -> jax.Array:
    """[S, 2] in [0, 1): of the row's seed and its position in the output, of nothing else."""
    high, low, position = (
        jax.lax.bitcast_convert_type(word, jnp.uint32)
        for word in (inputs.seed_high, inputs.seed_low, inputs.output_lens)
    )
    bits = _threefry(high, low, position)
    return (bits >> 8).astype(jnp.float32) * 2.0**-24


def _threefry(high: jax.Array, low: jax.Array, counter: jax.Array) -> jax.Array:
    """[S, 2] uint32: Threefry-2x32 with 20 rounds (Salmon et al. 2011) of (counter, 0).

    jax.random computes the same, but in loops, which take XLA on CPU half a second to compile.
    """
    keys = (high, low, high ^ low ^ jnp.uint32(0x1BD11BDA))
    x, y = counter + keys[0], keys[1]
    for group in range(5):
        for distance in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            x = x + y
            y = x ^ ((y << distance) | (y >> (32 - distance)))
        x = x + keys[(group + 1) % 3]
        y = y + keys[(group + 2) % 3] + jnp.uint32(group + 1)
    return jnp.stack([x, y], axis=-1)


def _draw_from(weights: jax.Array, uniforms: jax.Array) -> jax.Array:
    """Inverse transform sampling in two stages, [S]: a block of the vocabulary, a token in it. Two
    numbers of 24 bits reach tokens that one could not, and the sums stay short."""
    num_rows, vocab_size = weights.shape
    padding = -vocab_size % DRAW_BLOCK
    blocks = jnp.pad(weights, ((0, 0), (0, padding))).reshape(num_rows, -1, DRAW_BLOCK)
    block = _pick(blocks.sum(axis=-1), uniforms[:, 0])  # [S]
    token = _pick(blocks[jnp.arange(num_rows), block], uniforms[:, 1])
    return block * DRAW_BLOCK + token


def _pick(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """[S]: the first index of each row [S, n] whose running sum exceeds uniform x total, among
    those that have a weight; 0 if none has.

    A parallel prefix sum is rounded differently at each index, so it may rise where the weight is
    0, and the product may be rounded up to the total: then it is the last one with a weight.
    """
    running = jnp.cumsum(weights, axis=-1)
    index = jax.lax.broadcasted_iota(jnp.int32, weights.shape, 1)
    has_weight = weights > 0
    is_beyond = has_weight & (running > uniform[:, None] * running[:, -1:])
    first = jnp.where(is_beyond, index, weights.shape[1]).min(axis=-1)
    last = jnp.where(has_weight, index, 0).max(axis=-1)
    return jnp.minimum(first, last)


def _argmax(x: jax.Array) -> jax.Array:
    """[S]: the first index of each row's maximum. Two plain reductions: XLA's own argmax is one
    over pairs, which the CPU backend does not vectorise."""
    index = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    is_best = x == x.max(axis=-1, keepdims=True)
    return jnp.where(is_best, index, x.shape[-1] - 1).min(axis=-1)


def count_tokens(
    token_info: jax.Array, slots: jax.Array, tokens: jax.Array, counted: jax.Array
) -> jax.Array:
    """token_info [num_slots, V] with one more of tokens[s] in row slots[s], where counted."""
    row = jnp.where(counted, slots, token_info.shape[0])  # out of range: dropped
    return token_info.at[row, tokens].add(1, mode="drop")


def raw_logprobs(logits: jax.Array, tokens: jax.Array) -> Logprobs:
    """Of the chosen tokens [R] and the most likely ones, under softmax(logits [R, V])."""
    log_total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    num_top = min(MAX_LOGPROBS, logits.shape[-1])
    top, top_ids = top_k(logits, num_top)
    missing = ((0, 0), (0, MAX_LOGPROBS - num_top))
    return chosen_logprobs(logits, tokens)._replace(
        top_token_ids=jnp.pad(top_ids.astype(jnp.int32), missing),
        top_logprobs=jnp.pad(top - log_total, missing, constant_values=-jnp.inf),
    )


def chosen_logprobs(logits: jax.Array, tokens: jax.Array) -> Logprobs:
    """Of the chosen tokens only."""
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)  # [R, 1]
    log_total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    return no_logprobs(tokens.shape[0])._replace(
        logprobs=(chosen - log_total)[:, 0],
        ranks=1 + (logits > chosen).sum(axis=-1, dtype=jnp.int32),
    )


def no_logprobs(num_rows: int) -> Logprobs:
    """What stands in for log-probabilities that nobody asked for."""
    return Logprobs(
        jnp.zeros(num_rows, jnp.float32),
        jnp.zeros(num_rows, jnp.int32),
        jnp.zeros((num_rows, MAX_LOGPROBS), jnp.int32),
        jnp.zeros((num_rows, MAX_LOGPROBS), jnp.float32),
    )
