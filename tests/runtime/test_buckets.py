"""Buckets: every batch fits one, and padding stays in its bounds."""

from __future__ import annotations

import pytest

from jaxllm.engine.batch import Bucket
from jaxllm.runtime.buckets import MIN_MIXED_TOKENS, MIN_ROWS, TokenRounding, fitting, plan_buckets

PLATFORMS = [pytest.param(True, id="cpu"), pytest.param(False, id="accelerator")]
LIMITS = [(1, 1), (1, 512), (5, 40), (8, 8), (9, 9), (20, 100), (64, 512), (100, 100), (100, 777)]


@pytest.mark.parametrize("on_cpu", PLATFORMS)
@pytest.mark.parametrize(("max_num_seqs", "max_num_batched_tokens"), LIMITS)
def test_every_batch_fits_the_first_fitting_bucket(
    max_num_seqs: int, max_num_batched_tokens: int, on_cpu: bool
) -> None:
    buckets = plan_buckets(max_num_seqs, max_num_batched_tokens, on_cpu=on_cpu)
    assert len(set(buckets)) == len(buckets)
    assert all(b.num_tokens >= b.num_seqs and b.num_seqs % MIN_ROWS == 0 for b in buckets)
    assert all(b.num_tokens == b.num_seqs for b in buckets if b.decode_only)
    for num_seqs in range(1, max_num_seqs + 1):
        decode = fitting(buckets, num_seqs, num_seqs, decode_only=True)
        assert decode[0].decode_only
        for num_tokens in {num_seqs, num_seqs + 1, 33, 65, max_num_batched_tokens}:
            if num_seqs <= num_tokens <= max_num_batched_tokens:
                fits = fitting(buckets, num_tokens, num_seqs, decode_only=False)
                assert fits
                assert all(b.num_tokens >= num_tokens and b.num_seqs >= num_seqs for b in fits)
                assert not any(b.decode_only for b in fits)


@pytest.mark.parametrize(("max_num_seqs", "max_num_batched_tokens"), LIMITS)
def test_padding_bounds(max_num_seqs: int, max_num_batched_tokens: int) -> None:
    buckets = plan_buckets(max_num_seqs, max_num_batched_tokens)
    for num_seqs in range(17, max_num_seqs + 1):
        bucket = fitting(buckets, num_seqs, num_seqs, decode_only=True)[0]
        assert 3 * (bucket.num_tokens - num_seqs) <= bucket.num_tokens
    for num_tokens in range(max(MIN_MIXED_TOKENS, max_num_seqs), max_num_batched_tokens + 1):
        for num_seqs in (1, max_num_seqs):
            bucket = fitting(buckets, num_tokens, num_seqs, decode_only=False)[0]
            assert bucket.num_tokens < 2 * num_tokens


def test_the_buckets_of_a_small_engine() -> None:
    decode = [Bucket(n, n, decode_only=True) for n in (8, 16, 24, 32, 40)]
    small = [Bucket(n, 8, decode_only=False) for n in (32, 64, 128, 200)]
    large = [Bucket(n, 40, decode_only=False) for n in (64, 128, 200)]
    assert plan_buckets(33, 200) == (*decode, *small, *large)
    drafts = Bucket(8, 8, decode_only=False)
    assert plan_buckets(33, 200, with_drafts=True) == (*decode, drafts, *small, *large)
    assert plan_buckets(8, 8, with_drafts=True) == plan_buckets(8, 8)


def test_on_accelerators_few_are_compiled() -> None:
    def planned(max_num_seqs: int, max_num_batched_tokens: int) -> list[str]:
        return [
            str(bucket)
            for bucket in plan_buckets(max_num_seqs, max_num_batched_tokens, on_cpu=False)
        ]

    decode = [f"decode {n}x{n}" for n in (8, 16, 32, 64)]
    assert planned(64, 512) == [*decode, "mixed 128x64", "mixed 256x64", "mixed 512x64"]
    assert planned(5, 40) == ["decode 8x8", "mixed 40x8"]
    mixed = [f"mixed {t}x{s}" for s in (64, 160) for t in (128, 256, 304) if t >= s]
    assert planned(160, 300) == [*decode, "decode 128x128", "decode 160x160", *mixed]
    assert planned(8, 8) == list(map(str, plan_buckets(8, 8)))
    drafts = plan_buckets(64, 512, on_cpu=False, with_drafts=True)
    assert drafts == plan_buckets(64, 512, on_cpu=False)


def test_a_decode_batch_may_run_in_a_mixed_bucket_but_not_the_reverse() -> None:
    buckets = plan_buckets(8, 32)
    assert fitting(buckets, 4, 4, decode_only=True) == list(buckets)
    assert fitting(buckets, 4, 4, decode_only=False) == [Bucket(32, 8, decode_only=False)]


def test_the_least_padding_comes_first() -> None:
    buckets = [
        Bucket(64, 64, False),
        Bucket(64, 8, False),
        Bucket(16, 16, True),
        Bucket(16, 16, False),
    ]
    assert fitting(reversed(buckets), 9, 8, decode_only=True) == [
        Bucket(16, 16, True), Bucket(16, 16, False), Bucket(64, 8, False), Bucket(64, 64, False),
    ]  # fmt: skip


def test_buckets_that_are_too_small_do_not_fit() -> None:
    buckets = plan_buckets(8, 32)
    assert fitting(buckets, 33, 8, decode_only=False) == []
    assert fitting(buckets, 9, 9, decode_only=True) == []


@pytest.mark.parametrize(
    ("num_tokens", "rounded"),
    [(1, 1), (31, 31), (32, 32), (33, 32), (42, 32), (43, 43), (63, 63), (64, 64), (85, 64),
     (86, 86), (128, 128), (170, 128), (171, 171), (199, 199), (200, 200), (266, 200)],
)  # fmt: skip
def test_tokens_are_rounded_down_when_little_is_left_over(num_tokens: int, rounded: int) -> None:
    for with_drafts in (False, True):
        buckets = plan_buckets(33, 200, with_drafts=with_drafts)
        assert TokenRounding(buckets)(num_tokens) == rounded


def test_rounded_steps_are_padded_by_less_than_a_third() -> None:
    buckets = plan_buckets(64, 2048)
    rounding = TokenRounding(buckets)
    for num_tokens in range(MIN_MIXED_TOKENS, 2049):
        rounded = rounding(num_tokens)
        assert 0.75 * num_tokens <= rounded <= num_tokens
        bucket = fitting(buckets, rounded, 1, decode_only=False)[0]
        assert 3 * (bucket.num_tokens - rounded) < bucket.num_tokens


def test_rounding_knows_mixed_buckets_only() -> None:
    assert TokenRounding([Bucket(8, 8, True), Bucket(32, 8, False)])(9) == 9
