import time
from dataclasses import replace

import numpy as np
import pytest
from fake_runner import EOS, LETTERS, VOCAB_SIZE, FakeHandle, FakeRunner, ids
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend

from jaxllm.config import EngineConfig
from jaxllm.engine.engine import Engine, QueueFullError, Request
from jaxllm.engine.sequence import NOT_FINITE
from jaxllm.outputs import Logprob
from jaxllm.sampling_params import RequestOutputKind, SamplingParams
from jaxllm.text.tokenizer import Tokenizer

CONFIG = EngineConfig(
    num_blocks=32, block_size=4, max_model_len=32, max_num_seqs=4, max_num_batched_tokens=16
)
SERIAL = replace(CONFIG, overlap=False)  # for what is counted in steps


def letter_tokenizer():
    """One token a letter, and an end of sequence that decoding skips."""
    vocab = {char.replace(" ", "Ġ"): index for index, char in enumerate(LETTERS)}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<eos>", special=True)])
    assert backend.token_to_id("<eos>") == EOS
    return Tokenizer(backend, {"eos_token": "<eos>"})


TOKENIZER = letter_tokenizer()


def make_engine(answer="", config=CONFIG, runner=None, **options):
    """An engine whose model continues every prompt by ``answer``, a dict of such by request id, and
    after it by "z"."""

    def next_token(sequence):
        text = answer[sequence.request_id] if isinstance(answer, dict) else answer
        return ids(text.ljust(99, "z"))[sequence.num_output_tokens]

    runner = runner or FakeRunner(config, next_token)
    options = {"tokenizer": TOKENIZER, "vocab_size": VOCAB_SIZE, "eos_token_ids": (EOS,)} | options
    return Engine(config, runner, **options)


def make_request(request_id="r", prompt="abc", **params):
    return Request(request_id, ids(prompt), SamplingParams(**params), prompt=prompt)


def run(engine, *requests):
    """All outputs in order until nothing is left."""
    for request in requests:
        engine.add_request(request)
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    check_idle(engine)
    return outputs


def check_idle(engine):
    pool = engine.scheduler.pool
    pool.check_integrity([])
    assert pool.num_free_blocks == pool.num_blocks
    assert not engine._states
    assert not engine._requests


def final(engine, *requests):
    """The last output of the only request's only answer."""
    (answer,) = run(engine, *requests)[-1].outputs
    return answer


def test_cumulative_outputs_grow_with_each_step():
    outputs = run(make_engine("hello"), make_request(max_tokens=3))
    assert [out.outputs[0].text for out in outputs] == ["h", "he", "hel"]
    assert [out.outputs[0].token_ids for out in outputs] == [ids("h"), ids("he"), ids("hel")]
    assert [out.finished for out in outputs] == [False, False, True]
    last = outputs[-1]
    assert (last.request_id, last.prompt, last.prompt_token_ids) == ("r", "abc", ids("abc"))
    assert (last.outputs[0].finish_reason, last.outputs[0].stop_reason) == ("length", None)
    assert (last.outputs[0].logprobs, last.outputs[0].cumulative_logprob) == (None, None)


def test_outputs_do_not_change_after_they_were_returned():
    first, *_ = run(make_engine("hello"), make_request(max_tokens=3))
    assert first.outputs[0].token_ids == ids("h")


def test_delta_outputs_hold_what_is_new_and_wait_for_possible_stop_strings():
    engine = make_engine("the end of it")
    request = make_request(max_tokens=20, stop="of", output_kind=RequestOutputKind.DELTA)
    outputs = [out.outputs[0] for out in run(engine, request)]
    assert [out.text for out in outputs] == [*"the end ", "", ""]
    assert [token_id for out in outputs for token_id in out.token_ids] == ids("the end of")
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == ("stop", "of")


@pytest.mark.parametrize("stop", [None, "yy"])
def test_final_only_gives_one_output(stop):
    request = make_request(max_tokens=4, stop=stop, output_kind=RequestOutputKind.FINAL_ONLY)
    (out,) = run(make_engine("abcd"), request)
    assert (out.finished, out.outputs[0].text, out.outputs[0].token_ids) == (
        True, "abcd", ids("abcd"),
    )  # fmt: skip


def test_the_end_of_sequence_stops_and_stays_in_the_token_ids():
    answer = final(make_engine("hi$"), make_request(max_tokens=9))
    assert (answer.text, answer.token_ids) == ("hi", ids("hi$"))
    assert (answer.finish_reason, answer.stop_reason) == ("stop", None)


def test_ignore_eos_goes_on():
    answer = final(make_engine("hi$hi"), make_request(max_tokens=5, ignore_eos=True))
    assert (answer.text, answer.finish_reason) == ("hihi", "length")
    params = {"ignore_eos": True, "skip_special_tokens": False}
    assert final(make_engine("hi$"), make_request(max_tokens=3, **params)).text == "hi<eos>"


def test_a_stop_token_stops_and_its_text_is_left_out_unless_wanted():
    answer = final(make_engine("hi yo"), make_request(max_tokens=9, stop_token_ids=ids(" ")))
    assert (answer.text, answer.token_ids) == ("hi", ids("hi "))
    assert (answer.finish_reason, answer.stop_reason) == ("stop", ids(" ")[0])
    wanted = make_request(
        max_tokens=9, stop_token_ids=ids(" "), include_stop_str_in_output=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )  # fmt: skip
    assert final(make_engine("hi yo"), wanted).text == "hi "


def test_a_stop_string_across_tokens():
    answer = final(make_engine("say stop now"), make_request(max_tokens=12, stop=["st", "now"]))
    assert (answer.text, answer.stop_reason) == ("say ", "st")
    wanted = make_request(max_tokens=12, stop="st", include_stop_str_in_output=True)
    assert final(make_engine("say stop now"), wanted).text == "say st"


def test_min_tokens_holds_for_stop_strings_and_stop_tokens():
    answer = final(make_engine("xx$xxxx"), make_request(max_tokens=9, min_tokens=4, stop="xx"))
    assert answer.token_ids == ids("xx$xx")
    assert (answer.text, answer.stop_reason) == ("xx", "xx")


def test_a_stop_wins_over_the_length_reached_by_the_same_token():
    assert final(make_engine("ab"), make_request(max_tokens=2, stop="b")).stop_reason == "b"
    assert final(make_engine("a$"), make_request(max_tokens=2)).finish_reason == "stop"


@pytest.mark.parametrize("max_tokens", [None, 100])
def test_max_model_len_ends_what_max_tokens_does_not(max_tokens):
    answer = final(make_engine(), make_request(prompt="a" * 30, max_tokens=max_tokens))
    assert (len(answer.token_ids), answer.finish_reason) == (2, "length")


def test_without_detokenization_there_are_only_tokens():
    answer = final(make_engine("hi$"), make_request(detokenize=False))
    assert (answer.text, answer.token_ids) == ("", ids("hi$"))
    answer = final(make_engine("hi$", tokenizer=None), make_request())
    assert (answer.text, answer.token_ids) == ("", ids("hi$"))


def test_n_answers_have_their_own_seeds_and_come_in_order():
    seeds = {}

    def next_token(sequence):
        seeds[sequence.index] = sequence.seed
        return sequence.index if sequence.num_output_tokens < 1 + sequence.index else EOS

    engine = make_engine(runner=FakeRunner(CONFIG, next_token))
    outputs = run(engine, make_request(n=3, seed=41, prompt="abcdefgh"))
    assert [answer.text for answer in outputs[-1].outputs] == ["a", "bb", "ccc"]
    assert [answer.index for answer in outputs[0].outputs] == [0, 1, 2]
    assert seeds == {0: 41, 1: 42, 2: 43}
    assert sum(out.finished for out in outputs) == 1


def test_delta_of_n_answers_names_only_those_with_news():
    engine = make_engine(
        runner=FakeRunner(CONFIG, lambda s: EOS if s.num_output_tokens > s.index else 0)
    )
    request = make_request(n=2, output_kind=RequestOutputKind.DELTA)
    outputs = run(engine, request)
    assert [[answer.index for answer in out.outputs] for out in outputs] == [[0, 1], [0, 1], [1]]
    assert [answer.finish_reason for out in outputs for answer in out.outputs] == [
        None, None, "stop", None, "stop",
    ]  # fmt: skip


def test_more_answers_than_slots_queue():
    outputs = run(make_engine("ab$"), make_request(n=9))
    assert [answer.text for answer in outputs[-1].outputs] == ["ab"] * 9


def test_the_largest_seed_and_more_answers_stay_signed_64_bit():
    engine = make_engine("$")
    engine.add_request(make_request(n=2, seed=2**63 - 1))
    seeds = [state.sequence.seed for state in engine._states.values()]
    assert seeds == [2**63 - 1, -(2**63)]


def test_seeds_are_drawn_from_the_engines():
    def seeds(config):
        engine = make_engine("$", config=config)
        for request_id in "xy":
            engine.add_request(make_request(request_id))
        return [state.sequence.seed for state in engine._states.values()]

    assert seeds(CONFIG) == seeds(CONFIG) != seeds(replace(CONFIG, seed=1))
    assert len(set(seeds(CONFIG))) == 2


def test_logprobs_hold_the_chosen_token_and_the_most_likely():
    answer = final(make_engine("bc"), make_request(max_tokens=2, logprobs=2))
    assert answer.logprobs == [
        {1: Logprob(-0.5, 2, "b"), 0: Logprob(-0.25, 1, "a")},  # "b" has rank 2
        {2: Logprob(-0.75, 3, "c"), 0: Logprob(-0.25, 1, "a"), 1: Logprob(-0.5, 2, "b")},
    ]
    assert [next(iter(entry)) for entry in answer.logprobs] == [1, 2]
    assert answer.cumulative_logprob == -1.25
    assert final(make_engine("b"), make_request(max_tokens=1, logprobs=0)).logprobs == [
        {1: Logprob(-0.5, 2, "b")}
    ]


def test_delta_logprobs_are_of_the_new_tokens():
    request = make_request(max_tokens=2, logprobs=0, output_kind=RequestOutputKind.DELTA)
    outputs = run(make_engine("bc"), request)
    assert [list(out.outputs[0].logprobs[0]) for out in outputs] == [[1], [2]]


def test_prompt_logprobs_over_chunks_beside_others_and_with_a_warm_cache():
    engine = make_engine("$", config=replace(CONFIG, max_num_batched_tokens=5))
    prompt = "bcbcabcabca"
    run(engine, make_request("warm", prompt=prompt))
    requests = [
        make_request("other", max_tokens=20),
        make_request(prompt=prompt, prompt_logprobs=0, n=2),
    ]
    (out,) = [out for out in run(engine, *requests) if out.request_id == "r" and out.finished]
    assert out.prompt_logprobs[0] is None
    expected = [{i: Logprob(-(1 + i) / 4, 1 + i, "abc"[i])} for i in ids(prompt)[1:]]
    assert out.prompt_logprobs[1:] == expected


class BrokenOnce(FakeRunner):
    """One step computes nothing but NaN."""

    def __init__(self, config, broken_step):
        super().__init__(config, lambda sequence: EOS)
        self.broken_step = broken_step

    def execute(self, batch):
        handle = super().execute(batch)
        if len(self.batches) - 1 != self.broken_step:
            return handle
        result = handle.result()
        rows = result.prompt_logprobs
        rows = replace(rows, logprobs=np.full_like(rows.logprobs, np.nan))
        token_ids = np.full_like(result.token_ids, NOT_FINITE)
        return FakeHandle(replace(result, token_ids=token_ids, prompt_logprobs=rows), None)


@pytest.mark.parametrize("broken_step", [0, 1, 2])
def test_prompt_logprobs_that_are_not_finite_are_computed_again(broken_step):
    config = replace(CONFIG, max_num_batched_tokens=5)
    engine = make_engine(config=config, runner=BrokenOnce(config, broken_step))
    prompt = "bcbcabcabca"
    out = run(engine, make_request(prompt=prompt, prompt_logprobs=0))[-1]
    assert out.outputs[0].finish_reason == "stop"
    expected = [{i: Logprob(-(1 + i) / 4, 1 + i, "abc"[i])} for i in ids(prompt)[1:]]
    assert out.prompt_logprobs == [None, *expected]


def test_prompt_logprobs_are_not_doubled_by_a_preemption():
    config = replace(CONFIG, num_blocks=8, max_num_batched_tokens=4)
    engine = make_engine(config=config)
    old = make_request("old", prompt="ab", max_tokens=25)
    young = make_request("young", prompt="bcabcabcabca", prompt_logprobs=1, max_tokens=9)
    outputs = {out.request_id: out for out in run(engine, old, young)}
    assert outputs["young"].metrics.num_preemptions > 0
    assert len(outputs["young"].prompt_logprobs) == 12
    assert next(iter(outputs["young"].prompt_logprobs[3])) == ids("b")[0]


def test_prompt_logprobs_in_deltas_come_once():
    request = make_request(
        max_tokens=3, prompt_logprobs=0, output_kind=RequestOutputKind.DELTA, logprobs=0
    )
    outputs = run(make_engine(), request)
    assert [out.prompt_logprobs is not None for out in outputs] == [True, False, False]


def test_a_warm_prefix_is_reported():
    engine = make_engine("$")
    request = make_request(prompt="abcdefghij")
    assert run(engine, request)[-1].num_cached_tokens == 0
    assert run(engine, request)[-1].num_cached_tokens == 8
    assert (engine.stats().prefix_queries, engine.stats().prefix_hits) == (20, 8)
    engine.reset_prefix_cache()
    assert run(engine, request)[-1].num_cached_tokens == 0
    assert run(engine, replace(request, cache_salt="x"))[-1].num_cached_tokens == 0


def test_metrics_are_in_order_of_time():
    arrival_time = time.monotonic()
    outputs = run(make_engine("a$"), replace(make_request(), arrival_time=arrival_time))
    metrics = outputs[-1].metrics
    times = [
        metrics.arrival_time, metrics.first_scheduled_time, metrics.first_token_time,
        metrics.finished_time, time.monotonic(),
    ]  # fmt: skip
    assert times == sorted(times)
    assert times[0] == arrival_time
    assert outputs[0].metrics.finished_time is None


def test_abort_gives_a_final_output_in_the_next_step_and_spares_others():
    engine = make_engine("abcdef", SERIAL)
    for request_id in "xyz":
        engine.add_request(make_request(request_id, max_tokens=3))
    engine.step()
    engine.abort("y")
    engine.abort("y")
    engine.abort("unknown")
    outputs = {out.request_id: out for out in engine.step()}
    assert outputs["y"].finished
    assert (outputs["y"].outputs[0].text, outputs["y"].outputs[0].finish_reason) == ("a", "abort")
    assert outputs["x"].outputs[0].text == "ab"
    last = {out.request_id: out.outputs[0].text for out in run(engine)}
    assert last == {"x": "abc", "z": "abc"}


def test_abort_before_the_first_step_and_of_the_only_request():
    engine = make_engine("abc")
    engine.add_request(make_request())
    engine.abort("r")
    engine.add_request(make_request(max_tokens=2))  # the id is free again
    reasons = [out.outputs[0].finish_reason for out in run(engine)]
    assert reasons == ["abort", None, "length"]


@pytest.mark.parametrize(("config", "tokens"), [(SERIAL, [0]), (CONFIG, [])])
def test_abort_while_a_step_is_under_way(config, tokens):
    def after_dispatch():
        if len(runner.batches) == 2:
            engine.abort("x")

    runner = FakeRunner(config, lambda sequence: 0, result_error=after_dispatch)
    engine = make_engine(config=config, runner=runner)
    outputs = run(engine, make_request("x", max_tokens=3), make_request("y", max_tokens=3))
    last = {out.request_id: out.outputs[0] for out in outputs}
    assert (last["x"].token_ids, last["x"].finish_reason) == (tokens, "abort")
    assert (last["y"].token_ids, last["y"].finish_reason) == ([0, 0, 0], "length")


@pytest.mark.parametrize("where", ["execute", "result"])
def test_a_failed_step_ends_its_sequences_and_the_engine_serves_on(where, caplog):
    error = RuntimeError("chip on fire")

    def fails():
        return len(runner.batches) == 3

    def on_batch(batch):
        if where == "execute" and fails():
            raise error

    runner = FakeRunner(
        CONFIG, lambda sequence: 0, on_batch,
        lambda: error if where == "result" and fails() else None,
    )  # fmt: skip
    engine = make_engine(runner=runner)
    outputs = run(engine, *(make_request(str(i), max_tokens=6) for i in range(6)))
    last = {out.request_id: out.outputs[0] for out in outputs}
    assert [last[str(i)].finish_reason for i in range(6)] == ["error"] * 4 + ["length"] * 2
    assert last["0"].text == "aa"
    assert runner.num_resets == 1
    assert engine.last_error == "RuntimeError: chip on fire"
    assert "chip on fire" in caplog.text
    assert engine.stats().num_failed_steps == 1


def test_a_failed_step_forgets_the_prefix_cache():
    def on_batch(batch):
        if len(runner.batches) == 2:
            raise RuntimeError

    runner = FakeRunner(CONFIG, lambda sequence: 0, on_batch)
    engine = make_engine(runner=runner)
    request = make_request(prompt="abcdefgh", max_tokens=2)
    run(engine, request)
    (out,) = [out for out in run(engine, request) if out.finished]
    assert (out.num_cached_tokens, out.outputs[0].finish_reason) == (0, "length")


@pytest.mark.parametrize("where", ["execute", "result"])
def test_an_interrupted_step_is_computed_again(where):
    def interrupted():
        return len(runner.batches) in (1, 3)

    def on_batch(batch):
        if where == "execute" and interrupted():
            raise KeyboardInterrupt

    runner = FakeRunner(
        CONFIG, lambda sequence: sequence.num_output_tokens, on_batch,
        lambda: KeyboardInterrupt() if where == "result" and interrupted() else None,
    )  # fmt: skip
    engine = make_engine(runner=runner)
    engine.add_request(make_request(prompt="a" * 9, max_tokens=5))
    num_interrupts = 0
    texts = []
    while engine.has_unfinished_requests():
        try:
            texts += [out.outputs[0].text for out in engine.step()]
        except KeyboardInterrupt:
            num_interrupts += 1
            engine.scheduler.pool.check_integrity([])
    assert (num_interrupts, runner.num_resets) == (2, 2)
    assert texts == ["a", "ab", "abc", "abcd", "abcde"]
    check_idle(engine)


def test_an_interrupt_amid_scheduling_leaks_nothing(monkeypatch):
    engine = make_engine("abcdef")
    engine.add_request(make_request("x", max_tokens=3))
    engine.step()
    engine.add_request(make_request("y", max_tokens=3, prompt="abcdefgh"))
    pool = engine.scheduler.pool
    allocate = pool.allocate

    def interrupt(count):
        allocate(count)
        raise KeyboardInterrupt

    monkeypatch.setattr(pool, "allocate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    monkeypatch.undo()
    last = {out.request_id: out.outputs[0].text for out in run(engine)}
    assert last == {"x": "abc", "y": "abc"}


def test_a_fault_in_one_answers_text_ends_only_that_answer(monkeypatch):
    engine = make_engine("abcdef")
    for request_id in "xy":
        engine.add_request(make_request(request_id, max_tokens=3))

    class Broken:
        text = "?"

        def push(self, token_ids):
            raise OverflowError("text")

        finish = push

    engine._requests["x"].sequences[0].detokenizer = Broken()
    last = {}
    while engine.has_unfinished_requests():
        last |= {out.request_id: out.outputs[0] for out in engine.step()}
    assert last["x"].finish_reason == "error"
    assert last["y"].text == "abc"
    check_idle(engine)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request("r", [], SamplingParams()), "prompt is empty"),
        (Request("r", [0] * 32, SamplingParams()), "32 tokens.*max_model_len is 32"),
        (Request("r", [0, VOCAB_SIZE], SamplingParams()), "28 at position 1 is outside"),
        (Request("r", [-1], SamplingParams()), "-1 at position 0 is outside"),
        (Request("r", [True], SamplingParams()), "must be integers, got True"),
        (Request("r", [1.0], SamplingParams()), "must be integers, got 1.0"),
        (Request("r", "abc", SamplingParams()), "must be a list, got str"),
        (Request("", [1], SamplingParams()), "request_id"),
        (Request("r", [1], {"n": 2}), "params must be SamplingParams, got dict"),
        (Request("r", [1], SamplingParams(), priority="high"), "priority must be an integer"),
        (Request("r", [1], SamplingParams(), priority=1), "priority 1 has no effect"),
        (Request("r", [1], SamplingParams(), cache_salt=3), "cache_salt must be a string"),
        (Request("r", [1], SamplingParams(), arrival_time=float("nan")), "arrival_time"),
        (Request("r", [1], SamplingParams(stop_token_ids=[99])), "stop_token_ids has token id 99"),
        (Request("live", [1], SamplingParams()), "'live' is in use"),
    ],
)
def test_bad_requests_are_refused_with_what_is_wrong(request_, message):
    engine = make_engine("ab")
    engine.add_request(make_request("live", max_tokens=2))
    with pytest.raises(ValueError, match=message):
        engine.add_request(request_)
    assert run(engine)[-1].outputs[0].text == "ab"


def test_a_request_that_no_token_could_begin_is_refused():
    engine = make_engine()
    with pytest.raises(ValueError, match="allowed_token_ids holds only stop tokens"):
        engine.add_request(
            make_request(allowed_token_ids=[EOS, 5], stop_token_ids=[5], min_tokens=1)
        )
    assert not engine.has_unfinished_requests()
    engine.add_request(make_request(allowed_token_ids=[EOS, 5], min_tokens=1))


def test_stop_strings_need_a_tokenizer():
    with pytest.raises(ValueError, match="stop strings need a tokenizer"):
        make_engine(tokenizer=None).add_request(make_request(stop="x"))


def test_numpy_prompts_are_taken():
    request = Request("r", np.array(ids("abc"), np.int64), SamplingParams(max_tokens=1))
    out = run(make_engine("x"), request)[-1]
    assert out.prompt_token_ids == ids("abc")
    assert type(out.prompt_token_ids[0]) is int


def test_a_full_queue_refuses_and_takes_again_later():
    engine = make_engine("ab", SERIAL, max_num_waiting=2)
    for request_id in "xy":
        engine.add_request(make_request(request_id, max_tokens=2))
    with pytest.raises(QueueFullError, match="2 sequences are waiting"):
        engine.add_request(make_request("z"))
    engine.step()
    assert len(run(engine, make_request("z", max_tokens=1))) == 3


def test_stats_count():
    engine = make_engine("abcd", SERIAL)
    assert engine.stats().median_host_seconds is None
    run(engine, make_request("x", max_tokens=4), make_request("y", prompt="ab", max_tokens=2))
    stats = engine.stats()
    assert (stats.num_steps, stats.num_prompt_tokens, stats.num_generation_tokens) == (4, 5, 6)
    assert stats.num_computed_tokens == 5 + 6 - 2, "the last token of each is not computed"
    assert (stats.num_running, stats.num_waiting, stats.kv_usage) == (0, 0, 0.0)
    assert 0 < stats.median_host_seconds < 0.1
    assert len(engine.meter.host_seconds) == 3
    assert stats.idle_seconds == pytest.approx(sum(engine.meter.host_seconds))


def measure_host_seconds(output_kind=RequestOutputKind.CUMULATIVE):
    """Median seconds between two decode steps of 64 sequences with text."""
    config = EngineConfig(
        num_blocks=4096, block_size=16, max_model_len=1024, max_num_seqs=64,
        max_num_batched_tokens=1024,
    )  # fmt: skip
    engine = make_engine(config=config, runner=FakeRunner(config, lambda sequence: 3))
    for index in range(64):
        params = {"max_tokens": 150, "output_kind": output_kind}
        engine.add_request(make_request(str(index), prompt="abcdefghij", **params))
    while engine.has_unfinished_requests():
        engine.step()  # outputs are dropped: kept ones would cost garbage collections
    return engine.stats().median_host_seconds


@pytest.mark.parametrize("output_kind", list(RequestOutputKind))
def test_host_time_between_decode_steps_of_64_sequences(output_kind):
    assert measure_host_seconds(output_kind) < 3e-3  # about 0.5 ms where nothing else runs
