"""Which shapes are compiled: few, and close enough that padding stays small."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable

from jaxllm.engine.batch import Bucket

MIN_ROWS = 8  # a bfloat16 product with fewer rows is slower on the CPU, and tiles are 8 rows on TPU
MIN_MIXED_TOKENS = 32
# On accelerators reading the weights takes as long as multiplying them with 200 to 600 rows, so
# that padding below costs next to nothing, and each bucket less is a compilation less.
MIN_MIXED_TOKENS_OF_ACCELERATORS = 128
FEW_SEQS_OF_ACCELERATORS = 64


def plan_buckets(
    max_num_seqs: int,
    max_num_batched_tokens: int,
    *,
    with_drafts: bool = False,
    on_cpu: bool = True,
) -> tuple[Bucket, ...]:
    """All buckets of an engine.

    Decode: 8, 16, 24, 32, 48, 64, ... sequences, so that above 16 at most a third of the rows is
    padding; on accelerators powers of two. Mixed: powers of two of tokens up to the budget; for one
    sequence or a few, which is what the first token of a quiet server waits for, and for all of
    them. with_drafts: on CPU one more for the drafts of a sequence or two, which need not be padded
    like a prompt.
    """
    most_seqs = _round_up(max_num_seqs, MIN_ROWS)
    decode = [Bucket(n, n, decode_only=True) for n in _seq_sizes(most_seqs, with_halves=on_cpu)]
    tokens, size = [], MIN_MIXED_TOKENS if on_cpu else MIN_MIXED_TOKENS_OF_ACCELERATORS
    most_tokens = max(_round_up(max_num_batched_tokens, MIN_ROWS), most_seqs)
    while size < most_tokens:
        tokens.append(size)
        size *= 2
    tokens.append(most_tokens)
    few = MIN_ROWS if on_cpu else min(FEW_SEQS_OF_ACCELERATORS, most_seqs)
    seqs = sorted({few, most_seqs})
    mixed = [Bucket(t, s, decode_only=False) for s in seqs for t in tokens if t >= s]
    smallest = Bucket(MIN_ROWS, MIN_ROWS, decode_only=False)
    if with_drafts and on_cpu and smallest not in mixed:
        mixed.insert(0, smallest)
    return (*decode, *mixed)


def fitting(
    buckets: Iterable[Bucket], num_tokens: int, num_seqs: int, decode_only: bool
) -> list[Bucket]:
    """The buckets that can run such a batch, the least padding first."""
    fits = [
        b
        for b in buckets
        if b.num_tokens >= num_tokens
        and b.num_seqs >= num_seqs
        and (decode_only or not b.decode_only)
    ]
    return sorted(fits, key=lambda b: (b.num_tokens, b.num_seqs, not b.decode_only))


class TokenRounding:
    """Rounds the tokens of a step down to the size of a mixed bucket when that leaves at most a
    quarter of them for later: a long prompt's chunks fill their buckets, and none dribbles away in
    tiny chunks. What is not rounded fills more than two thirds of the next power of two. Below
    MIN_MIXED_TOKENS nothing is: one step takes them all."""

    def __init__(self, buckets: Iterable[Bucket]) -> None:
        mixed = {b.num_tokens for b in buckets if not b.decode_only}
        self._sizes = sorted(size for size in mixed if size >= MIN_MIXED_TOKENS)

    def __call__(self, num_tokens: int) -> int:
        index = bisect_right(self._sizes, num_tokens)
        size = self._sizes[index - 1] if index else 0
        return size if 3 * num_tokens <= 4 * size else num_tokens


def _seq_sizes(most: int, *, with_halves: bool) -> list[int]:
    sizes, size = [], MIN_ROWS
    while size < most:
        sizes.append(size)
        # 8 16 24 32 48 64 96 128 ...: a power of two, then half as much again
        power = 1 << (size.bit_length() - 1)
        is_halved = with_halves and size == power and size > MIN_ROWS
        size = size + power // 2 if is_halved else 2 * power
    return [*sizes, most]


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
