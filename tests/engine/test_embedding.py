"""Requests that embed, on a runner without a model: a token's hidden state is (id, position)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fake_runner import EOS, VOCAB_SIZE, FakeRunner, ids

from jaxllm.config import EngineConfig
from jaxllm.engine.engine import Engine, Request
from jaxllm.engine.request import NO_SAMPLING
from jaxllm.engine.sequence import Sequence
from jaxllm.outputs import EmbeddingRequestOutput, RequestFailedError, RequestOutput
from jaxllm.pooling_params import PoolingParams
from jaxllm.sampling_params import RequestOutputKind, SamplingParams

CONFIG = EngineConfig(
    num_blocks=32, block_size=4, max_model_len=32, max_num_seqs=4, max_num_batched_tokens=16
)
SERIAL = replace(CONFIG, overlap=False)
RAW_MEAN = PoolingParams(normalize=False)
RAW_LAST = PoolingParams(pooling="last", normalize=False)
LONG_PROMPT = [*range(20), *range(12)]  # max_model_len tokens, which takes two steps


def make_engine(config: EngineConfig = CONFIG, **runner_options: Any) -> Engine:
    runner = FakeRunner(config, **runner_options)
    return Engine(config, runner, vocab_size=VOCAB_SIZE, eos_token_ids=(EOS,))


def embed(
    request_id: str, prompt: list[int], pooling: PoolingParams = RAW_MEAN, **options: Any
) -> Request:
    return Request(request_id, prompt, NO_SAMPLING, pooling=pooling, **options)


def generate(request_id: str, prompt: list[int], **params: Any) -> Request:
    kind = RequestOutputKind.FINAL_ONLY
    return Request(request_id, prompt, SamplingParams(output_kind=kind, **params))


def run(engine: Engine, *requests: Request) -> dict[str, RequestOutput]:
    """The only output of each request."""
    for request in requests:
        engine.add_request(request)
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    pool = engine.scheduler.pool
    pool.check_integrity([])
    assert pool.num_free_blocks == pool.num_blocks
    assert len({output.request_id for output in outputs}) == len(outputs)
    return {output.request_id: output for output in outputs}


def embedding(output: RequestOutput) -> list[float]:
    return EmbeddingRequestOutput.from_request_output(output).outputs.embedding.tolist()


def mean(prompt: list[int]) -> Any:
    return pytest.approx([sum(prompt) / len(prompt), (len(prompt) - 1) / 2])


def test_a_prompt_is_pooled_and_generates_nothing() -> None:
    engine = make_engine()
    outputs = run(engine, embed("mean", [3, 4, 8]), embed("last", [3, 4, 8], RAW_LAST))
    assert embedding(outputs["mean"]) == [5, 1]
    assert embedding(outputs["last"]) == [8, 2]
    answer = outputs["mean"].outputs[0]
    assert (answer.token_ids, answer.text, answer.finish_reason) == ([], "", "stop")
    stats = engine.stats()
    assert (stats.num_steps, stats.num_prompt_tokens, stats.num_generation_tokens) == (1, 6, 0)


def test_a_prompt_as_long_as_the_context_is_pooled_over_its_chunks() -> None:
    engine = make_engine()
    assert embedding(run(engine, embed("r", LONG_PROMPT))["r"]) == mean(LONG_PROMPT)
    assert engine.stats().num_steps == 2


def test_it_is_batched_with_generation_which_it_does_not_change() -> None:
    alone = run(make_engine(), generate("g", ids("hello"), seed=1, max_tokens=9))["g"].outputs
    requests = [embed(str(n), LONG_PROMPT[: 7 * n + 1]) for n in range(4)]
    outputs = run(make_engine(), generate("g", ids("hello"), seed=1, max_tokens=9), *requests)
    assert outputs["g"].outputs == alone
    for request in requests:
        expected = mean(list(request.prompt_token_ids))
        assert embedding(outputs[request.request_id]) == expected


def test_a_preempted_mean_begins_anew() -> None:
    config = EngineConfig(
        num_blocks=10, block_size=4, max_model_len=32, max_num_seqs=2, max_num_batched_tokens=4
    )
    engine = make_engine(config)
    old = generate("g", ids("abcd"), max_tokens=24, ignore_eos=True, seed=0)
    outputs = run(engine, old, embed("r", LONG_PROMPT[:28]))
    metrics = outputs["r"].metrics
    assert metrics is not None
    assert metrics.num_preemptions > 0
    assert embedding(outputs["r"]) == mean(LONG_PROMPT[:28])


def test_a_cached_prefix_serves_the_last_token_and_not_the_mean() -> None:
    engine = make_engine()
    run(engine, generate("warm", LONG_PROMPT[:16], max_tokens=1))
    outputs = run(engine, embed("m", LONG_PROMPT), embed("l", LONG_PROMPT, RAW_LAST))
    assert embedding(outputs["m"]) == mean(LONG_PROMPT)
    assert embedding(outputs["l"]) == [11, 31]
    assert outputs["m"].num_cached_tokens == 0
    assert outputs["l"].num_cached_tokens == 28  # all full blocks but the last, the mean's too


def test_dimensions_are_cut_before_the_norm() -> None:
    engine = make_engine()
    cut = PoolingParams(dimensions=1, pooling="last")
    whole = PoolingParams(pooling="last")
    outputs = run(engine, embed("cut", [1, 1, 3], cut), embed("whole", [1, 1, 1, 4], whole))
    assert embedding(outputs["cut"]) == [1]
    assert embedding(outputs["whole"]) == pytest.approx([0.8, 0.6])


def test_abort_ends_it_without_a_result() -> None:
    engine = make_engine()
    engine.add_request(embed("r", LONG_PROMPT))
    engine.step()
    engine.abort("r")
    (output,) = engine.step()
    with pytest.raises(RequestFailedError, match="'abort'"):
        EmbeddingRequestOutput.from_request_output(output)


def test_sequences_whose_logits_are_not_finite_end_alone(caplog: pytest.LogCaptureFixture) -> None:
    bad = {"bad", "bad-chunk", "bad-embedding"}
    engine = make_engine(is_ok=lambda sequence: sequence.request_id not in bad)
    good = generate("good", ids("hello"), seed=1, max_tokens=9)
    expected = run(make_engine(), good)["good"].outputs
    long = [*range(1, 20), 9, 9]
    outputs = run(
        engine,
        good,
        generate("bad", ids("hi"), max_tokens=5),
        embed("bad-embedding", [1, 2]),
        generate("bad-chunk", long, max_tokens=5),
    )
    assert outputs["good"].outputs == expected
    for request_id in bad:
        assert outputs[request_id].outputs[0].finish_reason == "error"
        assert outputs[request_id].outputs[0].token_ids == []
    assert engine.last_error == "ArithmeticError: the model's logits are not finite"
    assert "request bad failed" in caplog.text
    assert run(engine, embed("next", [2]))["next"].embedding is not None


def test_blocks_that_are_not_finite_are_not_shared() -> None:
    broken = [True]
    engine = make_engine(is_ok=lambda sequence: not broken[0])
    run(engine, generate("bad", LONG_PROMPT[:16], max_tokens=1))
    broken[0] = False
    output = run(engine, generate("good", LONG_PROMPT[:16], max_tokens=1))["good"]
    assert output.num_cached_tokens == 0
    assert output.outputs[0].finish_reason == "length"


@pytest.mark.parametrize("config", [CONFIG, SERIAL], ids=["overlap", "serial"])
def test_who_shares_blocks_with_a_sequence_that_is_not_finite_is_computed_again(
    config: EngineConfig,
) -> None:
    """It reads NaN too, in the step that shows it, and shares no block from then on."""
    reads: dict[str, int] = {}

    def is_ok(sequence: Sequence) -> bool:
        reads[sequence.request_id] = reads.get(sequence.request_id, 0) + 1
        return sequence.request_id != "bad" and sequence.is_isolated

    prompts = {"bad": [*LONG_PROMPT[:4], 3], "victim": [*LONG_PROMPT[:4], 4]}
    requests = {
        name: generate(name, prompt, max_tokens=3, seed=1) for name, prompt in prompts.items()
    }
    expected = run(make_engine(), requests["victim"])["victim"].outputs
    engine = make_engine(config, is_ok=is_ok)
    outputs = run(engine, *requests.values())
    assert outputs["bad"].outputs[0].finish_reason == "error"
    assert outputs["victim"].outputs == expected
    if not config.overlap:
        assert reads == {"bad": 2, "victim": 4}
    assert engine.scheduler.pool.cached_blocks == ()


def test_a_mean_that_is_not_finite_is_an_error() -> None:
    engine = make_engine(SERIAL)
    engine.add_request(embed("r", LONG_PROMPT))
    engine.step()
    engine.runner._hidden_sums[:] = np.inf  # type: ignore[attr-defined]
    (output,) = engine.step()
    assert output.outputs[0].finish_reason == "error"
    assert output.embedding is None


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (embed("r", [*LONG_PROMPT, 1]), "the prompt has 33 tokens, and there is room for 32"),
        (embed("r", []), "the prompt is empty"),
        (embed("r", [VOCAB_SIZE]), "outside the vocabulary"),
        (embed("r", [1], "mean"), "pooling must be PoolingParams, got str"),  # type: ignore[arg-type]
        (replace(embed("r", [1]), params=SamplingParams()), "takes no SamplingParams"),
    ],
)
def test_bad_requests_are_refused(request_: Request, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_engine().add_request(request_)


@pytest.mark.parametrize("seed", range(20))
def test_random_prompts_over_tiny_pools(seed: int) -> None:
    random = np.random.default_rng(seed)
    config = EngineConfig(
        num_blocks=9, block_size=4, max_model_len=32, max_num_seqs=3, max_num_batched_tokens=7
    )
    engine = make_engine(config)
    requests = []
    for n in range(12):
        prompt = [*LONG_PROMPT[: random.integers(0, 20)], *random.integers(0, VOCAB_SIZE, 5)]
        prompt = [int(token_id) for token_id in prompt]
        pooling = [RAW_MEAN, RAW_LAST][random.integers(0, 2)]
        wants_text = random.random() < 0.4
        max_tokens = int(random.integers(1, 9))
        requests.append(
            generate(str(n), prompt, max_tokens=max_tokens)
            if wants_text
            else embed(str(n), prompt, pooling)
        )
    outputs = run(engine, *requests)
    for request in requests:
        if request.pooling is not None:
            prompt = list(request.prompt_token_ids)
            expected = (
                mean(prompt) if request.pooling == RAW_MEAN else [prompt[-1], len(prompt) - 1]
            )
            assert embedding(outputs[request.request_id]) == pytest.approx(expected)
