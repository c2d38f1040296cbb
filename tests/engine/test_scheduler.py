import time

import pytest

from jaxllm.config import EngineConfig
from jaxllm.engine.scheduler import Scheduler
from jaxllm.engine.sequence import Sequence, SequenceStatus
from jaxllm.engine.waiting_queue import WaitingQueue
from jaxllm.sampling_params import SamplingParams


def make_scheduler(round_budget=None, **options):
    defaults = {
        "num_blocks": 16, "block_size": 4, "max_model_len": 32, "max_num_seqs": 4,
        "max_num_batched_tokens": 16,
    }  # fmt: skip
    return Scheduler(EngineConfig(**(defaults | options)), round_budget)


def make_sequence(sequence_id, prompt, *, priority=0, arrival_time=None, **options):
    token_ids = list(prompt) if not isinstance(prompt, int) else [sequence_id] * prompt
    return Sequence(
        sequence_id=sequence_id,
        request_id=str(sequence_id),
        index=options.pop("index", 0),
        params=SamplingParams(**options),
        seed=0,
        token_ids=token_ids,
        num_prompt_tokens=len(token_ids),
        priority=priority,
        arrival_time=sequence_id if arrival_time is None else arrival_time,
    )


def rows(batch):
    """(sequence id, start, number of tokens, samples) of each row."""
    return [
        (row.sequence.sequence_id, row.start, row.num_tokens, bool(row.samples))
        for row in batch.sequences
    ]


def step(scheduler):
    """Schedules, and gives each sampling sequence a token of its own."""
    batch = scheduler.schedule()
    live = list(scheduler.running)
    scheduler.pool.check_integrity(live)
    for row in batch.sequences:
        if row.samples:
            row.sequence.token_ids.append(1000 + row.sequence.sequence_id)
    return rows(batch)


def test_nothing_to_do_is_no_batch():
    assert make_scheduler().schedule() is None


def test_a_prompt_is_computed_in_chunks_and_then_decodes():
    scheduler = make_scheduler(max_num_batched_tokens=8)
    scheduler.add(make_sequence(1, 18))
    assert [step(scheduler) for _ in range(5)] == [
        [(1, 0, 8, False)],
        [(1, 8, 8, False)],
        [(1, 16, 2, True)],
        [(1, 18, 1, True)],
        [(1, 19, 1, True)],
    ]


def test_decodes_come_first_and_prompts_share_what_is_left():
    scheduler = make_scheduler(max_num_batched_tokens=8)
    scheduler.add(make_sequence(1, 12))
    step(scheduler)
    scheduler.add(make_sequence(2, 3))
    scheduler.add(make_sequence(3, 9))
    assert step(scheduler) == [(1, 8, 4, True), (2, 0, 3, True), (3, 0, 1, False)]
    batch = scheduler.schedule()
    assert rows(batch) == [(1, 12, 1, True), (2, 3, 1, True), (3, 1, 6, False)]
    assert batch.num_decodes == 2
    assert batch.num_tokens == 8


def test_with_the_budget_full_of_decodes_a_prompt_still_gets_its_token():
    scheduler = make_scheduler(max_num_batched_tokens=4, max_num_seqs=4)
    for sequence_id in (1, 2, 3):
        scheduler.add(make_sequence(sequence_id, 1))
    step(scheduler)
    scheduler.add(make_sequence(4, 3))
    assert [step(scheduler)[-1] for _ in range(3)] == [
        (4, 0, 1, False),
        (4, 1, 1, False),
        (4, 2, 1, True),
    ]


def test_an_older_prompt_does_not_take_a_younger_decodes_token():
    scheduler = make_scheduler(max_num_batched_tokens=8, max_num_seqs=2, policy="priority")
    scheduler.add(make_sequence(1, 2, priority=5))
    step(scheduler)
    scheduler.add(make_sequence(2, 20, priority=0))
    assert step(scheduler) == [(1, 2, 1, True), (2, 0, 7, False)]
    assert step(scheduler) == [(1, 3, 1, True), (2, 7, 7, False)]


def test_slots_are_unique_and_reused():
    scheduler = make_scheduler(max_num_seqs=2)
    first, second, third = (make_sequence(i, 2) for i in (1, 2, 3))
    for sequence in (first, second, third):
        scheduler.add(sequence)
    step(scheduler)
    assert {first.slot, second.slot} == {0, 1}
    assert third.status is SequenceStatus.WAITING
    freed = first.slot
    scheduler.finish(first, "stop")
    assert step(scheduler) == [(2, 2, 1, True), (3, 0, 2, True)]
    assert (third.slot, first.slot) == (freed, -1)


def test_siblings_share_full_prompt_blocks_within_one_step():
    scheduler = make_scheduler(max_num_batched_tokens=16)
    prompt = list(range(10))
    one, two = make_sequence(1, prompt), make_sequence(2, prompt)
    scheduler.add(one)
    scheduler.add(two)
    assert step(scheduler) == [(1, 0, 10, True), (2, 8, 2, True)]
    assert one.block_table[:2] == two.block_table[:2]
    assert one.block_table[2] != two.block_table[2]
    assert (one.num_cached_tokens, two.num_cached_tokens) == (0, 8)
    assert (scheduler.pool.num_queried_tokens, scheduler.pool.num_hit_tokens) == (20, 8)


def test_a_one_token_row_that_reads_this_steps_blocks_comes_after_their_writer():
    scheduler = make_scheduler()
    scheduler.add(make_sequence(1, range(9)))
    scheduler.add(make_sequence(2, range(9)))
    batch = scheduler.schedule()
    assert rows(batch) == [(1, 0, 9, True), (2, 8, 1, True)]
    assert batch.num_decodes == 0
    scheduler.add(make_sequence(3, range(9)))  # now the blocks are of an earlier step
    for row in batch.sequences:
        row.sequence.token_ids.append(7)
    assert scheduler.schedule().num_decodes == 3


def test_a_fully_cached_prompt_still_computes_its_last_block():
    scheduler = make_scheduler()
    scheduler.add(make_sequence(1, range(8)))
    step(scheduler)
    scheduler.add(make_sequence(2, range(8)))
    assert step(scheduler)[1] == (2, 4, 4, True)


def test_generated_blocks_are_found_by_the_next_turn():
    scheduler = make_scheduler()
    first = make_sequence(1, [5, 6, 7])
    scheduler.add(first)
    for _ in range(6):
        step(scheduler)
    scheduler.finish(first, "length")
    scheduler.add(make_sequence(2, [*first.token_ids[:8], 9]))
    assert step(scheduler) == [(2, 8, 1, True)]


def test_without_prefix_caching_nothing_is_shared():
    scheduler = make_scheduler(enable_prefix_caching=False)
    scheduler.add(make_sequence(1, range(8)))
    scheduler.add(make_sequence(2, range(8)))
    assert step(scheduler) == [(1, 0, 8, True), (2, 0, 8, True)]


def test_prompt_logprobs_bypass_the_cache_for_the_first_answer_only():
    scheduler = make_scheduler(max_num_batched_tokens=32)
    for sequence_id, index in ((1, 0), (2, 0), (3, 1)):
        scheduler.add(make_sequence(sequence_id, range(8), index=index, prompt_logprobs=1))
    assert step(scheduler) == [(1, 0, 8, True), (2, 0, 8, True), (3, 4, 4, True)]


def test_the_youngest_is_preempted_and_comes_back_before_later_ones():
    scheduler = make_scheduler(
        num_blocks=8, max_num_seqs=3, max_num_batched_tokens=32, enable_prefix_caching=False
    )
    old, young, late = make_sequence(1, 15), make_sequence(2, 12), make_sequence(3, 4)
    scheduler.add(old)
    scheduler.add(young)
    step(scheduler)
    scheduler.add(late)  # does not fit beside the watermark
    assert step(scheduler) == [(1, 15, 1, True), (2, 12, 1, True)]
    assert step(scheduler) == [(1, 16, 1, True)]
    assert young.num_preemptions == scheduler.num_preemptions == 1
    assert (young.block_table, young.num_computed_tokens, young.slot) == ([], 0, -1)
    assert scheduler.num_waiting == 2
    scheduler.finish(old, "length")
    assert [row[:2] for row in step(scheduler)] == [(2, 0), (3, 0)]


@pytest.mark.parametrize("prompt_logprobs", [None, 1])  # these were delivered before
def test_a_preempted_sequence_finds_its_blocks_in_the_cache(prompt_logprobs):
    scheduler = make_scheduler(num_blocks=8, max_num_batched_tokens=32)
    old = make_sequence(1, range(12))
    young = make_sequence(2, range(50, 62), prompt_logprobs=prompt_logprobs)
    scheduler.add(old)
    scheduler.add(young)
    while not young.num_preemptions:
        step(scheduler)
    scheduler.finish(old, "length")
    (row,) = step(scheduler)
    assert row[0] == 2
    assert row[1] >= 12
    assert young.num_cached_tokens == 0, "what the first admission found"


def test_the_oldest_may_grow_to_the_whole_pool():
    scheduler = make_scheduler(num_blocks=8, max_num_batched_tokens=32, max_num_seqs=2)
    old, young = make_sequence(1, 14), make_sequence(2, 10)
    scheduler.add(old)
    scheduler.add(young)
    while old.num_tokens < 32:
        step(scheduler)
    assert old.num_preemptions == 0
    assert len(old.block_table) == 8


def test_admission_waits_for_room_for_the_whole_prompt():
    scheduler = make_scheduler(num_blocks=8, max_num_batched_tokens=4)
    scheduler.add(make_sequence(1, 4))
    step(scheduler)
    scheduler.add(make_sequence(2, 28))  # its first chunk would fit
    assert step(scheduler) == [(1, 4, 1, True)]


@pytest.mark.parametrize(("num_tokens", "admitted"), [(12, True), (13, False)])
def test_admission_leaves_the_watermark_free(num_tokens, admitted):
    scheduler = make_scheduler(num_blocks=8, max_num_batched_tokens=32)
    scheduler.add(make_sequence(1, 12))
    step(scheduler)
    scheduler.add(make_sequence(2, num_tokens))
    step(scheduler)
    assert scheduler.num_running == (2 if admitted else 1)


def test_nobody_is_admitted_in_a_step_that_preempted():
    scheduler = make_scheduler(num_blocks=8, max_num_batched_tokens=32, policy="priority")
    scheduler.add(make_sequence(1, 16, priority=0))
    scheduler.add(make_sequence(2, 12, priority=2))
    step(scheduler)
    scheduler.add(make_sequence(3, 4, priority=1))
    assert step(scheduler) == [(1, 16, 1, True)]
    assert scheduler.num_preemptions == 1
    assert step(scheduler) == [(1, 17, 1, True), (3, 0, 4, True)]


def test_priority_decides_who_is_admitted_and_who_is_preempted():
    scheduler = make_scheduler(policy="priority", max_num_seqs=1)
    for sequence_id, priority in ((1, 3), (2, 1), (3, 2)):
        scheduler.add(make_sequence(sequence_id, 2, priority=priority))
    assert step(scheduler) == [(2, 0, 2, True)]

    scheduler = make_scheduler(policy="priority", num_blocks=8, max_num_batched_tokens=32)
    early, urgent = make_sequence(1, 12, priority=1), make_sequence(2, 12, priority=0)
    scheduler.add(early)
    scheduler.add(urgent)
    while not scheduler.num_preemptions:
        step(scheduler)
    assert (early.num_preemptions, urgent.num_preemptions) == (1, 0)


def test_finish_at_any_moment_frees_everything():
    scheduler = make_scheduler(max_num_batched_tokens=8, max_num_seqs=2)
    chunked, decoding, waiting = make_sequence(1, 20), make_sequence(2, 2), make_sequence(3, 4)
    scheduler.add(decoding)
    step(scheduler)
    for sequence in (chunked, waiting):
        scheduler.add(sequence)
    step(scheduler)
    for sequence in (chunked, decoding, waiting):
        scheduler.finish(sequence, "abort")
        assert sequence.finish_reason == "abort"
    assert scheduler.pool.num_free_blocks == 16
    scheduler.pool.check_integrity([])
    assert (scheduler.num_running, scheduler.num_waiting) == (0, 0)
    assert scheduler.schedule() is None


@pytest.mark.parametrize(
    ("preferred", "expected"),
    [
        (8, [(1, 0, 6, True), (2, 0, 2, False)]),
        (7, [(1, 0, 6, True), (2, 0, 1, False)]),
        (6, [(1, 0, 6, True), (2, 0, 5, True)]),  # nothing of the chunk would remain
        (11, [(1, 0, 6, True), (2, 0, 5, True)]),
    ],
)
def test_round_budget_shortens_the_last_chunk(preferred, expected):
    asked = []
    scheduler = make_scheduler(round_budget=lambda number: asked.append(number) or preferred)
    scheduler.add(make_sequence(1, 6))
    scheduler.add(make_sequence(2, 5))
    assert step(scheduler) == expected
    assert asked == [11]


def test_round_budget_is_not_asked_about_decodes():
    asked = []
    scheduler = make_scheduler(round_budget=lambda number: asked.append(number) or number)
    scheduler.add(make_sequence(1, 6))
    step(scheduler)
    step(scheduler)
    assert asked == [6]


def test_what_round_budget_put_off_cannot_be_found_in_the_cache():
    scheduler = make_scheduler(round_budget=lambda number: min(number, 6), max_num_seqs=2)
    shortened = make_sequence(1, range(12))
    scheduler.add(shortened)
    assert step(scheduler) == [(1, 0, 6, False)]
    assert len(scheduler.pool.match_prefix(shortened.block_hashes)) == 1


def test_waiting_queue_forgets_discarded_sequences():
    queue = WaitingQueue(lambda sequence: (sequence.sequence_id,))
    sequences = [make_sequence(i, 1) for i in range(200)]
    for sequence in reversed(sequences):
        queue.add(sequence)
    for sequence in sequences[:150]:
        queue.discard(sequence)
    assert len(queue) == 50
    assert len(queue._heap) <= 2 * 50 + 16
    assert [queue.pop_first().sequence_id for _ in range(50)] == list(range(150, 200))


def seconds_a_step(num_blocks, num_waiting):
    """Median over decode steps of 64 sequences that others wait behind."""
    scheduler = make_scheduler(
        num_blocks=num_blocks, block_size=16, max_model_len=1024, max_num_seqs=64,
        max_num_batched_tokens=1024,
    )  # fmt: skip
    for sequence_id in range(64 + num_waiting):
        scheduler.add(make_sequence(sequence_id, 16))
    times = []
    for _ in range(60):
        start = time.perf_counter()
        batch = scheduler.schedule()
        times.append(time.perf_counter() - start)
        for row in batch.sequences:
            row.sequence.token_ids.append(1)
    return sorted(times)[30]


@pytest.mark.alone
def test_a_step_costs_the_same_with_many_blocks_and_many_waiting():
    small, large = seconds_a_step(700, 0), seconds_a_step(100_000, 10_000)
    assert small < 2e-3
    assert large < 3 * small + 2e-4
