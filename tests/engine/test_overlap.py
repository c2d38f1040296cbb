"""What is dispatched when, and what becomes of a step that runs while the one before it turns out
to have ended something. That tokens are the same in every mode is held by test_random_load.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fake_runner import EOS, VOCAB_SIZE, FakeHandle, FakeRunner, ids

from jaxllm.config import EngineConfig
from jaxllm.engine.engine import Engine, Request
from jaxllm.engine.sequence import Batch, Sequence, StepResult, mask_len
from jaxllm.outputs import RequestOutput
from jaxllm.sampling_params import SamplingParams
from jaxllm.structured_outputs import StructuredOutputsParams

CONFIG = EngineConfig(
    num_blocks=32, block_size=4, max_model_len=32, max_num_seqs=4, max_num_batched_tokens=16
)
SEVERAL = replace(CONFIG, max_steps_per_dispatch=4)


class LoggedHandle:
    def __init__(self, handle: FakeHandle, log: Callable[[], None]) -> None:
        self.handle, self.log = handle, log

    def result(self) -> StepResult:
        self.log()
        return self.handle.result()


class LoggingRunner(FakeRunner):
    """log: (what, number of the step). num_pending: of the sequences of each batch."""

    def __init__(self, config: EngineConfig, **options: Any) -> None:
        super().__init__(config, **options)
        self.log: list[tuple[str, int]] = []
        self.num_pending: list[list[int]] = []

    def execute(self, batch: Batch) -> Any:
        number = len(self.batches)
        self.num_pending.append([row.sequence.num_pending for row in batch.sequences])
        self.log.append(("execute", number))
        handle = super().execute(batch)
        return LoggedHandle(handle, lambda: self.log.append(("result", number)))


def make_engine(
    config: EngineConfig = CONFIG, answer: str = "", **options: Any
) -> tuple[Engine, LoggingRunner]:
    """An engine whose model says ``answer`` and then "z" for ever."""

    def next_token(sequence: Sequence) -> int:
        return ids(answer.ljust(99, "z"))[sequence.num_output_tokens]

    runner = LoggingRunner(config, next_token=next_token, **options)
    return Engine(config, runner, vocab_size=VOCAB_SIZE, eos_token_ids=(EOS,)), runner


def request(request_id: str = "r", prompt: str = "abc", **params: Any) -> Request:
    return Request(request_id, ids(prompt), SamplingParams(**params))


def run(engine: Engine, *requests: Request) -> dict[str, RequestOutput]:
    """The last output of each request."""
    for each in requests:
        engine.add_request(each)
    outputs = {}
    while engine.has_unfinished_requests():
        outputs |= {output.request_id: output for output in engine.step()}
    pool = engine.scheduler.pool
    pool.check_integrity([])
    assert pool.num_free_blocks == pool.num_blocks
    return outputs


def rows(runner: FakeRunner) -> list[list[tuple[str, int]]]:
    """(request, tokens it may yield) of each step."""
    return [
        [(row.sequence.request_id, row.samples) for row in batch.sequences]
        for batch in runner.batches
    ]


def test_a_step_is_dispatched_before_the_result_of_the_one_before_it() -> None:
    engine, runner = make_engine()
    run(engine, request(max_tokens=3))
    assert runner.log == [
        ("execute", 0), ("execute", 1), ("result", 0), ("execute", 2), ("result", 1), ("result", 2),
    ]  # fmt: skip
    assert runner.num_pending == [[0], [1], [1]], "the host does not know the token it dispatches"


def test_without_overlap_each_result_comes_before_the_next_step() -> None:
    engine, runner = make_engine(replace(CONFIG, overlap=False))
    run(engine, request(max_tokens=2))
    assert runner.log == [("execute", 0), ("result", 0), ("execute", 1), ("result", 1)]


def test_a_length_that_is_known_beforehand_costs_no_step() -> None:
    engine, runner = make_engine()
    run(engine, request("x", max_tokens=2), request("y", max_tokens=4))
    names = [[name for name, _ in batch] for batch in rows(runner)]
    assert names == [["x", "y"], ["x", "y"], ["y"], ["y"]]


def test_what_ended_late_frees_its_slot_and_blocks_for_the_next() -> None:
    config = replace(CONFIG, max_num_seqs=1, num_blocks=8, max_model_len=32)
    engine, runner = make_engine(config, answer="ab$")
    outputs = run(engine, request("x", "a" * 20), request("y", "b" * 20))
    assert [outputs[name].outputs[0].token_ids for name in "xy"] == [ids("ab$")] * 2
    assert rows(runner)[3] == [("x", 1)], "dispatched before the end was known"


def test_generated_blocks_are_found_although_their_tokens_came_late() -> None:
    engine, _ = make_engine(answer="abcdefgh")
    first = run(engine, request("x", "xyz", max_tokens=6))["x"]
    prompt = "xyz" + "abcdef" + "q"
    assert first.outputs[0].token_ids == ids("abcdef")
    assert run(engine, request("y", prompt, max_tokens=1))["y"].num_cached_tokens == 8


class AnyToken:
    """A constraint that allows everything, and takes note."""

    mask = np.full(mask_len(VOCAB_SIZE), -1, np.int32)
    is_complete = False

    def __init__(self) -> None:
        self.accepted: list[int] = []

    def accept(self, token_id: int) -> None:
        self.accepted.append(token_id)

    def forced(self) -> list[int]:
        return []

    def copy(self) -> AnyToken:
        return self


@pytest.mark.parametrize("config", [CONFIG, SEVERAL])
def test_a_sequence_with_a_constraint_is_not_run_ahead_of(config: EngineConfig) -> None:
    engine, runner = make_engine(config, answer="abcdef")
    constraint = AnyToken()
    structured = SamplingParams(
        max_tokens=4, structured_outputs=StructuredOutputsParams(regex="[a-z]*")
    )
    outputs = run(
        engine,
        request("plain", max_tokens=6),
        Request("form", ids("abc"), structured, constraint=constraint),
    )
    assert constraint.accepted == outputs["form"].outputs[0].token_ids == ids("abcd")
    assert outputs["plain"].outputs[0].token_ids == ids("abcdef")
    for batch, pending in zip(runner.batches, runner.num_pending, strict=True):
        if any(row.sequence.constraint is not None for row in batch.sequences):
            assert not any(pending)
            assert batch.num_steps == 1


def test_a_step_that_cannot_be_dispatched_does_not_harm_the_one_before_it() -> None:
    def on_batch(batch: Batch) -> None:
        if len(runner.batches) == 3:
            raise RuntimeError("no memory")

    engine, runner = make_engine(on_batch=on_batch)
    outputs = run(engine, request("x", max_tokens=2), request("y", max_tokens=9))
    x, y = outputs["x"].outputs[0], outputs["y"].outputs[0]
    assert (len(x.token_ids), x.finish_reason) == (2, "length")
    assert (len(y.token_ids), y.finish_reason) == (2, "error")
    assert runner.num_resets == 1


def test_a_failed_step_spares_those_that_are_only_in_the_next() -> None:
    failing = [False, True]
    engine, runner = make_engine(
        result_error=lambda: RuntimeError("lost") if failing and failing.pop(0) else None
    )
    engine.add_request(request("x", max_tokens=9))
    engine.step()
    engine.step()  # the second step, which fails, is under way
    outputs = run(engine, request("y", max_tokens=3))
    assert [row[0] for row in rows(runner)[2]] == ["x", "y"]
    assert outputs["x"].outputs[0].finish_reason == "error"
    assert outputs["y"].outputs[0].token_ids == ids("zzz")
    assert engine.stats().num_failed_steps == runner.num_resets == 1


# ---- several tokens a dispatch


def test_as_many_tokens_are_decoded_at_a_time_as_each_may_have() -> None:
    engine, runner = make_engine(SEVERAL)
    outputs = run(engine, request("x", max_tokens=3), request("y", max_tokens=8))
    assert rows(runner) == [
        [("x", 1), ("y", 1)], [("x", 2), ("y", 4)], [("y", 3)],
    ]  # fmt: skip
    assert [len(outputs[name].outputs[0].token_ids) for name in "xy"] == [3, 8]
    assert engine.stats().num_computed_tokens == 3 + 3 + 3 + 8 - 2


def test_a_stop_token_ends_a_row_within_a_dispatch() -> None:
    engine, _ = make_engine(SEVERAL, answer="abc$")
    outputs = run(engine, request("x"), request("y", max_tokens=20, ignore_eos=True))
    assert outputs["x"].outputs[0].token_ids == ids("abc$")
    assert outputs["y"].outputs[0].token_ids == ids("abc$".ljust(20, "z"))


def test_one_token_at_a_time_while_somebody_waits() -> None:
    engine, runner = make_engine(replace(SEVERAL, max_num_seqs=1))
    run(engine, request("x", max_tokens=6), request("y", max_tokens=6))
    assert [row for batch in rows(runner) for row in batch] == [
        *[("x", 1)] * 6, ("y", 1), ("y", 4), ("y", 1),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "params", [{"logprobs": 0}, {"stop_token_ids": list(range(9)), "ignore_eos": True}]
)
def test_one_token_at_a_time_for_what_the_host_looks_at(params: dict[str, Any]) -> None:
    engine, runner = make_engine(SEVERAL)
    run(engine, request("x", max_tokens=6, **params), request("y", max_tokens=3))
    assert {samples for batch in rows(runner) for _, samples in batch} == {1}


@pytest.mark.parametrize(("num_blocks", "samples"), [(8, 4), (7, 1)])
def test_more_tokens_come_only_where_blocks_are_free(num_blocks: int, samples: int) -> None:
    config = replace(SEVERAL, num_blocks=num_blocks, max_model_len=28, overlap=False)
    engine, runner = make_engine(replace(config, max_num_batched_tokens=32))
    run(engine, request("x", "a" * 12, max_tokens=2), request("y", "b" * 11, max_tokens=9))
    # x takes its fourth block, y has three for 12 tokens
    assert rows(runner)[1:3] == [[("x", 1), ("y", samples)], [("y", 4)]]
    assert engine.stats().num_preemptions == 0


def test_a_program_that_is_not_ready_is_not_waited_for() -> None:
    runner = FakeRunner(SEVERAL)
    engine = Engine(SEVERAL, runner, vocab_size=VOCAB_SIZE, max_steps=lambda num_seqs: 1)
    run(engine, request(max_tokens=6))
    assert {batch.num_steps for batch in runner.batches} == {1}
