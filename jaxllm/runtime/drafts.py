"""Speculation on the device: which rows of a step sample after which drafts.

A sequence with k drafts has a chain of k + 1 rows: the first samples after its last known token,
each other one after one draft more. Every row draws its token from the model's distribution there,
by the sequence's seed and the token's position, as if it came alone. A draft counts as right if
the row before has drawn just it; the first row of a chain whose token differs from its draft, or
that has none, yields the last token. For a draft d that does not depend on the random numbers
that is rejection sampling, exact for every option: d is accepted with its probability p(d), else
the token is drawn from p without d (Leviathan et al. 2023, with a q that is 1 at d). And since the
draw itself does not depend on the drafts, a seed gives the same tokens with and without them, even
where drafts were drawn with the same random numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.engine.sequence import NO_TOKEN


class DraftChains(NamedTuple):
    """The chains of a step's S rows; rows of sequences without drafts are chains of one. All None
    for a bucket that verifies none."""

    drafts: jax.Array | None = None  # [S] int32, what a row verifies
    previous_rows: jax.Array | None = None  # [S] int32, a chain's first row has itself
    tokens_before: jax.Array | None = None  # [S, max_drafts] int32, the drafts before a row

    @classmethod
    def of(cls, batch: dict[str, jax.Array], max_drafts: int) -> DraftChains:
        """Those of a batch with at most so many drafts of a sequence."""
        if not max_drafts:
            return cls()
        drafts, previous_rows = batch["drafts"], batch["previous_rows"]
        row, before = jnp.arange(drafts.shape[0]), []
        for _ in range(max_drafts):
            previous = previous_rows[row]
            before.append(jnp.where(previous == row, NO_TOKEN, drafts[previous]))
            row = previous
        return cls(drafts, previous_rows, jnp.stack(before, axis=-1))

    def verify(self, tokens: jax.Array, samples: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Which of the sampled tokens [S] count, and which are the last of their sequences; both
        [S] bool. samples: [S] bool, the rows of sequences that sample."""
        if self.drafts is None or self.previous_rows is None or self.tokens_before is None:
            return samples, samples
        is_right = tokens == self.drafts
        is_first = self.previous_rows == jnp.arange(tokens.shape[0])
        follows = is_first | is_right[self.previous_rows]
        is_valid = samples
        for _ in range(self.tokens_before.shape[1]):
            is_valid = follows & is_valid & (is_first | is_valid[self.previous_rows])
        return is_valid, is_valid & ~is_right
