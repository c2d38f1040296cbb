"""Beam search in the engine, on a fake model, against a plain one."""

from dataclasses import replace

import pytest
from beam_reference import beam_search
from fake_runner import EOS, VOCAB_SIZE, FakeRunner, hashed_logprobs
from test_engine import CONFIG, TOKENIZER, check_idle

from jaxllm.beam_search_params import BeamSearchParams
from jaxllm.engine.engine import Engine, Request
from jaxllm.request_error import RequestError
from jaxllm.sampling_params import SamplingParams

LARGE = replace(CONFIG, num_blocks=64, max_num_seqs=8)


def make_engine(config=LARGE, **options):
    runner = FakeRunner(config, **options)
    return Engine(config, runner, vocab_size=VOCAB_SIZE, tokenizer=TOKENIZER, eos_token_ids=(EOS,))


def make_request(request_id="r", prompt_len=10, **options):
    prompt = [(5 * i + 1) % (VOCAB_SIZE - 1) for i in range(prompt_len)]
    params = BeamSearchParams(**({"beam_width": 4, "max_tokens": 9} | options))
    return Request(request_id, prompt, params.sampling_params(), beam_search=params)


def run(engine, *requests):
    """Final outputs by request id; the pool is looked at after each step."""
    for request in requests:
        engine.add_request(request)
    found = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            assert output.finished or output.request_id == "s"  # which is no search
            found[output.request_id] = output
        engine.scheduler.pool.check_integrity([state.sequence for state in engine._states.values()])
    check_idle(engine)
    return found


def reference(request, max_model_len=LARGE.max_model_len):
    params, prompt = request.beam_search, list(request.prompt_token_ids)
    stops = request.params.all_stop_token_ids((EOS,))
    max_len = min(params.max_tokens or max_model_len, max_model_len - len(prompt))
    answers = beam_search(
        lambda output: hashed_logprobs([*prompt, *output]), params, stops, max_len
    )
    return [(answer.token_ids, answer.reason) for answer in answers]


def answers(output):
    assert [answer.index for answer in output.outputs] == list(range(len(output.outputs)))
    return [(answer.token_ids, answer.finish_reason) for answer in output.outputs]


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("length_penalty", [-1.5, 0.0, 1.0, 2.0])
@pytest.mark.parametrize("beam_width", [1, 2, 5, 8])
def test_the_answers_are_those_of_a_plain_search(beam_width, length_penalty, early_stopping):
    for prompt_len in (1, 7, 8):
        request = make_request(
            prompt_len=prompt_len, beam_width=beam_width, max_tokens=14,
            length_penalty=length_penalty, early_stopping=early_stopping,
        )  # fmt: skip
        [output] = run(make_engine(), request).values()
        assert answers(output) == reference(request)


@pytest.mark.parametrize("options", [
    {"ignore_eos": True}, {"stop_token_ids": [3, 4]}, {"n": 2}, {"max_tokens": 1},
    {"max_tokens": None, "ignore_eos": True}, {"beam_width": 8, "stop_token_ids": [1, 2, 3, 4, 5]},
], ids=str)  # fmt: skip
def test_options(options):
    request = make_request(**options)
    [output] = run(make_engine(), request).values()
    assert answers(output) == reference(request)


def test_cumulative_logprobs_and_text():
    request = make_request(prompt_len=7, max_tokens=14, beam_width=8, length_penalty=-1.5)
    [output] = run(make_engine(), request).values()
    assert "stop" in {answer.finish_reason for answer in output.outputs}
    for answer in output.outputs:
        total, context = 0.0, list(request.prompt_token_ids)
        for token_id in answer.token_ids:
            total += hashed_logprobs(context)[token_id]
            context.append(token_id)
        assert answer.cumulative_logprob == pytest.approx(total, abs=1e-4)
        shown = [i for i in answer.token_ids if i != EOS]
        assert answer.text == TOKENIZER.decode(shown)


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("overlap", [False, True])
def test_searches_beside_each_other_and_beside_sampling(overlap, caching):
    config = replace(
        LARGE, overlap=overlap, enable_prefix_caching=caching, max_num_seqs=10, num_blocks=80
    )
    engine = make_engine(config)
    requests = [
        make_request("a", prompt_len=11, beam_width=3),
        make_request("b", prompt_len=5, beam_width=4, max_tokens=6),
        make_request("c", prompt_len=11, beam_width=6),
    ]
    sampled = Request("s", [1, 2, 3], SamplingParams(n=2, seed=1, max_tokens=9, ignore_eos=True))
    [expected] = run(make_engine(config), sampled).values()
    found = run(engine, requests[0], sampled, *requests[1:])
    for request in requests:
        assert answers(found[request.request_id]) == reference(request)
    assert found["s"].outputs == expected.outputs
    # all beams of a search, and those of others, in one step
    rows = [
        {row.sequence.request_id for row in batch.sequences if row.sequence.num_candidates}
        for batch in engine.runner.batches
    ]
    assert max(map(len, rows)) > 1
    widths = [len(batch.sequences) for batch in engine.runner.batches]
    assert max(widths) > 6


def test_forks_share_blocks_and_copy_one_only_before_they_write():
    request = make_request(prompt_len=12, beam_width=8, max_tokens=17, ignore_eos=True)
    engine = make_engine(replace(LARGE, overlap=False))
    engine.add_request(request)
    most = 0
    while engine.has_unfinished_requests():
        engine.step()
        pool = engine.scheduler.pool
        most = max(most, pool.num_blocks - pool.num_free_blocks)
    batches = engine.runner.batches
    assert sum(batch.num_tokens for batch in batches) == 12 + 8 * 16  # the prompt once
    assert most < 3 + 8 * 4  # the beams share more than their prompt
    assert 0 < sum(len(batch.copies) for batch in batches) < 8 * 16 / 2


@pytest.mark.parametrize("overlap", [False, True])
def test_a_search_that_is_preempted_begins_again(overlap):
    config = replace(LARGE, num_blocks=17, overlap=overlap)
    requests = [
        make_request(name, prompt_len=8, beam_width=3, max_tokens=18, ignore_eos=True)
        for name in "ab"
    ]
    found = run(make_engine(config), *requests)
    for request in requests:
        assert answers(found[request.request_id]) == reference(request)
    assert found["b"].metrics.num_preemptions > 0


@pytest.mark.parametrize("num_steps", range(12))
def test_an_abort_returns_the_best_so_far(num_steps):
    engine = make_engine()
    engine.add_request(make_request("gone", ignore_eos=True, n=2))
    for _ in range(num_steps):
        engine.step()
    engine.abort("gone")
    outputs = run(engine)
    if num_steps < 9:
        got = [answer.token_ids for answer in outputs["gone"].outputs]
        reasons = {answer.finish_reason for answer in outputs["gone"].outputs}
        assert reasons == {"abort"}
        if num_steps:
            request = make_request(ignore_eos=True, n=2, max_tokens=num_steps)
            assert got == [tokens for tokens, _ in reference(request)]
        else:
            assert got == [[], []]


def test_after_a_failed_step_a_search_beside_it_begins_again():
    failures = 4 * [None] + [RuntimeError("failed")]
    engine = make_engine(result_error=lambda: failures.pop(0) if failures else None)
    # the failing step is one of the first request alone: the other one waits for slots
    engine.add_request(make_request("failing", beam_width=7, prompt_len=3, ignore_eos=True))
    request = make_request("kept", beam_width=3)
    outputs = run(engine, request)
    assert {answer.finish_reason for answer in outputs["failing"].outputs} == {"error"}
    assert answers(outputs["kept"]) == reference(request)


def test_what_is_not_finite_is_searched_again_and_then_an_error():
    reads = []

    def is_ok(sequence):
        reads.append(sequence.num_tokens)
        return not (sequence.num_tokens == 13 and reads.count(13) <= 2)

    request = make_request()
    [output] = run(make_engine(is_ok=is_ok), request).values()
    assert answers(output) == reference(request)
    [output] = run(make_engine(is_ok=lambda sequence: sequence.num_tokens < 13), request).values()
    assert {answer.finish_reason for answer in output.outputs} == {"error"}


@pytest.mark.parametrize(("options", "message"), [
    ({"beam_width": 0}, "beam_width must be an integer in"),
    ({"beam_width": 65}, "beam_width must be an integer in"),
    ({"beam_width": 2, "n": 3}, "n must be an integer in"),
    ({"length_penalty": float("nan")}, "length_penalty must be a number"),
    ({"early_stopping": "always"}, "early_stopping must be"),
    ({"early_stopping": 1}, "early_stopping must be"),
    ({"temperature": -1}, "temperature must be a number"),
    ({"max_tokens": 0}, "max_tokens must be an integer"),
    ({"beam_width": 9}, "more than max_num_seqs"),
    ({"beam_width": 8, "max_tokens": None}, "blocks of the pool"),
    ({"beam_width": 10, "stop_token_ids": list(range(25))}, "candidates of each beam"),
])  # fmt: skip
def test_what_cannot_be_searched_is_refused(options, message):
    limits = {"max_num_seqs": 10} if "stop_token_ids" in options else {"num_blocks": 30}
    engine = make_engine(replace(LARGE, **limits))
    with pytest.raises(RequestError, match=message):
        engine.add_request(make_request(**options))


def test_a_search_takes_no_other_sampling_options():
    params = BeamSearchParams(beam_width=2)
    request = Request("r", [1, 2], SamplingParams(top_k=3), beam_search=params)
    with pytest.raises(RequestError, match="takes no SamplingParams but its own"):
        make_engine().add_request(request)
    with pytest.raises(RequestError, match="top_k cannot be combined with beam search"):
        BeamSearchParams.from_dict({"beam_width": 2, "top_k": 3})
