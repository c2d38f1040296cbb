"""Guesses from what came before, how many of them are verified, and what becomes of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fake_runner import EOS, VOCAB_SIZE, FakeRunner, fake_rank, ids

from jaxllm.config import EngineConfig
from jaxllm.engine.batch import accepted_tokens
from jaxllm.engine.engine import Engine, Request
from jaxllm.engine.sequence import NO_TOKEN, Batch, ScheduledSequence, Sequence
from jaxllm.engine.speculation import Outlook, PromptLookup, Proposer, Speculator, continuation
from jaxllm.outputs import RequestOutput
from jaxllm.sampling_params import SamplingParams

CONFIG = EngineConfig(
    num_blocks=32, block_size=4, max_model_len=64, max_num_seqs=4, max_num_batched_tokens=16,
    num_speculative_tokens=3,
)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("abcd xyz ab", "cd x"),
        ("ab1 ab2 ab".replace("1", "c").replace("2", "d"), "d ab"),  # the latest of two
        ("xabq yab xab", "q ya"),  # the longest match, not the latest
        ("qabab", "abab"),  # it repeats itself, and goes on
        ("aaa", "aaaa"),
        ("abcb", ""),  # one token is no match
        ("ab", ""),
        ("a", ""),
    ],
)
def test_what_came_after_the_last_tokens_comes_again(text: str, expected: str) -> None:
    assert continuation(ids(text), 4) == ids(expected)


def test_shares_of_right_guesses_are_kept_apart_by_what_came_before() -> None:
    outlook = Outlook(0)
    outlook.see(ids("ab"), 2)
    first, later = outlook.rates
    outlook.guess = ids("cdxf")
    outlook.see(ids("abcde"), 5)  # c and d are right, x is wrong
    assert outlook.rates == pytest.approx(
        [first + (1 - first) / 4, (later + (1 - later) / 4) * 3 / 4]
    )
    assert (outlook.num_seen, outlook.guess, outlook.was_right) == (5, [], False)
    outlook.guess = ids("gh")
    outlook.see(ids("abcdeg"), 6)
    assert outlook.guess == ids("h")
    assert list(outlook.chances(1)) == [outlook.rates[1]]


def test_guesses_are_scored_up_to_where_they_reach() -> None:
    outlook = Outlook(0)
    outlook.guess = ids("ab")
    outlook.see(ids("abcd"), 4)
    assert (outlook.guess, outlook.was_right, outlook.num_seen) == ([], True, 4)


def decoding(number: int, text: str, rates: tuple[float, float]) -> Sequence:
    sequence = Sequence(
        number, str(number), 0, SamplingParams(), 0, ids(text), 2, num_computed_tokens=len(text) - 1
    )
    sequence.outlook = Outlook(0, rates=list(rates))
    return sequence


def num_drafts(
    sequences: list[Sequence], *, row_cost: float, spare: int = 100, most: int = 7
) -> list[int]:
    drafts = Speculator(PromptLookup(), most, row_cost).drafts(sequences, spare)
    return [len(drafts.get(sequence.sequence_id, ())) for sequence in sequences]


REPEATING = "abcdefghijabcdefghijab"


def test_drafts_end_where_one_more_does_not_pay() -> None:
    # 0.5 pays, 0.25 pays: 0.25 (1 + 0.1) > 0.1 (1 + 0.5); 0.125 (1 + 0.2) < 0.1 (1 + 0.75)
    assert num_drafts([decoding(0, REPEATING, (0.5, 0.5))], row_cost=0.1) == [2]
    assert num_drafts([decoding(0, REPEATING, (0.5, 1.0))], row_cost=0.1) == [7]
    assert num_drafts([decoding(0, REPEATING, (0.05, 1.0))], row_cost=0.1) == [0]


def test_a_batch_that_keeps_the_processor_busy_has_no_drafts() -> None:
    few = [decoding(i, REPEATING, (0.8, 0.8)) for i in range(2)]
    many = [decoding(i, REPEATING, (0.8, 0.8)) for i in range(64)]
    assert min(num_drafts(few, row_cost=0.1)) > 0
    assert max(num_drafts(many, row_cost=0.1)) == 0
    assert min(num_drafts(many, row_cost=0.01, spare=1000)) > 0  # an accelerator is not


def test_drafts_are_bounded_by_rows_and_by_the_end_of_the_answer() -> None:
    sequences = [decoding(i, REPEATING, (1.0, 1.0)) for i in range(3)]
    assert num_drafts(sequences, row_cost=0.01, spare=10) == [4, 3, 3]
    sequences[0].max_num_tokens = sequences[0].num_tokens + 3
    assert num_drafts(sequences, row_cost=0.01, spare=9) == [2, 4, 3]


def test_no_step_waits_for_a_program_because_of_drafts() -> None:
    sequences = [decoding(i, REPEATING, (1.0, 1.0)) for i in range(3)]
    for max_rows, expected in ((8, 5), (3, 0), (0, 0)):
        speculator = Speculator(PromptLookup(), 7, 0.01, max_rows=lambda most=max_rows: most)
        assert sum(map(len, speculator.drafts(sequences, 100).values())) == expected


def test_what_is_to_be_known_of_each_query_token_excludes_drafts() -> None:
    sequence = decoding(0, REPEATING, (1.0, 1.0))
    sequence.params = SamplingParams(prompt_logprobs=0)
    assert num_drafts([sequence], row_cost=0.01) == [0]


def test_results_are_waited_for_only_if_drafts_are_likely_to_pay() -> None:
    speculator = Speculator(PromptLookup(), 3, row_cost=0.1)
    for rates, expected in (((0.9, 0.9), True), ((0.05, 0.9), False)):
        sequence = decoding(0, REPEATING, rates)
        sequence.expect(1)
        sequence.num_computed_tokens += 1
        assert speculator.wants_results([sequence], 4) == expected
        assert not speculator.drafts([sequence], 4)


def test_tokens_count_up_to_the_first_that_differs_from_its_draft() -> None:
    sequences = [decoding(i, "abc", (1.0, 1.0)) for i in range(4)]
    drafts = [(), (5, 6), (5, 6), (5,)]
    rows = [
        ScheduledSequence(sequence, 2, 1 + len(some), 1 + len(some), 0, some)
        for sequence, some in zip(sequences, drafts, strict=True)
    ]
    batch = Batch(rows, 9, 1, num_drafts=5)
    assert batch.num_rows == 9
    tokens = np.array([5, 5, 9, 5, 6, 7, 6, 8, 4])  # after the last tokens; after 5, 6; 5, 6; 5
    n = NO_TOKEN
    assert accepted_tokens(batch, tokens).tolist() == [[5, 5, 9, 5], [n, 6, n, 4], [n, 7, n, n]]


class Scripted(Proposer):
    """Guesses that the answer goes on as the script does."""

    def __init__(self, script: str) -> None:
        self.script = ids(script)

    def propose(self, sequences: list[Sequence], count: int) -> list[list[int]]:
        assert all(sequence.num_known_tokens > 0 for sequence in sequences)
        return [self.script[s.num_known_tokens - s.num_prompt_tokens :][:count] for s in sequences]


def run(
    answer: str, script: str, *, row_cost: float = 0.01, overlap: bool = False, **options: Any
) -> tuple[RequestOutput, Engine]:
    """One request whose model says the answer."""
    config = replace(CONFIG, overlap=overlap)
    spoken = [*ids(answer), *[EOS] * 4]  # drafts may go beyond its end
    runner = FakeRunner(config, next_token=lambda s: spoken[s.num_output_tokens])
    speculator = Speculator(Scripted(script), 3, row_cost)
    engine = Engine(
        config, runner, vocab_size=VOCAB_SIZE, eos_token_ids=(EOS,), speculator=speculator
    )
    engine.add_request(Request("r", ids("xy"), SamplingParams(max_tokens=40, **options)))
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
        engine.scheduler.pool.check_integrity(engine.scheduler.running)
    return outputs[-1], engine


@pytest.mark.parametrize("overlap", [False, True])
def test_right_drafts_save_steps_and_are_counted(overlap: bool) -> None:
    answer = "abcdefghijklmnopqrstuvw$"
    output, engine = run(answer, answer + "a" * 20, overlap=overlap, logprobs=1)
    assert output.outputs[0].token_ids == ids(answer)
    assert engine.meter.num_steps < 12
    stats = engine.stats().speculation
    assert stats is not None
    assert output.metrics is not None
    assert output.metrics.num_draft_tokens == stats.num_draft_tokens > 12
    assert output.metrics.num_accepted_tokens == stats.num_accepted_tokens >= 12
    assert stats.num_drafts * 3 >= stats.num_draft_tokens
    assert sum(stats.num_accepted_by_position) == stats.num_accepted_tokens
    assert output.outputs[0].logprobs is not None
    said = [next(iter(entry.items())) for entry in output.outputs[0].logprobs]
    assert [(t, p.rank) for t, p in said] == [(t, fake_rank(t)) for t in ids(answer)]
    assert list(stats.num_accepted_by_position) == sorted(stats.num_accepted_by_position)[::-1]


@pytest.mark.parametrize("overlap", [False, True])
def test_wrong_drafts_are_rolled_back_and_soon_given_up(overlap: bool) -> None:
    answer = "abcdefghijklmnopqrstuvwxyabcdefghijk$"
    output, engine = run(answer, "z" * 60, row_cost=0.1, overlap=overlap)
    assert output.outputs[0].token_ids == ids(answer)
    stats = engine.stats().speculation
    assert stats is not None
    assert stats.num_accepted_tokens == 0
    assert 0 < stats.num_draft_tokens < 9


def test_an_answer_ends_within_accepted_drafts() -> None:
    answer = "abcdefgh$"
    output, engine = run(answer + "zzzz", answer + "zzzz")
    assert output.outputs[0].token_ids == ids(answer)
    assert output.outputs[0].finish_reason == "stop"
    assert engine.scheduler.pool.num_free_blocks == CONFIG.num_blocks


def test_only_verified_tokens_are_found_in_the_prefix_cache() -> None:
    """FakeRunner compares what a block holds with what its finder expects there."""
    output, engine = run("abcdefghijklmnop$", "abcxefxhijxlmnxp$")
    prompt = ids("xyabcdefghijklmnop")
    engine.add_request(Request("again", prompt, SamplingParams(max_tokens=1)))
    [again] = [out for _ in range(2) for out in engine.step()]
    assert again.num_cached_tokens == 16
    assert output.outputs[0].token_ids == ids("abcdefghijklmnop$")


def test_limits_of_the_configuration() -> None:
    with pytest.raises(ValueError, match="num_speculative_tokens must not be negative, got -1"):
        replace(CONFIG, num_speculative_tokens=-1)
    with pytest.raises(ValueError, match=r"max_num_batched_tokens \(16\) must be more than num_sp"):
        replace(CONFIG, num_speculative_tokens=16)
    assert CONFIG.max_num_rows == 4
    assert replace(CONFIG, max_num_seqs=1).max_num_rows == 4


def test_a_prompt_that_others_wait_for_has_no_drafts_at_its_last_token() -> None:
    """The others draw from the logits after that token, which must be the row's last one."""
    prompt = ids("abcdefghijklmnopq")  # a token more than a step takes
    config = replace(CONFIG, overlap=False)
    runner = FakeRunner(config, next_token=lambda s: s.num_output_tokens)
    speculator = Speculator(Scripted("abcdefghijklmn"), 3, row_cost=0.01)
    engine = Engine(config, runner, vocab_size=VOCAB_SIZE, speculator=speculator)
    engine.add_request(Request("r", prompt, SamplingParams(n=3, max_tokens=8)))
    while engine.has_unfinished_requests():
        outputs = engine.step()
    assert engine.last_error is None
    assert [answer.token_ids for answer in outputs[0].outputs] == [list(range(8))] * 3
    assert [batch.num_tokens for batch in runner.batches[:2]] == [16, 1]
    assert runner.batches[1].num_drafts == 0
