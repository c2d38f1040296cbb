"""Workloads: conversations of one or more turns, and when each begins."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxllm.bench.vocabulary import Prompt, Vocabulary

DATASETS = ("random", "sharegpt", "prefix-repetition", "multi-turn", "trace")
MIN_LEN, MAX_PROMPT_LEN, MAX_TOTAL_LEN = 4, 1024, 2048  # of sharegpt's, as vLLM chooses them
TRACE_BLOCK = 512  # tokens that one hash id of a trace stands for


@dataclass(frozen=True)
class Turn:
    """What the user says and how long the answer is to be, in tokens."""

    prompt: Prompt
    prompt_len: int
    output_len: int


@dataclass(frozen=True)
class Conversation:
    """Its turns follow one another, each with all that was said before. at: seconds from the run's
    start, where the workload says so."""

    turns: tuple[Turn, ...]
    at: float | None = None


@dataclass(frozen=True, kw_only=True)
class WorkloadOptions:
    """The flags of the same names."""

    dataset_name: str = "random"
    dataset_path: str | None = None
    num_prompts: int = 1000
    seed: int = 0
    random_input_len: int = 1024
    random_output_len: int = 128
    random_range_ratio: float = 0.0
    random_prefix_len: int = 0
    sharegpt_output_len: int | None = None
    prefix_repetition_prefix_len: int = 256
    prefix_repetition_suffix_len: int = 256
    prefix_repetition_num_prefixes: int = 10
    prefix_repetition_output_len: int = 128
    multi_turn_num_turns: int = 4
    multi_turn_input_len: int = 64
    multi_turn_output_len: int = 64
    trace_time_unit: str = "s"

    def __post_init__(self) -> None:
        if self.dataset_name not in DATASETS:
            raise ValueError(
                f"--dataset-name must be one of {', '.join(DATASETS)}, got {self.dataset_name!r}"
            )
        for name, value in vars(self).items():
            if isinstance(value, int):
                check_least(name, value, 0 if name in ("seed", "random_prefix_len") else 1)
        if not 0 <= self.random_range_ratio < 1:
            raise ValueError(
                f"--random-range-ratio must be in [0, 1), got {self.random_range_ratio}"
            )
        needs_file = self.dataset_name in ("sharegpt", "trace")
        if needs_file and self.dataset_path is None:
            raise ValueError(f"--dataset-name {self.dataset_name} needs --dataset-path FILE")
        if not needs_file and self.dataset_path is not None:
            raise ValueError(f"--dataset-name {self.dataset_name} takes no --dataset-path")


def check_least(name: str, value: float, least: int) -> None:
    """Raises ValueError, with the option's flag, for a value below that."""
    if value < least:
        raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")


def make_workload(options: WorkloadOptions, vocabulary: Vocabulary) -> list[Conversation]:
    """The conversations, the same for the same seed. Raises ValueError for a bad file."""
    if options.dataset_name in ("sharegpt", "trace"):
        from jaxllm.bench.files import read_sharegpt, read_trace

        read = read_sharegpt if options.dataset_name == "sharegpt" else read_trace
        return read(options, vocabulary)
    rng = np.random.default_rng(options.seed)
    make = {
        "random": _random,
        "prefix-repetition": _prefix_repetition,
        "multi-turn": _multi_turn,
    }[options.dataset_name]
    return make(options, vocabulary, rng)


def single(
    prompt: Prompt, prompt_len: int, output_len: int, at: float | None = None
) -> Conversation:
    """A conversation of one turn."""
    return Conversation((Turn(prompt, prompt_len, output_len),), at)


def _random(
    options: WorkloadOptions, vocabulary: Vocabulary, rng: np.random.Generator
) -> list[Conversation]:
    """Lengths uniform in [(1 - r) len, (1 + r) len], after a common prefix."""
    ratio, count = options.random_range_ratio, options.num_prompts
    input_lens = _lengths(options.random_input_len, ratio, count, rng)
    output_lens = _lengths(options.random_output_len, ratio, count, rng)
    prefix = vocabulary.draw(options.random_prefix_len, rng)
    return [
        single(
            vocabulary.prompt([*prefix, *vocabulary.draw(input_len, rng)]),
            options.random_prefix_len + input_len,
            output_len,
        )
        for input_len, output_len in zip(input_lens, output_lens, strict=True)
    ]


def _lengths(mean: int, ratio: float, count: int, rng: np.random.Generator) -> list[int]:
    low, high = max(1, math.floor(mean * (1 - ratio))), math.ceil(mean * (1 + ratio))
    return rng.integers(low, high + 1, count).tolist()


def _prefix_repetition(
    options: WorkloadOptions, vocabulary: Vocabulary, rng: np.random.Generator
) -> list[Conversation]:
    """num_prompts prompts over num_prefixes prefixes, as evenly as can be, in random order."""
    prefix_len = options.prefix_repetition_prefix_len
    suffix_len = options.prefix_repetition_suffix_len
    num_prefixes = options.prefix_repetition_num_prefixes
    prefixes = [vocabulary.draw(prefix_len, rng) for _ in range(num_prefixes)]
    prompts = [
        [*prefixes[i % num_prefixes], *vocabulary.draw(suffix_len, rng)]
        for i in range(options.num_prompts)
    ]
    rng.shuffle(prompts)
    output_len = options.prefix_repetition_output_len
    return [single(vocabulary.prompt(p), prefix_len + suffix_len, output_len) for p in prompts]


def _multi_turn(
    options: WorkloadOptions, vocabulary: Vocabulary, rng: np.random.Generator
) -> list[Conversation]:
    """num_prompts conversations; always text, since an answer comes as text and is said again."""
    input_len, output_len = options.multi_turn_input_len, options.multi_turn_output_len

    def turn() -> Turn:
        return Turn(vocabulary.text(vocabulary.draw(input_len, rng)), input_len, output_len)

    turns = range(options.multi_turn_num_turns)
    return [Conversation(tuple(turn() for _ in turns)) for _ in range(options.num_prompts)]


def arrival_times(count: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """Seconds at which requests are sent. The gaps are drawn from a gamma distribution of mean
    1 / rate and shape burstiness (1: a Poisson process; smaller: in bursts; larger: evenly), then
    scaled so that the last is sent at count / rate. rate infinite: all at once."""
    if math.isinf(rate):
        return [0.0] * count
    rng = np.random.default_rng([seed, 1])  # not the numbers that the prompts are drawn with
    times = np.cumsum(gamma_gaps(count, rate, burstiness, rng))
    return (times * (count / rate / times[-1])).tolist()


def gamma_gaps(count: int, rate: float, burstiness: float, rng: np.random.Generator) -> np.ndarray:
    """Seconds between requests: mean 1 / rate, variance 1 / (burstiness * rate ** 2)."""
    return rng.gamma(burstiness, 1 / (rate * burstiness), count)


def start_times(
    work: Sequence[Conversation], rate: float, burstiness: float, seed: int
) -> list[float]:
    """When each conversation begins: as its trace says, or drawn."""
    if work and work[0].at is not None:
        return [conversation.at or 0.0 for conversation in work]
    return arrival_times(len(work), rate, burstiness, seed)
