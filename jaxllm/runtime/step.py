"""The one function that is compiled: from a packed buffer to sampled tokens and the next state."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jaxllm.config import ModelConfig
from jaxllm.engine.batch import FLOAT_FIELDS, ROW_FIELDS, PackedLayout
from jaxllm.engine.sequence import NOT_FINITE, ON_DEVICE
from jaxllm.models.decoder import Model, Parameters
from jaxllm.quantization.kv_scales import KV_SCALES
from jaxllm.runtime import kv_cache, ranking, sampler
from jaxllm.runtime.drafts import DraftChains
from jaxllm.runtime.pooling import pool_hidden
from jaxllm.runtime.ranking import Candidates
from jaxllm.runtime.sampler import Logprobs, SamplingInputs, SamplingTables
from jaxllm.runtime.sharding import axis_spec, pool_spec
from pallas_kernels.ragged_paged_attention.api import prepare, ragged_paged_attention
from pallas_kernels.ragged_paged_attention.layout import TokenRows, token_rows

LOGPROB_TILE = 64  # prompt rows whose logits [64, V] are in memory at a time


class State(NamedTuple):
    """What stays on the device between steps; donated to each."""

    kv_pool: jax.Array  # [L, N, B, 2K, D] or as kv_cache.abstract_pool lays it out
    last_tokens: jax.Array  # [num_slots] int32, what each slot's sequence sampled last
    token_info: jax.Array  # [num_slots, V] int32, see batch.table_row
    logit_bias: jax.Array  # [num_slots, V] float32
    hidden_sums: jax.Array  # [num_slots, E] float32, see pooling.pool_hidden


def abstract_tables(config: ModelConfig, num_slots: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The shapes of what State holds beside the pool, in its order."""
    by_token = (num_slots, config.vocab_size)
    return (
        jax.ShapeDtypeStruct((num_slots,), jnp.int32),
        jax.ShapeDtypeStruct(by_token, jnp.int32),
        jax.ShapeDtypeStruct(by_token, jnp.float32),
        jax.ShapeDtypeStruct((num_slots, config.hidden_size), jnp.float32),
    )


class StepOutputs(NamedTuple):
    """What the host may fetch of a step."""

    tokens: jax.Array  # [S] or [max_steps, S] int32, NOT_FINITE where the logits are not finite
    pooled: jax.Array  # [S, E] float32
    logprobs: Logprobs  # of S rows
    prompt_logprobs: Logprobs  # of T rows
    candidates: Candidates  # of S rows


class StepOptions(NamedTuple):
    """What a step is compiled for, beside its model and its bucket."""

    attention: str | None = None  # an implementation's name; None: the best of the platform
    mesh: Mesh | None = None  # of the devices that share the model; None: one that is there


def make_step(
    model: Model, layout: PackedLayout, options: StepOptions
) -> Callable[[tuple[jax.Array, ...], State, jax.Array, jax.Array], tuple[State, StepOutputs]]:
    """step(leaves, state, packed, masks) -> (state, outputs) for one bucket.

    masks: [S, ceil(V / 32)] int32, what may come in constrained rows, see sequence.Constraint.
    leaves: those of the parameters' tree, in its order. A call touches each node of its arguments,
    and between two steps none of them is in the processor's cache: a nested dict of 270 leaves
    costs half a millisecond more than a tuple of them.
    """
    tree = jax.tree.structure(model.stored_parameters())

    def step(
        leaves: tuple[jax.Array, ...], state: State, packed: jax.Array, masks: jax.Array
    ) -> tuple[State, StepOutputs]:
        params = jax.tree.unflatten(tree, leaves)
        batch = unpack(packed, layout)
        kv_pool = kv_cache.copy_blocks(state.kv_pool, batch["copies"], batch["counts"][1])
        state = state._replace(kv_pool=kv_pool)
        compute = partial(_compute, model, params, layout, options, masks)
        if layout.max_steps > 1:
            return _decode_several(compute, state, batch, layout)
        return compute(state, batch)

    return step


def _compute(
    model: Model,
    params: Parameters,
    layout: PackedLayout,
    options: StepOptions,
    masks: jax.Array,
    state: State,
    batch: dict[str, jax.Array],
) -> tuple[State, StepOutputs]:
    """One forward pass over the batch, and a token of each of its sequences."""
    num_tokens = layout.bucket.num_tokens
    rows = token_rows(num_tokens, batch["seq_lens"], batch["query_start"], batch["distribution"])
    slots = batch["slots"][rows.sequence]  # [T]
    token_ids = _known_or_sampled(batch["token_ids"], slots, state.last_tokens)
    prompt_lens = batch["prompt_lens"][rows.sequence]
    hidden, kv_pool = model.forward(
        params,
        token_ids,
        rows.position,
        jnp.maximum(prompt_lens, rows.position + 1),
        state.kv_pool,
        _attend(model, params, state.kv_pool, batch, layout, options),
        num_tokens=batch["query_start"][-1],
    )  # hidden: [T, E]
    logits = model.logits(params, hidden[batch["logit_rows"]], batch["counts"][0])  # [S, V] float32

    inputs = SamplingInputs(**{name: batch[name] for name in SamplingInputs._fields})
    is_beam = batch["num_candidates"] > 0  # its token is chosen by the host, so it is not drawn
    inputs = inputs._replace(temperature=jnp.where(is_beam, 0.0, inputs.temperature))
    tables = SamplingTables(state.token_info, state.logit_bias, masks)
    chains = DraftChains.of(batch, layout.max_drafts)
    tokens = sampler.sample(logits, inputs, tables, batch["slots"], chains.tokens_before)
    logprobs = jax.lax.switch(
        batch["wants_logprobs"].max(),
        [
            lambda: sampler.no_logprobs(tokens.shape[0]),
            lambda: sampler.chosen_logprobs(logits, tokens),
            lambda: sampler.raw_logprobs(logits, tokens),
        ],
    )
    pooled, hidden_sums = pool_hidden(hidden, rows, batch, state.hidden_sums)
    is_finite = jnp.all(jnp.isfinite(logits), axis=-1)  # [S]

    def restrict(logits: jax.Array) -> jax.Array:
        return sampler.apply_masks(logits, batch["is_constrained"], masks)

    outputs = StepOutputs(
        jnp.where(is_finite, tokens, NOT_FINITE),
        pooled,
        logprobs,
        _prompt_logprobs(model, params, hidden, token_ids, rows, batch, layout),
        ranking.find_candidates(logits, batch["temperature"], batch["num_candidates"], restrict),
    )
    state = state._replace(kv_pool=kv_pool, hidden_sums=hidden_sums)
    return _next_state(state, batch, tokens, chains), outputs


class _Loop(NamedTuple):
    """What changes from one token to the next. outputs: but for its tokens, of the last step, which
    is the only one where anybody asked for more than tokens."""

    step: jax.Array  # [] int32
    active: jax.Array  # [S] bool
    token_ids: jax.Array  # [S] int32, of the next step
    seq_lens: jax.Array  # [S] int32
    output_lens: jax.Array  # [S] int32
    tokens: jax.Array  # [max_steps, S] int32
    state: State
    outputs: StepOutputs


def _decode_several(
    compute: Callable[[State, dict[str, jax.Array]], tuple[State, StepOutputs]],
    state: State,
    batch: dict[str, jax.Array],
    layout: PackedLayout,
) -> tuple[State, StepOutputs]:
    """Decodes until each row has as many tokens as it may have, or one that ends it.

    A row that is done is computed again with the same token at the same place, which changes
    nothing, until all are done. The tokens of a step beyond a row's end are 0.
    """
    assert layout.bucket.decode_only  # token i is the one of row i
    num_seqs = layout.bucket.num_seqs

    def goes_on(loop: _Loop) -> jax.Array:
        return (loop.step < batch["num_steps"][0]) & jnp.any(loop.active)

    def body(loop: _Loop) -> _Loop:
        now = batch | {
            "token_ids": loop.token_ids,
            "seq_lens": loop.seq_lens,
            "output_lens": loop.output_lens,
            "samples": loop.active.astype(jnp.int32),
        }
        state, outputs = compute(loop.state, now)
        tokens = outputs.tokens
        is_stop = jnp.any(tokens[:, None] == batch["stop_ids"], axis=-1)
        ends = is_stop & (loop.output_lens + 1 >= batch["min_tokens"]) | (tokens == NOT_FINITE)
        active = loop.active & ~ends & (loop.step + 1 < batch["samples"])
        return _Loop(
            loop.step + 1,
            active,
            jnp.where(active, tokens, loop.token_ids),
            loop.seq_lens + active,
            loop.output_lens + active,
            loop.tokens.at[loop.step].set(jnp.where(loop.active, tokens, 0)),
            state,
            outputs,
        )

    outputs = StepOutputs(
        jnp.zeros(num_seqs, jnp.int32),
        jnp.zeros((num_seqs, state.hidden_sums.shape[1]), jnp.float32),
        sampler.no_logprobs(num_seqs),
        sampler.no_logprobs(0),
        ranking.no_candidates(num_seqs),
    )
    token_ids = _known_or_sampled(batch["token_ids"], batch["slots"], state.last_tokens)
    tokens = jnp.zeros((layout.max_steps, num_seqs), jnp.int32)
    loop = jax.lax.while_loop(
        goes_on,
        body,
        _Loop(
            jnp.int32(0), batch["samples"] > 0, token_ids, batch["seq_lens"],
            batch["output_lens"], tokens, state, outputs,
        ),
    )  # fmt: skip
    return loop.state, loop.outputs._replace(tokens=loop.tokens)


def unpack(packed: jax.Array, layout: PackedLayout) -> dict[str, jax.Array]:
    """The fields of a packed buffer, floats as float32."""
    arrays = {
        name: jax.lax.slice_in_dim(packed, offset, offset + math.prod(shape)).reshape(shape)
        for name, (offset, shape) in layout.arrays.items()
    }
    fields = dict(zip(ROW_FIELDS, arrays.pop("row_fields"), strict=True))
    for name in FLOAT_FIELDS:
        fields[name] = jax.lax.bitcast_convert_type(fields[name], jnp.float32)
    return arrays | fields


def write_table_row(state: State, slot: jax.Array, info: jax.Array, bias: jax.Array) -> State:
    """The state with one slot's row of the sampling table replaced."""
    return state._replace(
        token_info=state.token_info.at[slot].set(info),
        logit_bias=state.logit_bias.at[slot].set(bias),
    )


def _known_or_sampled(token_ids: jax.Array, slots: jax.Array, last_tokens: jax.Array) -> jax.Array:
    """[T]: token ids, those that the host does not send taken from the state of their slots [T]."""
    return jnp.where(token_ids == ON_DEVICE, last_tokens[slots], token_ids)


def _attend(
    model: Model,
    params: Parameters,
    pool: jax.Array,
    batch: dict[str, jax.Array],
    layout: PackedLayout,
    options: StepOptions,
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    config, mesh = model.config, options.mesh
    ragged = [batch[n] for n in ("seq_lens", "block_tables", "query_start", "distribution")]
    max_query_len = 1 if layout.bucket.decode_only else None
    prepared = prepare(
        pool, config.num_kv_heads, config.head_dim, layout.bucket.num_tokens, *ragged,
        max_query_len=max_query_len,
    )  # fmt: skip

    def attend(
        q: jax.Array, k: jax.Array, v: jax.Array, kv_pool: jax.Array, layer: Any, window: Any
    ) -> tuple[jax.Array, jax.Array]:
        def attention(*arguments: Any, scales: Any, window: Any, prepared: Any) -> Any:
            k_scale, v_scale = (1.0, 1.0) if scales is None else scales
            return ragged_paged_attention(
                *arguments,
                scale=config.head_dim**-0.5,
                window=window,
                k_scale=k_scale,
                v_scale=v_scale,
                max_query_len=max_query_len,
                prepared=prepared,
                implementation=options.attention,
            )

        arrays = (q, k, v, kv_pool, layer, *ragged)
        scales = None
        if KV_SCALES in params:  # [2, K]
            scales = jax.lax.dynamic_index_in_dim(
                params[KV_SCALES], layer, keepdims=False, allow_negative_indices=False
            )
        if mesh is None:
            return attention(*arrays, scales=scales, window=window, prepared=prepared)
        # each device attends with its own heads; a window that is a number stays one
        traced = None if isinstance(window, int) else window
        heads, in_pool = axis_spec(3, 1), pool_spec(kv_pool, config)
        whole = PartitionSpec()

        def on_device(arrays: Any, scales: Any, traced: Any, prepared: Any) -> Any:
            own_window = window if traced is None else traced
            return attention(*arrays, scales=scales, window=own_window, prepared=prepared)

        return jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(
                (heads, heads, heads, in_pool, *[whole] * (len(arrays) - 4)), axis_spec(2, 1),
                whole, whole,
            ),
            out_specs=(heads, in_pool),
            check_vma=False,
        )(arrays, scales, traced, prepared)  # fmt: skip

    return attend


def _next_state(
    state: State, batch: dict[str, jax.Array], tokens: jax.Array, chains: DraftChains
) -> State:
    """The state with the sampled tokens taken in."""
    is_valid, is_last = chains.verify(tokens, batch["samples"] > 0)
    num_slots = state.last_tokens.shape[0]
    written = jnp.where(is_last, batch["slots"], num_slots)  # out of range: dropped
    counted = is_valid & (batch["uses_table"] > 0)
    return state._replace(
        last_tokens=state.last_tokens.at[written].set(tokens, mode="drop"),
        token_info=sampler.count_tokens(state.token_info, batch["slots"], tokens, counted),
    )


def _prompt_logprobs(
    model: Model,
    params: Parameters,
    hidden: jax.Array,  # [T, E]
    token_ids: jax.Array,  # [T]
    rows: TokenRows,
    batch: dict[str, jax.Array],
    layout: PackedLayout,
) -> Logprobs:
    """Of the known token after each of the T tokens, a tile at a time: the logits of a whole
    prompt would not fit in memory."""
    num_tokens = token_ids.shape[0]
    if layout.bucket.decode_only:  # no row has a known token after it
        return sampler.no_logprobs(0)
    following = jnp.roll(token_ids, -1)
    is_last = jnp.arange(num_tokens) + 1 == batch["query_start"][rows.sequence + 1]
    following = jnp.where(is_last, batch["next_token_ids"][rows.sequence], following)
    padding = -num_tokens % LOGPROB_TILE

    def tile(args: tuple[jax.Array, jax.Array]) -> Logprobs:
        return sampler.raw_logprobs(model.logits(params, args[0]), args[1])

    def compute() -> Logprobs:
        tiles = jax.lax.map(
            tile,
            (
                jnp.pad(hidden, ((0, padding), (0, 0))).reshape(-1, LOGPROB_TILE, hidden.shape[1]),
                jnp.pad(following, (0, padding)).reshape(-1, LOGPROB_TILE),
            ),
        )
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:num_tokens], tiles)

    return jax.lax.cond(
        jnp.any(batch["wants_prompt_logprobs"] > 0),
        compute,
        partial(sampler.no_logprobs, num_tokens),
    )
