"""A runner whose device is a clock: every step takes a fixed time, steps run one after the other,
and the host's part, packing included, is the real one.

Time is what this thread computed plus what it would have waited for the device, so other work on
the machine, which may take the processor away, does not count.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from jaxllm.config import EngineConfig
from jaxllm.engine.batch import BatchPacker, Bucket, PackedLayout
from jaxllm.engine.sequence import Batch, RunnerFigures, StepResult


class Clock:
    """Seconds that this thread computed or waited."""

    def __init__(self) -> None:
        self._waited = 0.0

    def now(self) -> float:
        return time.thread_time() + self._waited

    def wait_until(self, moment: float) -> None:
        self._waited += max(0.0, moment - self.now())


@dataclass(frozen=True)
class ClockHandle:
    """A step that is done at a time of the clock."""

    clock: Clock
    tokens: np.ndarray
    end: float

    def result(self) -> StepResult:
        self.clock.wait_until(self.end)
        return StepResult(self.tokens)


class ClockRunner:
    """step_seconds: what one token of each sequence takes. busy_seconds: what all steps took;
    start, end: of the device's work. The device begins a step when it is dispatched and the one
    before it is done."""

    def __init__(self, config: EngineConfig, step_seconds: float, token_id: int = 3) -> None:
        self.step_seconds = step_seconds
        self.token_id = token_id
        self._packer = BatchPacker(config.max_num_seqs, config.max_blocks_per_seq)
        self._config = config
        self._clock = Clock()
        self.restart_clock()

    def restart_clock(self) -> None:
        self.busy_seconds = 0.0
        self.start = self.end = self._clock.now()

    @property
    def utilisation(self) -> float:
        """The share of the time in which the device worked."""
        return self.busy_seconds / (self.end - self.start)

    def execute(self, batch: Batch) -> ClockHandle:
        config, num_seqs = self._config, len(batch.sequences)
        decode_only = batch.num_decodes == num_seqs
        bucket = Bucket(batch.num_tokens, config.max_num_seqs, decode_only)
        max_steps = config.max_steps_per_dispatch if decode_only else 1
        self._packer.new_table_rows(batch)
        self._packer.pack(batch, PackedLayout(bucket, config.max_blocks_per_seq, max_steps))
        cost = self.step_seconds * batch.num_steps
        self.end = max(self.end, self._clock.now()) + cost
        self.busy_seconds += cost
        tokens = np.full((batch.num_steps, num_seqs), self.token_id, np.int32)
        return ClockHandle(self._clock, tokens, self.end)

    def reset(self) -> None:
        self._packer.reset()

    def figures(self) -> RunnerFigures:
        return RunnerFigures()
