"""The Python API on a tiny model: prompts, order, streams, determinism, seeds, failures, load."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from torch_reference import TorchModel, assert_greedy

from jaxllm import LLM, SamplingParams
from jaxllm.outputs import RequestOutput
from jaxllm.runtime.compilation import COMPILE_EVENT
from jaxllm.runtime.model_runner import RunnerStats

GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
ASCII = range(5, 99)  # tokens of one printable character each
SEEDED = SamplingParams(temperature=1, max_tokens=24, ignore_eos=True)
SMALLEST_POOL = 16 * 8192  # bytes: 16 blocks, of 2 layers x 16 tokens x 2 x 2 heads x 16 floats


@pytest.fixture(scope="module")
def llm(tiny_llama_folder: Path, tiny_llm: dict[str, Any]) -> Iterator[LLM]:
    with LLM(str(tiny_llama_folder), **tiny_llm) as llm:
        yield llm
        assert_idle(llm)


@pytest.fixture(scope="module")
def crowded(tiny_llama_folder: Path, tiny_llm: dict[str, Any]) -> Iterator[LLM]:
    """With a pool that holds one sequence of max_model_len, so that sequences are preempted."""
    options = {**tiny_llm, "kv_cache_memory_bytes": SMALLEST_POOL}
    with LLM(str(tiny_llama_folder), **options) as llm:
        yield llm
        assert_idle(llm)


def assert_idle(llm: LLM) -> None:
    """Nothing runs or waits, and every block is free."""
    pool = llm.engine.scheduler.pool
    pool.check_integrity([])
    assert pool.num_free_blocks == pool.num_blocks
    assert llm.engine.scheduler.num_running == llm.engine.scheduler.num_waiting == 0
    assert not llm._inboxes


def random_prompts(count: int, seed: int = 0, longest: int = 40) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(5, 320, random.integers(1, longest)).tolist() for _ in range(count)]


def tokens_of(outputs: list[RequestOutput]) -> list[list[int]]:
    return [completion.token_ids for output in outputs for completion in output.outputs]


# ---- prompts and outputs


def test_text_ids_dicts_and_chats_are_the_same_prompts(llm: LLM) -> None:
    text = "<|user|>Is the fox quick?<|end|><|assistant|>"
    ids = llm.get_tokenizer().encode(text)
    chat = [{"role": "user", "content": "Is the fox quick?"}]
    prompts: list[Any] = [text, ids, tuple(ids), {"prompt": text}, {"prompt_token_ids": ids}, chat]
    outputs = [llm.generate(prompt, GREEDY, use_tqdm=False) for prompt in prompts]
    outputs += [llm.chat(chat, GREEDY, use_tqdm=False)]
    assert {len(output) for output in outputs} == {1}
    together = llm.generate(prompts, GREEDY, use_tqdm=False)
    together += llm.chat([chat, chat], GREEDY, use_tqdm=False)
    flat = [output for group in outputs for output in group] + together
    assert all(output.prompt_token_ids == ids for output in flat)
    assert len({tuple(output.outputs[0].token_ids) for output in flat}) == 1
    given_as_text = [True, False, False, True, False, True]
    assert [output.prompt == text for output in together] == [*given_as_text, True, True]


def test_a_salt_keeps_cached_prompts_apart(llm: LLM) -> None:
    text = "<|user|>Is the fox quick? It is, and the dog is lazy.<|end|><|assistant|>"
    ids = llm.get_tokenizer().encode(text)
    cached = (len(ids) - 1) // 16 * 16
    assert cached
    llm.reset_prefix_cache()
    for salt, expected in (("a", 0), ("a", cached), ("b", 0), (None, 0), ("b", cached)):
        options = {} if salt is None else {"cache_salt": salt}
        for prompt in ({"prompt_token_ids": ids, **options}, {"prompt": text, **options}):
            (output,) = llm.generate(prompt, GREEDY, use_tqdm=False)
            assert output.num_cached_tokens == expected
            expected = cached


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda llm: llm.chat([]), "messages is empty"),
        (lambda llm: llm.chat([[]]), r"messages must be a conversation .*; got \[\]"),
        (lambda llm: llm.chat("Hi"), "messages must be a list of messages, got str"),
        (lambda llm: llm.chat([5]), "messages must be a conversation .*; got 5"),
        (lambda llm: llm.generate("a", 5), "sampling_params must be SamplingParams .*, got int"),
        (
            lambda llm: llm.generate("a", {"temperature": 0}),
            "sampling_params must be SamplingParams .*, got dict",
        ),
        (lambda llm: llm.generate("a", [5]), "sampling_params must be SamplingParams, got int"),
        (lambda llm: llm.generate("a", priority=5), "priority must be a list of integers, got int"),
        (lambda llm: llm.generate({"prompt": "a", "cache_salt": 5}), "cache_salt must be .*got 5"),
        (lambda llm: llm.generate({"cache_salt": "a"}), r"has 'prompt'.*; got \['cache_salt'\]"),
    ],
)
def test_an_argument_of_another_kind_is_named(
    llm: LLM, call: Callable[[LLM], Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        call(llm)


def test_a_batch_larger_than_the_queue_is_fed_bit_by_bit(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = random_prompts(20, seed=9)
    expected = tokens_of(llm.generate(prompts, GREEDY, use_tqdm=False))
    monkeypatch.setattr(llm.engine, "max_num_waiting", 2)
    assert tokens_of(llm.generate(prompts, GREEDY, use_tqdm=False)) == expected
    num_steps = llm.engine.stats().num_steps
    with pytest.raises(ValueError, match="999 at position 0"):  # though it would come last
        llm.generate([*prompts, [999]], GREEDY, use_tqdm=False)
    assert llm.engine.stats().num_steps == num_steps
    assert_idle(llm)


def test_chat_options_reach_the_template(llm: LLM) -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "The fox"}]
    (output,) = llm.chat(chat, GREEDY, continue_final_message=True, add_generation_prompt=False,
                         use_tqdm=False)  # fmt: skip
    assert output.prompt == "<|user|>Hi<|end|><|assistant|>The fox"
    template = "{{ messages[0].content }}{{ mood }}"
    (output,) = llm.chat(chat, GREEDY, chat_template=template, use_tqdm=False,
                         chat_template_kwargs={"mood": "!"})  # fmt: skip
    assert output.prompt == "Hi!"


def test_outputs_are_in_order_and_each_has_its_own_params(llm: LLM) -> None:
    prompts = [
        [int(ASCII[token % len(ASCII)]) for token in prompt] for prompt in random_prompts(30)
    ]
    params = [
        SamplingParams(temperature=0, max_tokens=1 + 7 * i % 20, allowed_token_ids=ASCII)
        for i in range(30)
    ]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [output.prompt_token_ids for output in outputs] == prompts
    for output, each in zip(outputs, params, strict=True):
        (answer,) = output.outputs
        assert output.finished
        assert answer.finish_reason == "length"
        assert len(answer.token_ids) == each.max_tokens
        assert answer.text == llm.get_tokenizer().decode(answer.token_ids)
        assert output.metrics is not None
        times = output.metrics
        assert times.arrival_time <= times.first_scheduled_time <= times.first_token_time  # type: ignore[operator]
        assert times.first_token_time <= times.finished_time  # type: ignore[operator]
    assert llm.generate([], GREEDY, use_tqdm=False) == []


def test_without_params_the_recommendation_of_the_models_makers_is_taken(llm: LLM) -> None:
    recommended = SamplingParams(temperature=0.5, top_k=20)  # generation_config.json of the model
    assert llm.get_default_sampling_params() == recommended
    params = dataclasses.replace(recommended, logprobs=0)
    outputs = llm.generate(random_prompts(20), params, use_tqdm=False)
    answers = [output.outputs[0] for output in outputs]
    ranks = [next(iter(entry.values())).rank for a in answers for entry in a.logprobs or ()]
    assert 1 < max(ranks) <= 20
    (output,) = llm.generate([7], use_tqdm=False)
    assert len(output.outputs[0].token_ids) <= 16


def test_the_progress_bar_can_be_turned_off(llm: LLM, capfd: pytest.CaptureFixture[str]) -> None:
    llm.generate(random_prompts(3), GREEDY, use_tqdm=False)
    assert capfd.readouterr() == ("", "")
    llm.generate(random_prompts(3), GREEDY)
    assert "3/3" in capfd.readouterr().err


def test_max_tokens_none_goes_on_to_max_model_len(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    (output,) = llm.generate(random_prompts(1), params, use_tqdm=False)
    assert len(output.prompt_token_ids) + len(output.outputs[0].token_ids) == 256
    assert output.outputs[0].finish_reason == "length"


def test_priority_decides_who_is_served_first(
    tiny_llama_folder: Path, tiny_llm: dict[str, Any]
) -> None:
    with LLM(str(tiny_llama_folder), **tiny_llm, scheduling_policy="priority") as llm:
        priority = [-i for i in range(16)]
        outputs = llm.generate(random_prompts(16), GREEDY, use_tqdm=False, priority=priority)
    first = [o.metrics.first_scheduled_time or 0 for o in outputs if o.metrics]
    assert max(first[8:]) < min(first[:8])


# ---- streams


def test_a_stream_has_the_pieces_of_the_answer(llm: LLM) -> None:
    for params in (GREEDY, dataclasses.replace(SEEDED, seed=5, n=3, stop=["t", "a9"])):
        (expected,) = llm.generate("Once upon", params, use_tqdm=False)
        texts: dict[int, str] = {}
        tokens: dict[int, list[int]] = {}
        reasons: dict[int, str | None] = {}
        for piece in llm.stream("Once upon", params):
            texts[piece.index] = texts.get(piece.index, "") + piece.text
            tokens[piece.index] = [*tokens.get(piece.index, []), *piece.token_ids]
            reasons[piece.index] = piece.finish_reason
        for answer in expected.outputs:
            assert texts[answer.index] == answer.text
            assert tokens[answer.index] == answer.token_ids
            assert reasons[answer.index] == answer.finish_reason


def test_leaving_a_stream_or_never_entering_it_frees_its_blocks(llm: LLM) -> None:
    for piece in llm.stream("Once upon a time", dataclasses.replace(GREEDY, max_tokens=99)):
        assert piece.token_ids
        break
    llm.stream("never entered")
    assert llm.generate("The fox", GREEDY, use_tqdm=False)[0].finished
    assert_idle(llm)


def test_streams_and_generate_share_the_engine(llm: LLM) -> None:
    params = dataclasses.replace(GREEDY, ignore_eos=True)
    prompts = random_prompts(3, seed=4)
    expected = tokens_of(llm.generate(prompts, params, use_tqdm=False))
    first, second = llm.stream(prompts[0], params), llm.stream(prompts[1], params)
    got: list[list[int]] = [[], []]
    got[0] += next(first).token_ids
    got[1] += next(second).token_ids
    assert tokens_of(llm.generate(prompts[2], params, use_tqdm=False)) == expected[2:]
    for one, other in zip(first, second, strict=True):
        got[0] += one.token_ids
        got[1] += other.token_ids
    assert got == expected[:2]


# ---- determinism and seeds


def test_the_same_batch_twice_gives_the_same_bits(
    llm: LLM, tiny_llama_folder: Path, tiny_llm: dict[str, Any]
) -> None:
    prompts = random_prompts(20, seed=1)
    params = [
        SamplingParams(
            temperature=i % 3, seed=i, max_tokens=12, logprobs=3, prompt_logprobs=2,
            top_p=0.9, repetition_penalty=1 + 0.1 * (i % 2),
        )
        for i in range(20)
    ]  # fmt: skip

    def bits(llm: LLM) -> list[Any]:
        llm.reset_prefix_cache()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return [(output.outputs, output.prompt_logprobs) for output in outputs]

    first = bits(llm)
    assert bits(llm) == first
    with LLM(str(tiny_llama_folder), **tiny_llm) as other:
        assert bits(other) == first


def test_a_seed_gives_its_tokens_whatever_else_is_in_the_batch(llm: LLM, crowded: LLM) -> None:
    prompts = random_prompts(12, seed=2)
    params = [dataclasses.replace(SEEDED, seed=100 + i) for i in range(12)]
    alone = [
        tokens_of(llm.generate(prompt, each, use_tqdm=False))[0]
        for prompt, each in zip(prompts, params, strict=True)
    ]
    assert len({tuple(tokens) for tokens in alone}) == 12
    others = random_prompts(12, seed=3)
    mixed = llm.generate([*others, *prompts[::-1]], [SEEDED] * 12 + params[::-1], use_tqdm=False)
    assert tokens_of(mixed)[12:] == alone[::-1]

    before = crowded.engine.stats().num_preemptions
    assert tokens_of(crowded.generate(prompts, params, use_tqdm=False)) == alone
    assert crowded.engine.stats().num_preemptions > before


def test_answer_i_of_a_seeded_request_is_that_of_seed_plus_i(llm: LLM, crowded: LLM) -> None:
    prompt = random_prompts(1, seed=5, longest=30)[0]
    singles = [dataclasses.replace(SEEDED, seed=7 + i) for i in range(10)]
    expected = tokens_of(llm.generate([prompt] * 10, singles, use_tqdm=False))
    params = dataclasses.replace(SEEDED, seed=7, n=10)
    for engine in (llm, crowded):
        (output,) = engine.generate(prompt, params, use_tqdm=False)
        assert [answer.index for answer in output.outputs] == list(range(10))
        assert tokens_of([output]) == expected


def test_without_a_seed_answers_differ(llm: LLM) -> None:
    outputs = llm.generate([[9, 8, 7]] * 6, SEEDED, use_tqdm=False)
    assert len({tuple(tokens) for tokens in tokens_of(outputs)}) == 6


# ---- failures


@pytest.mark.parametrize("where", ["before dispatch", "after dispatch", "result"])
def test_a_failed_step_ends_its_requests_and_the_engine_serves_on(
    llm: LLM, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = random_prompts(12, seed=6, longest=5)
    expected = tokens_of(llm.generate(prompts, GREEDY, use_tqdm=False))
    with monkeypatch.context() as patch:
        patch.setattr(llm._running.runner, "execute", failing_once(llm, where, step=3))
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    reasons = [output.outputs[0].finish_reason for output in outputs]
    assert reasons == ["error"] * 8 + ["length"] * 4  # 8 slots; the others waited
    assert tokens_of(outputs)[8:] == expected[8:]
    assert llm.engine.last_error == "RuntimeError: the device is lost"
    assert tokens_of(llm.generate(prompts, GREEDY, use_tqdm=False)) == expected
    assert_idle(llm)


def failing_once(
    llm: LLM, where: str, step: int, error: type[BaseException] = RuntimeError
) -> Callable[..., Any]:
    """The runner's execute, but its step-th call fails; the device state is lost then."""
    runner, calls = llm._running.runner, iter(range(10**6))
    execute = runner.execute

    def result() -> Any:
        raise error("the device is lost")

    def wrapper(batch: Any) -> Any:
        if next(calls) != step:
            return execute(batch)
        if where != "before dispatch":
            handle = execute(batch)
            for leaf in jax.tree.leaves(runner._state):
                leaf.delete()
            if where == "result":
                object.__setattr__(handle, "result", result)
                return handle
        return result()

    return wrapper


def test_an_interrupt_reaches_the_user_and_the_engine_serves_on(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = random_prompts(12, seed=7)
    expected = tokens_of(llm.generate(prompts, GREEDY, use_tqdm=False))
    stop = failing_once(llm, "after dispatch", step=4, error=KeyboardInterrupt)
    with monkeypatch.context() as patch:
        patch.setattr(llm._running.runner, "execute", stop)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(prompts, GREEDY, use_tqdm=False)
    assert tokens_of(llm.generate(prompts, GREEDY, use_tqdm=False)) == expected
    assert_idle(llm)


def test_a_model_that_nobody_closes_does_not_hold_up_the_end(tiny_llama_folder: Path) -> None:
    """The README's first example: it ends while most programs are still to be compiled."""
    program = f"""
import atexit
from jaxllm import LLM

def report():  # after all that end before it, for it is registered first
    print(figures().num_ready_programs / figures().num_programs)

atexit.register(report)
llm = LLM({str(tiny_llama_folder)!r}, program_cache=False)
figures = llm._running.runner.figures
llm.generate("The fox", use_tqdm=False)
"""
    child = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    )
    assert float(child.stdout) < 0.5


# ---- load


def test_500_random_requests_compile_nothing_and_pad_little(
    llm: LLM, tiny_llama_folder: Path
) -> None:
    """The engine raises LateCompileError by itself; here jax is asked as well."""
    random = np.random.default_rng(8)
    compiled: list[str] = []

    def listener(event: str, duration_secs: float, **_: str | int) -> None:
        if event == COMPILE_EVENT:
            compiled.append(event)

    llm._running.runner.stats = stats = RunnerStats()
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        greedy = run_random_load(llm, random, num_requests=500)
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert not compiled
    assert stats.padding_share < 0.30
    assert stats.num_tokens > 10_000
    reference = TorchModel.from_folder(tiny_llama_folder)
    for output in greedy[:40]:
        tokens = output.outputs[0].token_ids
        expected = reference.greedy(output.prompt_token_ids, len(tokens))
        assert_greedy(reference, output.prompt_token_ids, tokens, expected)
    assert_idle(llm)


def run_random_load(
    llm: LLM, random: np.random.Generator, num_requests: int
) -> list[RequestOutput]:
    """Batches and streams, some of them left early. Returns the plain greedy ones."""
    greedy, done = [], 0
    while done < num_requests:
        count = min(int(random.integers(1, 60)), num_requests - done)
        prompts = random_prompts(count, seed=done, longest=120)
        params = [random_params(random) for _ in prompts]
        stream = llm.stream(prompts[0], params[0])
        next(stream)
        outputs = llm.generate(prompts[1:], params[1:], use_tqdm=False)
        assert all(o.outputs[0].finish_reason in ("stop", "length") for o in outputs)
        greedy += [o for o, p in zip(outputs, params[1:], strict=True) if p.greedy]
        if random.random() < 0.5:
            stream.close()  # type: ignore[attr-defined]
        else:
            assert [piece.finish_reason for piece in stream][-1:] != [None]
        done += count
    return greedy


def random_params(random: np.random.Generator) -> SamplingParams:
    """Plain greedy, or any mixture of options."""
    length = int(random.integers(1, 60))
    if random.random() < 0.3:
        return SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
    choices: dict[str, Any] = {
        "temperature": random.choice([0.3, 1, 2]), "top_k": int(random.integers(1, 50)),
        "top_p": random.uniform(0.1, 1), "min_p": random.uniform(0, 0.5),
        "seed": int(random.integers(1000)), "repetition_penalty": random.uniform(0.7, 1.5),
        "presence_penalty": random.uniform(-2, 2), "frequency_penalty": random.uniform(-2, 2),
        "logit_bias": {7: 3.0, 9: -50}, "banned_token_ids": [5, 6],
        "allowed_token_ids": range(1, 200), "min_tokens": length // 2, "ignore_eos": True,
        "stop_token_ids": [11, 12], "stop": ["a", "xyz"], "logprobs": int(random.integers(21)),
        "prompt_logprobs": int(random.integers(21)), "detokenize": True,
    }  # fmt: skip
    taken = random.choice(list(choices), random.integers(0, 6), replace=False)
    return SamplingParams(max_tokens=length, **{name: choices[name] for name in taken})
