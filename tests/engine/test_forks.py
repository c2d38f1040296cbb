"""Several answers to one prompt: it is computed once, its blocks are shared, what is written is
copied first."""

from dataclasses import replace

import pytest
from fake_runner import VOCAB_SIZE, FakeRunner, hashed_token
from test_engine import CONFIG, check_idle

from jaxllm.engine.block_pool import BlockPool
from jaxllm.engine.engine import Engine, Request
from jaxllm.engine.sequence import SequenceStatus
from jaxllm.sampling_params import SamplingParams

BLOCK_SIZE = CONFIG.block_size
MODES = [
    {"overlap": overlap, "enable_prefix_caching": caching}
    for overlap in (False, True)
    for caching in (False, True)
]


def make_request(request_id="r", prompt_len=10, **params):
    prompt = [(7 * i + 1) % VOCAB_SIZE for i in range(prompt_len)]
    options = {"n": 3, "seed": 5, "max_tokens": 6, "ignore_eos": True} | params
    return Request(request_id, prompt, SamplingParams(**options))


def make_engine(config=CONFIG, **options):
    return Engine(config, FakeRunner(config, **options), vocab_size=VOCAB_SIZE)


def run(engine, *requests):
    """Final outputs by request id."""
    for request in requests:
        engine.add_request(request)
    found = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                found[output.request_id] = output
        engine.scheduler.pool.check_integrity([state.sequence for state in engine._states.values()])
    check_idle(engine)
    return found


def tokens_alone(request, config=CONFIG):
    """Each answer as a request of its own, one after the other."""
    tokens = []
    for index in range(request.params.n):
        params = replace(request.params, n=1, seed=request.params.seed + index)
        alone = Request("alone", request.prompt_token_ids, params)
        [answer] = run(make_engine(config), alone)["alone"].outputs
        tokens.append(answer.token_ids)
    return tokens


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("prompt_len", [1, 7, 8, 9, 22])
@pytest.mark.parametrize("budget", [4, 16, 32])
def test_the_prompt_is_computed_once(prompt_len, budget, mode):
    config = replace(CONFIG, max_num_batched_tokens=budget, max_model_len=40, **mode)
    engine, request = make_engine(config), make_request(prompt_len=prompt_len)
    [output] = run(engine, request).values()
    assert [answer.token_ids for answer in output.outputs] == tokens_alone(request, config)
    n, max_tokens = request.params.n, request.params.max_tokens
    batches = engine.runner.batches
    # the last token of an answer is never computed; with overlap no answer ends unexpectedly
    assert sum(batch.num_tokens for batch in batches) == prompt_len + n * (max_tokens - 1)
    copies = [pair for batch in batches for pair in batch.copies]
    assert len(copies) == (n - 1 if prompt_len % BLOCK_SIZE else 0)
    assert len({source for source, _ in copies}) <= 1


def test_full_blocks_are_shared_and_each_answer_adds_only_what_it_writes():
    config = replace(CONFIG, num_blocks=64, max_model_len=64)
    engine, most = make_engine(config), 0
    engine.add_request(make_request(prompt_len=42, max_tokens=9))
    while engine.has_unfinished_requests():
        engine.step()
        most = max(most, engine.scheduler.pool.num_blocks - engine.scheduler.pool.num_free_blocks)
    num_full, num_of_one = 42 // BLOCK_SIZE, -(-(42 + 8) // BLOCK_SIZE)
    assert most == num_full + 3 * (num_of_one - num_full)


def test_answers_of_a_request_are_admitted_together():
    engine = make_engine(replace(CONFIG, overlap=False))  # four slots
    engine.add_request(make_request("first", n=2, max_tokens=4))
    engine.add_request(make_request("second", n=3, max_tokens=4))
    engine.step()
    scheduler = engine.scheduler
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 3)
    for _ in range(3):
        engine.step()
    assert (scheduler.num_running, scheduler.num_waiting) == (0, 3)
    engine.step()
    assert (scheduler.num_running, scheduler.num_waiting) == (3, 0)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_answers_beyond_the_slots_take_turns(mode):
    config = replace(CONFIG, **mode)
    request = make_request(n=11)
    [output] = run(make_engine(config), request).values()
    assert [answer.token_ids for answer in output.outputs] == tokens_alone(request, config)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_forked_answers_that_are_preempted_are_computed_again(mode):
    config = replace(CONFIG, num_blocks=9, max_model_len=32, **mode)
    engine = make_engine(config)
    request = make_request(n=4, prompt_len=10, max_tokens=15)
    [output] = run(engine, request).values()
    assert [answer.token_ids for answer in output.outputs] == tokens_alone(request, config)
    assert output.metrics.num_preemptions > 0


def test_prompt_logprobs_are_made_once():
    engine = make_engine()
    [output] = run(engine, make_request(prompt_logprobs=2, logprobs=1)).values()
    assert len(output.prompt_logprobs) == 10
    assert [len(answer.logprobs) for answer in output.outputs] == [6, 6, 6]
    assert sum(batch.num_tokens for batch in engine.runner.batches) == 10 + 3 * 5


def test_another_answer_leads_where_the_first_ends_within_the_prompt():
    """Its logits are not finite there, with nobody to blame."""
    config = replace(CONFIG, max_num_batched_tokens=4, enable_prefix_caching=False)
    engine = make_engine(config, is_ok=lambda sequence: sequence.index > 0)
    request = make_request()
    [output] = run(engine, request).values()
    assert [answer.finish_reason for answer in output.outputs] == ["error", "length", "length"]
    assert [a.token_ids for a in output.outputs[1:]] == tokens_alone(request, config)[1:]


@pytest.mark.parametrize("num_steps", range(8))
def test_an_abort_at_any_moment_frees_everything(num_steps):
    engine = make_engine(replace(CONFIG, max_num_batched_tokens=4))
    engine.add_request(make_request("gone"))
    engine.add_request(make_request("stays", prompt_len=9))
    for _ in range(num_steps):
        engine.step()
    engine.abort("gone")
    found = run(engine)
    assert {answer.finish_reason for answer in found["gone"].outputs} == {"abort"}
    expected = tokens_alone(make_request("stays", prompt_len=9))
    assert [answer.token_ids for answer in found["stays"].outputs] == expected


def test_after_a_failed_step_those_that_have_nothing_share_the_prompt_again():
    failures = [None, RuntimeError("failed")]
    config = replace(CONFIG, max_num_batched_tokens=9, overlap=False, enable_prefix_caching=False)
    engine = make_engine(config, result_error=lambda: failures.pop(0) if failures else None)
    engine.add_request(make_request("first", n=1))
    engine.step()
    engine.add_request(make_request("second"))  # only its first answer is in the step that fails
    found = run(engine)
    reasons = [answer.finish_reason for answer in found["second"].outputs]
    assert reasons == ["error", "length", "length"]
    after = [batch for batch in engine.runner.batches[2:] if batch.leaders]
    assert [len(batch.leaders) for batch in after] == [1]


def test_a_replaced_block_must_have_another_holder():
    pool = BlockPool(4, 2)
    [block] = pool.allocate(1)
    with pytest.raises(AssertionError, match="no other holder"):
        pool.replace(block)
    pool = BlockPool(4, 2)
    [block] = pool.allocate(1)
    pool.acquire([block])
    own = pool.replace(block)
    assert own != block
    assert (pool.num_holders(block), pool.num_holders(own)) == (1, 1)
    pool.check_integrity()


def test_followers_hold_nothing_before_the_prompt_is_computed():
    engine = make_engine(replace(CONFIG, max_num_batched_tokens=4, overlap=False))
    engine.add_request(make_request(prompt_len=10))
    engine.step()
    states = [state.sequence for state in engine._states.values()]
    assert [s.status for s in states] == [SequenceStatus.RUNNING] + 2 * [SequenceStatus.WAITING]
    assert [bool(s.block_table) for s in states] == [True, False, False]
    assert hashed_token(states[0]) != hashed_token(states[1])  # their seeds differ
