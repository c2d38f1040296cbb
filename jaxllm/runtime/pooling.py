"""From hidden states to one vector a sequence, over as many steps as its prompt takes."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxllm.engine.batch import POOLING_CODES
from pallas_kernels.ragged_paged_attention.layout import TokenRows


def pool_hidden(
    hidden: jax.Array,  # [T, E]
    rows: TokenRows,
    batch: dict[str, jax.Array],
    sums: jax.Array,  # [num_slots, E] float32, of the prompts' tokens before this step
) -> tuple[jax.Array, jax.Array]:
    """The pooled vector [S, E] float32 of each row, and the new sums. A row's vector is complete in
    the step that computes the last token of its prompt, and zero if it does not embed.

    A batch without embeddings computes nothing, and the sums are updated in place or passed on.
    """
    is_mean = batch["pooling"] == POOLING_CODES["mean"]  # [S]
    is_last = batch["pooling"] == POOLING_CODES["last"]  # [S]
    num_seqs, num_slots = is_mean.shape[0], sums.shape[0]

    def pool(sums: jax.Array) -> tuple[jax.Array, jax.Array]:
        wide = hidden.astype(jnp.float32)
        counted = rows.valid & is_mean[rows.sequence]
        # No product with a mask: it would carry one sequence's NaN into the others.
        of_step = jax.ops.segment_sum(
            wide, jnp.where(counted, rows.sequence, num_seqs), num_segments=num_seqs
        )  # [S, E]
        num_new = jnp.diff(batch["query_start"])
        goes_on = batch["seq_lens"] > num_new  # [S]
        before = jnp.where(goes_on[:, None], sums[batch["slots"]], 0)
        total = before + of_step
        lens = jnp.maximum(batch["prompt_lens"], 1)[:, None]
        last = wide[jnp.maximum(batch["query_start"][1:] - 1, 0)]
        pooled = jnp.where(is_mean[:, None], total / lens, jnp.where(is_last[:, None], last, 0))
        written = jnp.where(is_mean, batch["slots"], num_slots)  # out of range: dropped
        return pooled, sums.at[written].set(total, mode="drop")

    def no_pool(sums: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.zeros((num_seqs, hidden.shape[1]), jnp.float32), sums

    pooled, sums = jax.lax.cond(jnp.any(batch["pooling"] > 0), pool, no_pool, sums)
    return pooled, sums
