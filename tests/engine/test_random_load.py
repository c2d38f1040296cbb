"""Random requests, aborts and failures over tiny pools: nothing leaks, nothing starves, and each
sequence's tokens are those of the same sequence alone."""

import random
from collections import Counter
from dataclasses import replace

import pytest
from beam_reference import beam_search
from fake_runner import EOS, VOCAB_SIZE, FakeRunner, fake_rank, hashed_logprobs, hashed_token

from jaxllm.beam_search_params import BeamSearchParams
from jaxllm.config import EngineConfig
from jaxllm.engine.draft_model import DraftModel
from jaxllm.engine.engine import Engine, Request
from jaxllm.engine.sequence import Sequence, SequenceStatus
from jaxllm.engine.speculation import Proposer, Speculator
from jaxllm.request_error import RequestError
from jaxllm.sampling_params import RequestOutputKind, SamplingParams

NOT_FINITE_ERROR = "ArithmeticError: the model's logits are not finite"
MODES = [
    {"overlap": False},
    {"overlap": True},
    {"overlap": False, "max_steps_per_dispatch": 3},
    {"overlap": True, "max_steps_per_dispatch": 4},
    {"overlap": True, "num_speculative_tokens": 4, "max_steps_per_dispatch": 2},
]


def random_config(rng, **options):
    block_size = rng.choice([1, 2, 3, 4, 8])
    num_blocks = rng.randrange(4, 25)
    max_num_seqs = rng.randrange(1, 7)
    return EngineConfig(
        num_blocks=num_blocks,
        block_size=block_size,
        max_model_len=rng.randrange(max(2, num_blocks * block_size // 3), num_blocks * block_size)
        + 1,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max(max_num_seqs, 1 + options.get("num_speculative_tokens", 0))
        + rng.choice([0, 1, 5, 30]),
        enable_prefix_caching=rng.random() < 0.8,
        policy=rng.choice(["fcfs", "fcfs", "priority"]),
        **options,
    )


def random_request(rng, config, number, prefixes, is_quiet):
    longest = config.max_model_len - 1
    prefix = rng.choice(prefixes)[: rng.randrange(longest + 1)]
    prompt = [*prefix, *(rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(1, 6)))][:longest]
    max_tokens = rng.randrange(1, 20)
    priority = rng.randrange(3) if config.policy == "priority" else 0
    options = {
        "priority": priority, "arrival_time": float(number),
        "cache_salt": rng.choice([None, None, "x"]),
    }  # fmt: skip
    if not is_quiet and rng.random() < 0.25:
        beam_search = BeamSearchParams(
            beam_width=rng.randrange(1, 5),
            max_tokens=max_tokens,
            length_penalty=rng.choice([-0.5, 0.0, 1.0, 1.0, 1.5]),
            early_stopping=rng.choice([True, False, "never"]),
            ignore_eos=rng.random() < 0.5,
        )
        params = beam_search.sampling_params()
        return Request(str(number), prompt, params, beam_search=beam_search, **options)
    n = rng.choice([1, 1, 1, 2, 3])
    params = SamplingParams(
        n=n,
        best_of=rng.choice([None, None, n, n + 1]),
        seed=rng.randrange(1000),
        max_tokens=rng.choice([max_tokens, max_tokens, None]),
        min_tokens=rng.choice([0, 0, min(3, max_tokens)]),
        ignore_eos=rng.random() < 0.5,
        stop_token_ids=[rng.randrange(VOCAB_SIZE)] if rng.random() < 0.2 else None,
        logprobs=None if is_quiet else rng.choice([None, None, 2]),
        prompt_logprobs=rng.choice([None, None, None, 1]),
        output_kind=rng.choice(list(RequestOutputKind)),
    )
    return Request(str(number), prompt, params, **options)


def searched(request, config):
    """What a plain beam search finds: tokens, reason, stop reason of each answer."""
    params, prompt = request.beam_search, list(request.prompt_token_ids)
    max_len = min(params.max_tokens, config.max_model_len - len(prompt))
    stops = () if params.ignore_eos else (EOS,)
    found = beam_search(lambda output: hashed_logprobs([*prompt, *output]), params, stops, max_len)
    return [(answer.token_ids, answer.reason, None) for answer in found]


def expected_answers(request, config):
    """Of a request in an otherwise empty world, in order."""
    if request.beam_search is not None:
        return searched(request, config)
    every = [alone(request, i, config.max_model_len) for i in range(request.params.num_sequences)]
    if request.params.ranks_answers:
        every.sort(key=lambda answer: sum(fake_rank(token_id) for token_id in answer[0]))
    return every[: request.params.n]


def alone(request, index, max_model_len):
    """The answer that the request gets in an otherwise empty world: tokens, reason, stop reason."""
    params = request.params
    sequence = Sequence(
        sequence_id=0, request_id="", index=index, params=params, seed=params.seed + index,
        token_ids=list(request.prompt_token_ids), num_prompt_tokens=len(request.prompt_token_ids),
        eos_token_ids=(EOS,),
    )  # fmt: skip
    while True:
        token_id = hashed_token(sequence)
        sequence.token_ids.append(token_id)
        if sequence.num_output_tokens >= params.min_tokens:
            if token_id == EOS and not params.ignore_eos:
                return sequence.output_token_ids, "stop", None
            if token_id in (params.stop_token_ids or ()):
                return sequence.output_token_ids, "stop", token_id
        if sequence.num_output_tokens == params.max_tokens or sequence.num_tokens == max_model_len:
            return sequence.output_token_ids, "length", None


def all_dispatched(sequence):
    """Whether steps that will yield all its tokens are under way."""
    return sequence.num_tokens == sequence.max_num_tokens


class RandomProposer(Proposer):
    """Knows what the model generates, and is often wrong."""

    def __init__(self, rng):
        self.rng = rng

    def propose(self, sequences, count):
        return [self.guess(sequence, count) for sequence in sequences]

    def guess(self, sequence, count):
        known = replace(
            sequence, token_ids=sequence.token_ids[: sequence.num_known_tokens], num_pending=0
        )
        for _ in range(self.rng.choice([0, count, count])):
            is_right = self.rng.random() < 0.8
            known.token_ids.append(
                hashed_token(known) if is_right else self.rng.randrange(VOCAB_SIZE)
            )
        return known.token_ids[sequence.num_known_tokens :]


class World:
    """An engine on a fake runner, and all that was sent to it and came back."""

    def __init__(self, seed, failure_rate=0.0, poison_rate=0.0, has_draft_model=False, **options):
        self.rng = rng = random.Random(seed)
        self.config = config = random_config(rng, **options)
        self.failure_rate = failure_rate
        self.poison_rate = poison_rate
        # so that several tokens can come a dispatch
        self.is_quiet = has_draft_model or rng.random() < 0.5
        self.arrival_rate = 0.1 if self.is_quiet else 0.4
        self.may_fail = failure_rate or poison_rate
        runner = FakeRunner(
            config, on_batch=self.on_batch, result_error=self.random_failure, is_ok=self.is_ok
        )
        round_budget = None
        if rng.random() < 0.5:
            round_budget = lambda number: 1 << number.bit_length() - 1  # noqa: E731
        speculator = None
        if config.num_speculative_tokens:
            proposer = self.draft_model() if has_draft_model else RandomProposer(rng)
            speculator = Speculator(proposer, config.num_speculative_tokens, row_cost=0.01)
        self.engine = Engine(
            config, runner, vocab_size=VOCAB_SIZE, eos_token_ids=(EOS,), round_budget=round_budget,
            speculator=speculator,
        )  # fmt: skip
        self.prefixes = [
            [rng.randrange(VOCAB_SIZE) for _ in range(config.max_model_len)] for _ in range(3)
        ]
        self.requests: dict[str, Request] = {}
        self.tokens: dict[tuple[str, int], list[int]] = {}
        self.ends: dict[tuple[str, int], tuple] = {}
        self.finished: dict[str, object] = {}
        self.num_made = 0
        self.aborted: set[str] = set()
        self.counts: Counter[str] = Counter()

    def draft_model(self):
        """Its runner holds that what it reads of a block is what it computed of that prefix."""
        config = replace(self.config, max_steps_per_dispatch=self.config.num_speculative_tokens)

        def next_token(sequence):
            is_right = self.rng.random() < 0.8
            return hashed_token(sequence) if is_right else self.rng.randrange(VOCAB_SIZE)

        def on_batch(batch):
            self.counts["guessing"] += len(batch.sequences)
            self.counts["catching up"] += batch.num_tokens - len(batch.sequences)
            if self.rng.random() < self.failure_rate:
                raise self.rng.choice([RuntimeError("failed"), KeyboardInterrupt()])

        return DraftModel(FakeRunner(config, next_token, on_batch), config, cost=0.05)

    def random_failure(self):
        if self.rng.random() < self.failure_rate:
            return self.rng.choice([RuntimeError("failed"), KeyboardInterrupt()])
        return None

    def is_ok(self, sequence):
        return self.rng.random() >= self.poison_rate

    def on_batch(self, batch):
        """What holds of every batch. May fail the step."""
        scheduled = {row.sequence for row in batch.sequences}
        running = set(self.engine.scheduler.running)
        unfinished = {sequence for sequence in running if not all_dispatched(sequence)}
        assert unfinished <= scheduled <= running, "each running one gets a token"
        if self.config.policy == "fcfs":
            oldest = min(
                (state.sequence for state in self.engine._states.values()),
                key=lambda sequence: (sequence.arrival_time, sequence.sequence_id),
            )
            excused = all_dispatched(oldest) or oldest.is_isolated
            assert oldest in scheduled or excused, "the oldest never waits"
        self.counts["several"] += batch.num_steps > 1
        self.counts["forks"] += len(batch.leaders)
        self.counts["copies"] += len(batch.copies)
        self.counts["drafts"] += batch.num_rows - len(batch.sequences)
        self.counts["pending"] += any(sequence.num_pending for sequence in scheduled)
        self.counts["cached"] += sum(sequence.num_cached_tokens for sequence in scheduled)
        error = self.random_failure()
        if error is not None:
            raise error

    def act(self):
        rng = self.rng
        while rng.random() < self.arrival_rate:
            self.num_made += 1
            number = self.num_made
            request = random_request(rng, self.config, number, self.prefixes, self.is_quiet)
            try:
                self.engine.add_request(request)
            except RequestError:  # a search that never fits
                self.counts["refused"] += 1
            else:
                self.requests[request.request_id] = request
        if self.requests and rng.random() < 0.05:
            request_id = rng.choice(list(self.requests))
            if request_id not in self.finished:
                self.aborted.add(request_id)
            self.engine.abort(request_id)
        if rng.random() < 0.02:
            self.engine.reset_prefix_cache()
        self.step()

    def step(self):
        try:
            for output in self.engine.step():
                self.receive(output)
        except KeyboardInterrupt:
            self.counts["interrupts"] += 1
        # else one of the runner's asserts
        assert self.engine.last_error in (None, "RuntimeError: failed", NOT_FINITE_ERROR)
        live = [state.sequence for state in self.engine._states.values()]
        self.engine.scheduler.pool.check_integrity(live)
        for sequence in live:
            running = sequence.status is SequenceStatus.RUNNING
            assert running == (sequence in self.engine.scheduler.running)
            assert len({beam.num_tokens for beam in sequence.beams}) <= 1
            assert running == bool(sequence.block_table) == (sequence.slot >= 0)

    def receive(self, output):
        assert output.request_id not in self.finished
        request = self.requests[output.request_id]
        kind = request.params.output_kind
        if request.params.ranks_answers:
            assert output.finished
        assert output.finished or kind is not RequestOutputKind.FINAL_ONLY
        for answer in output.outputs:
            key = (output.request_id, answer.index)
            known = self.tokens.setdefault(key, [])
            if kind is RequestOutputKind.DELTA:
                known += answer.token_ids
            else:
                assert answer.token_ids[: len(known)] == known
                self.tokens[key] = answer.token_ids
            if answer.logprobs is not None:
                chosen = [next(iter(entry)) for entry in answer.logprobs]
                assert chosen == answer.token_ids
            if answer.finished():
                self.ends[key] = (answer.finish_reason, answer.stop_reason)
        if output.prompt_logprobs is not None:
            self.check_prompt_logprobs(request, output.prompt_logprobs)
        if output.finished:
            self.finished[output.request_id] = output
            self.counts["preemptions"] += output.metrics.num_preemptions
            self.counts["accepted"] += output.metrics.num_accepted_tokens

    def check_prompt_logprobs(self, request, prompt_logprobs):
        assert prompt_logprobs[0] is None
        chosen = [next(iter(entry.items())) for entry in prompt_logprobs[1:]]
        assert [token_id for token_id, _ in chosen] == list(request.prompt_token_ids)[1:]
        assert all(logprob.rank == fake_rank(token_id) for token_id, logprob in chosen)
        self.counts["prompt_logprobs"] += 1

    def drain(self):
        """In fcfs order the oldest gets a token a step, so the work bounds the number of steps."""
        bound = sum(
            len(state.sequence.token_ids) + self.config.max_model_len
            for state in self.engine._states.values()
        )
        for _ in range(bound + 1):
            if not self.engine.has_unfinished_requests():
                return
            self.step()
        raise AssertionError(f"not done after {bound} steps")

    def check_answers(self):
        assert self.finished.keys() == self.requests.keys()
        for request_id, request in self.requests.items():
            is_whole = True
            if request.beam_search is not None or request.params.ranks_answers:
                reasons = {self.ends[request_id, i][0] for i in range(request.params.n)}
                is_whole = reasons.isdisjoint(("abort", "error"))
                if request.params.ranks_answers and self.may_fail:
                    is_whole = False  # the best one may have failed, and another be in its place
                self.counts["searched"] += is_whole and request.beam_search is not None
                self.counts["ranked"] += is_whole and request.params.ranks_answers
            for index, (tokens, *end) in enumerate(expected_answers(request, self.config)):
                got = self.tokens[request_id, index]
                reason, stop_reason = self.ends[request_id, index]
                self.counts[reason] += 1
                if not is_whole:  # which are the best depends on where they were cut short
                    assert request_id in self.aborted or self.may_fail
                elif reason in ("abort", "error"):
                    assert reason == "error" or request_id in self.aborted
                    assert reason == "abort" or self.may_fail
                    assert got == tokens[: len(got)]
                else:
                    assert (got, [reason, stop_reason]) == (tokens, end)

    def check_idle(self):
        pool = self.engine.scheduler.pool
        pool.check_integrity([])
        assert not any(self.engine.runner.is_poisoned(block) for block in pool.cached_blocks)
        assert pool.num_free_blocks == pool.num_blocks
        assert not self.engine._states
        assert self.engine.scheduler.num_waiting == self.engine.scheduler.num_running == 0
        holdings = self.engine.scheduler._holdings
        assert sorted(holdings._free_slots) == list(range(self.config.max_num_seqs))
        assert holdings.num_reserved_slots == 0


def play(seed, num_steps, failure_rate=0.0, poison_rate=0.0, **options):
    world = World(seed, failure_rate, poison_rate, **options)
    for _ in range(3 * num_steps if world.is_quiet else num_steps):
        world.act()
    world.failure_rate = world.poison_rate = 0.0
    world.drain()
    world.check_answers()
    world.check_idle()
    speculator = world.engine.speculator
    if speculator is not None:
        world.counts["draft models that failed"] += speculator.has_failed
    return world


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("first_seed", range(0, 20, 10))
def test_every_answer_is_that_of_the_request_alone(first_seed, mode):
    counts = Counter()
    for seed in range(first_seed, first_seed + 10):
        counts += play(seed, num_steps=120, **mode).counts
    assert counts["error"] == counts["interrupts"] == 0
    # The load has to be one that could go wrong.
    assert counts["stop"] + counts["length"] > 300
    for name in (
        "preemptions",
        "cached",
        "abort",
        "prompt_logprobs",
        "forks",
        "copies",
        "searched",
        "ranked",
    ):
        assert counts[name] > 10, name
    assert (counts["pending"] > 100) == mode["overlap"]
    assert (counts["several"] > 30) == ("max_steps_per_dispatch" in mode)
    if "num_speculative_tokens" in mode:
        assert counts["accepted"] > 30
        assert counts["drafts"] > counts["accepted"] + 30


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_failing_steps_harm_only_their_sequences(mode):
    counts = Counter()
    for seed in range(100, 112):
        counts += play(seed, num_steps=120, failure_rate=0.04, **mode).counts
    for name in ("error", "interrupts", "stop", "length"):
        assert counts[name] > 10, name


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_what_is_not_finite_is_computed_again_and_never_found_in_the_cache(mode):
    counts = Counter()
    for seed in range(200, 212):
        world = play(seed, num_steps=120, failure_rate=0.01, poison_rate=0.03, **mode)
        counts += world.counts
    for name in ("error", "stop", "length", "abort"):
        assert counts[name] > 10, name


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("failure_rate", [0.0, 0.03])
def test_a_draft_model_reads_only_what_it_computed(failure_rate, overlap):
    counts = Counter()
    for seed in range(300, 320):
        counts += play(
            seed, num_steps=60, failure_rate=failure_rate, has_draft_model=True, overlap=overlap,
            num_speculative_tokens=4,
        ).counts  # fmt: skip
    assert counts["guessing"] > 200
    assert counts["catching up"] > 300
    assert counts["accepted"] > 100
    assert counts["preemptions"] > 10
    assert (counts["draft models that failed"] > 0) == (failure_rate > 0)
