"""A draft model that shares the model's block tables: what it computes, skips and says. FakeRunner
holds that what it reads of a block is what it computed of that prefix itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from fake_runner import VOCAB_SIZE, FakeRunner, hashed_token, ids

from jaxllm.config import EngineConfig
from jaxllm.engine.draft_model import DraftModel
from jaxllm.engine.engine import Engine, Request
from jaxllm.engine.sequence import NOT_FINITE, Batch, Sequence
from jaxllm.engine.speculation import FADING, Outlook, Speculator
from jaxllm.sampling_params import SamplingParams

CONFIG = EngineConfig(
    num_blocks=32, block_size=4, max_model_len=64, max_num_seqs=4, max_num_batched_tokens=16,
    max_steps_per_dispatch=3, num_speculative_tokens=3,
)  # fmt: skip
PROMPT = ids("abcdefghi")


def draft_model(**options: Any) -> tuple[DraftModel, FakeRunner]:
    runner = FakeRunner(CONFIG, **options)
    return DraftModel(runner, CONFIG, cost=0.1), runner


def decoding(
    token_ids: list[int], blocks: list[int], *, number: int = 0, **options: Any
) -> Sequence:
    """A sequence whose last token is not computed yet."""
    return Sequence(
        number, str(number), 0, SamplingParams(seed=1), 1, token_ids, len(token_ids) - 1,
        num_computed_tokens=len(token_ids) - 1, slot=number, block_table=blocks, **options,
    )  # fmt: skip


def said(sequence: Sequence, count: int) -> list[int]:
    """What the fake model says next."""
    view = replace(sequence, token_ids=list(sequence.token_ids))
    for _ in range(count):
        view.token_ids.append(hashed_token(view))
    return view.token_ids[len(sequence.token_ids) :]


def computed(runner: FakeRunner) -> list[tuple[int, int]]:
    """Tokens and dispatched decoding steps of each batch."""
    return [(batch.num_tokens, batch.num_steps) for batch in runner.batches]


def test_what_was_not_computed_comes_first_and_then_one_dispatch() -> None:
    model, runner = draft_model()
    sequence = decoding(PROMPT.copy(), [5, 2, 9])
    expected = said(sequence, 4)
    assert model.propose([sequence], 3) == [expected[:3]]
    assert computed(runner) == [(9, 1), (1, 2)]
    sequence.token_ids += [expected[0], 26]  # the second guess was wrong
    assert model.propose([sequence], 1) == [said(sequence, 1)]
    assert computed(runner)[2:] == [(1, 1)]  # the first one's keys and values were right
    assert sequence.num_tokens == 11


def test_what_follows_a_wrong_guess_is_computed_again() -> None:
    model, runner = draft_model()
    sequence = decoding(PROMPT.copy(), [5, 2, 9, 1])
    model.propose([sequence], 3)
    sequence.token_ids += ids("zzz")  # of which none was guessed
    assert model.propose([sequence], 1) == [said(sequence, 1)]
    assert computed(runner)[2:] == [(3, 1)]


def test_a_block_is_shared_again_after_its_last_token_was_computed_again() -> None:
    model, runner = draft_model()
    one = decoding(PROMPT[:8], [5, 2, 9])
    model.propose([one], 1)
    model.propose([one], 1)  # nothing has come meanwhile
    model.propose([one], 1)
    model.propose([decoding(PROMPT[:8] + ids("zz"), [5, 2, 7], number=1)], 1)
    assert computed(runner) == [(8, 1), (1, 1), (1, 1), (2, 1)]


def test_after_guesses_that_were_all_right_two_tokens_are_new() -> None:
    model, runner = draft_model()
    sequence = decoding(PROMPT.copy(), [5, 2, 9, 1])
    expected = said(sequence, 4)
    model.propose([sequence], 3)
    sequence.token_ids += expected
    model.propose([sequence], 2)
    assert computed(runner)[2:] == [(2, 1), (1, 1)]


def test_guesses_end_with_the_blocks() -> None:
    model, _ = draft_model()
    sequence = decoding(PROMPT.copy(), [5, 2, 9])
    assert model.propose([sequence], 8) == [
        said(sequence, 4)
    ]  # of the last one nothing is computed


def test_blocks_computed_for_another_sequence_are_not_computed_again() -> None:
    model, runner = draft_model()
    one = decoding(PROMPT.copy(), [5, 2, 9])
    model.propose([one], 1)
    other = decoding(PROMPT[:8] + ids("zz"), [5, 2, 7], number=1)
    model.propose([other], 1)
    assert computed(runner) == [(9, 1), (2, 1)]


def test_two_that_begin_together_compute_their_prompt_once() -> None:
    model, runner = draft_model()
    both = [decoding(PROMPT.copy(), [5, 2, 9 + i], number=i) for i in range(2)]
    assert model.propose(both, 1) == [said(sequence, 1) for sequence in both]
    assert computed(runner) == [(9 + 1, 1)]


@pytest.mark.parametrize(
    ("token_ids", "blocks", "salt"),
    [
        (PROMPT[:7] + ids("zz"), [5, 2, 7], None),  # another prefix in blocks of the same numbers
        (PROMPT, [5, 8, 7], None),  # the same prefix in a block that this model has not computed
        (PROMPT, [5, 2, 7], "salt"),
    ],
)
def test_other_content_is_not_trusted(
    token_ids: list[int], blocks: list[int], salt: str | None
) -> None:
    model, runner = draft_model()
    model.propose([decoding(PROMPT.copy(), [5, 2, 9])], 1)
    model.propose([decoding(token_ids.copy(), blocks, number=1, cache_salt=salt)], 1)
    shared = 4 if salt is None else 0
    assert computed(runner)[1] == (9 - shared, 1)


def test_a_block_that_was_written_to_is_not_trusted() -> None:
    """Not even where the hash of what it holds becomes the old one again."""
    model, runner = draft_model()
    model.propose([decoding(PROMPT.copy(), [5, 2, 9])], 1)
    model.propose([decoding(ids("zzzzzz"), [8, 2, 3], number=1)], 1)
    model.propose([decoding(PROMPT.copy(), [5, 2, 9], number=2)], 1)
    assert computed(runner)[2] == (5, 1)


def test_a_preempted_sequence_trusts_only_hashes() -> None:
    model, runner = draft_model()
    sequence = decoding(PROMPT.copy(), [5, 2, 9])
    model.propose([sequence], 1)
    sequence.num_preemptions += 1
    sequence.block_table = [5, 6, 9]
    model.propose([sequence], 1)
    assert computed(runner) == [(9, 1), (5, 1)]


def test_a_long_prompt_takes_several_calls_and_holds_up_nobody() -> None:
    model, runner = draft_model()
    long = decoding([i % VOCAB_SIZE for i in range(30)], list(range(10, 19)))
    short = decoding(PROMPT.copy(), [5, 2, 9], number=1)
    assert model.propose([long, short], 2) == [[], said(short, 2)]
    assert model.propose([long], 2) == [[]]
    assert model.propose([long], 2) == [said(long, 2)]
    assert computed(runner) == [(16, 1), (1, 1), (16, 1), (7, 1), (1, 1)]


def test_only_programs_that_are_ready_are_used() -> None:
    runner = FakeRunner(CONFIG)
    model = DraftModel(runner, CONFIG, 0.1, max_rows=lambda: 1, max_steps=lambda _: 1)
    both = [decoding(PROMPT.copy(), [5, 2, 9 + i], number=i) for i in range(2)]
    assert model.propose(both, 3) == [said(both[0], 2), []]
    assert computed(runner) == [(9, 1), (1, 1)]


def test_no_step_is_waited_for_before_it_is_ready() -> None:
    sequence = decoding(PROMPT.copy(), [5, 2, 9])
    sequence.expect(1)
    sequence.num_computed_tokens += 1
    for num_rows in (0, 1):
        model = DraftModel(FakeRunner(CONFIG), CONFIG, 0.1, max_rows=lambda rows=num_rows: rows)
        assert Speculator(model, 3, row_cost=0.01).wants_results([sequence], 4) == (num_rows > 0)


def test_a_guess_that_is_not_finite_is_a_wrong_token() -> None:
    model, _ = draft_model(is_ok=lambda _: False)
    [guess] = model.propose([decoding(PROMPT.copy(), [5, 2, 9])], 3)
    assert NOT_FINITE not in guess
    assert set(guess) <= set(range(VOCAB_SIZE))


def test_nothing_is_left_after_a_reset() -> None:
    model, runner = draft_model()
    sequence = decoding(PROMPT.copy(), [5, 2, 9])
    model.propose([sequence], 1)
    model.reset()
    model.propose([sequence], 1)
    assert computed(runner) == [(9, 1), (9, 1)]
    assert runner.num_resets == 1


# ---- with the engine


def run(requests: list[Request], *, cost: float = 0.1, **options: Any) -> tuple[Engine, FakeRunner]:
    """Requests on an engine whose draft model says what the model says."""
    config = replace(CONFIG, max_steps_per_dispatch=1)
    draft_runner = FakeRunner(CONFIG, **options)
    proposer = DraftModel(draft_runner, CONFIG, cost)
    speculator = Speculator(proposer, 3, row_cost=0.01)
    engine = Engine(config, FakeRunner(config), vocab_size=VOCAB_SIZE, speculator=speculator)
    for request in requests:
        engine.add_request(request)
    while engine.has_unfinished_requests():
        engine.step()
        engine.scheduler.pool.check_integrity(engine.scheduler.running)
    return engine, draft_runner


def request(name: str, **options: Any) -> Request:
    return Request(name, PROMPT, SamplingParams(max_tokens=40, seed=1, **options))


def test_right_guesses_save_steps() -> None:
    engine, _ = run([request("a")])
    stats = engine.stats().speculation
    assert stats is not None
    assert stats.num_accepted_tokens == stats.num_draft_tokens > 25
    assert engine.meter.num_steps < 15


def test_no_guesses_are_made_that_do_not_pay() -> None:
    _, runner = run([request("a")], cost=1.0)
    assert not runner.batches
    engine, runner = run([request("a")], cost=0.5, next_token=lambda _: 26)
    assert 0 < len(runner.batches) < 8
    stats = engine.stats().speculation
    assert stats is not None
    assert 0 < stats.num_draft_tokens < 5


@pytest.mark.parametrize(("cost", "expected"), [(0.6, 1), (0.75, 0)])
@pytest.mark.parametrize("count", [1, 4])
def test_the_cost_of_guessing_is_shared_by_all(cost: float, expected: int, count: int) -> None:
    """A first guess is right with 0.7. For one sequence of four alone it would never pay."""
    config = replace(CONFIG, max_num_batched_tokens=64)
    proposer = DraftModel(FakeRunner(config), config, cost)
    speculator = Speculator(proposer, 3, row_cost=0.01)
    tables = [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(count)]
    sequences = [decoding(PROMPT.copy(), table, number=i) for i, table in enumerate(tables)]
    drafts = speculator.drafts(sequences, 100)
    assert [len(drafts.get(i, ())) for i in range(count)] == [expected] * count


def test_a_sequence_has_drafts_only_within_the_context_of_the_draft_model() -> None:
    config = replace(CONFIG, overlap=False)
    lens = []

    def on_batch(batch: Batch) -> None:
        lens.extend(row.sequence.num_tokens for row in batch.sequences)

    proposer = DraftModel(FakeRunner(CONFIG, on_batch=on_batch), CONFIG, 0.1, max_len=20)
    engine = Engine(
        config, FakeRunner(config), vocab_size=VOCAB_SIZE,
        speculator=Speculator(proposer, 3, row_cost=0.01),
    )  # fmt: skip
    engine.add_request(request("a"))
    while engine.has_unfinished_requests():
        engine.step()
    assert 15 < max(lens) < 20


def test_a_draft_model_that_fails_ends_speculation_only() -> None:
    def fail(batch: Batch) -> None:
        raise RuntimeError("out of memory")

    engine, runner = run([request("a")], on_batch=fail)
    assert engine.last_error is None
    assert len(runner.batches) == 1
    assert engine.meter.num_generation_tokens == 40
    assert engine.speculator is not None
    assert engine.speculator.has_failed


def test_shares_of_right_guesses_fade_while_none_are_made() -> None:
    outlook = Outlook(0, rates=[0.1, 0.9])
    assert outlook.see(ids("abc"), 3) == 3
    outlook.fade(3, (0.7, 0.7))
    left = (1 - FADING) ** 3
    assert outlook.rates == pytest.approx([0.7 - 0.6 * left, 0.7 + 0.2 * left])
    outlook.guess = ids("dex")
    assert outlook.see(ids("abcdefgh"), 8) == 2  # g and h came after the wrong x
