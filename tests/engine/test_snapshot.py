"""Engine.snapshot() and the histograms of Engine.stats(), against what the test put in."""

from __future__ import annotations

import random

import pytest
from fake_runner import VOCAB_SIZE, FakeRunner, ids

from jaxllm.config import EngineConfig
from jaxllm.engine.engine import Engine, EngineSnapshot, Request
from jaxllm.engine.histogram import Histogram
from jaxllm.sampling_params import SamplingParams

CONFIG = EngineConfig(
    num_blocks=12,
    block_size=4,
    max_model_len=40,
    max_num_seqs=3,
    max_num_batched_tokens=16,
    overlap=False,
)


def engine_with(*prompts: str, max_tokens: int = 8) -> Engine:
    engine = Engine(CONFIG, FakeRunner(CONFIG), vocab_size=VOCAB_SIZE)
    for number, prompt in enumerate(prompts):
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        engine.add_request(Request(f"r{number}", ids(prompt), params))
    return engine


def state_of_each_block(snapshot: EngineSnapshot) -> list[tuple[str, int | None]]:
    return [(state, who) for state, count, who in snapshot.block_runs() for _ in range(count)]


def test_an_idle_pool_is_one_free_run() -> None:
    snapshot = engine_with().snapshot()
    assert snapshot.block_runs() == [("free", 12, None)]
    assert (snapshot.running, snapshot.num_waiting, snapshot.kv_usage) == ((), 0, 0)


def test_blocks_belong_to_the_sequences_that_hold_them() -> None:
    engine = engine_with("abcdefgh", "ijk")
    engine.step()
    snapshot = engine.snapshot()
    first, second = snapshot.running
    assert (first.request_id, first.num_prompt_tokens, first.num_output_tokens) == ("r0", 8, 1)
    assert (second.request_id, second.num_prompt_tokens, second.num_output_tokens) == ("r1", 3, 1)
    assert snapshot.block_runs() == [("used", 2, 0), ("used", 1, 1), ("free", 9, None)]


def test_what_a_finished_request_left_is_cached() -> None:
    engine = engine_with("abcdefghi", max_tokens=1)
    while engine.has_unfinished_requests():
        engine.step()
    states = state_of_each_block(engine.snapshot())
    assert sorted(states) == [("cached", None)] * 2 + [("free", None)] * 10


def test_a_shared_block_is_the_oldest_sequences() -> None:
    engine = engine_with("abcdefghij")
    engine.step()
    engine.add_request(Request("late", ids("abcdefghzz"), SamplingParams(max_tokens=8)))
    engine.step()
    snapshot = engine.snapshot()
    old, late = snapshot.running
    assert old.block_table[:2] == late.block_table[:2]
    states = state_of_each_block(snapshot)
    assert [states[block] for block in late.block_table] == [("used", 0)] * 2 + [("used", 1)]


def test_runs_agree_with_the_pool_at_random_moments() -> None:
    rng = random.Random(0)
    engine = engine_with()
    for number in range(200):
        if rng.random() < 0.3:
            prompt = rng.choices(range(3), k=rng.randint(1, 20))
            engine.add_request(Request(f"r{number}", prompt, SamplingParams(max_tokens=6)))
        engine.step()
        snapshot, pool = engine.snapshot(), engine.scheduler.pool
        states = state_of_each_block(snapshot)
        assert len(states) == pool.num_blocks
        num_used = sum(state == "used" for state, _ in states)
        assert pool.num_free_blocks == pool.num_blocks - num_used
        for index, sequence in enumerate(snapshot.running):
            holders = [states[block][1] for block in sequence.block_table]
            assert all(holder is not None and holder <= index for holder in holders)
        for block, (state, _) in enumerate(states):
            if state != "used":
                assert (block in snapshot.cached_blocks) == (state == "cached")


@pytest.mark.parametrize(("value", "place"), [(0.5, 0), (1.0, 0), (1.5, 1), (2.0, 1), (9.0, 2)])
def test_a_histogram_counts_up_to_and_with_its_bounds(value: float, place: int) -> None:
    histogram = Histogram((1.0, 2.0))
    histogram.observe(value)
    stats = histogram.stats()
    assert stats.counts == tuple(int(i == place) for i in range(3))
    assert stats.total == value


def test_stats_count_each_step_and_its_tokens() -> None:
    engine = engine_with("abcdefgh", "ijk", max_tokens=3)
    while engine.has_unfinished_requests():
        engine.step()
    stats = engine.stats()
    assert stats.num_steps == 3  # 11 prompt tokens, then 2 and 2
    assert sum(stats.step_seconds.counts) == 3
    assert stats.step_seconds.total > 0
    assert stats.step_tokens.total == 15
    by_bound = dict(zip(stats.step_tokens.bounds, stats.step_tokens.counts, strict=False))
    assert (by_bound[2.0], by_bound[16.0]) == (2, 1)
    assert (stats.runner.num_tokens, stats.runner.num_padded_tokens) == (15, 30)
