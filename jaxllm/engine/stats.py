"""What the engine counts and measures of its steps."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from statistics import median

from jaxllm.engine.histogram import Histogram, HistogramStats
from jaxllm.engine.scheduler import Scheduler
from jaxllm.engine.sequence import Batch, RunnerFigures
from jaxllm.engine.speculation import SpeculationStats
from jaxllm.engine.timeline import DEVICE, Timeline

NUM_TIMES_KEPT = 1000  # for the medians of stats()
STEP_SECONDS = (
    0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08,
    0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
)  # fmt: skip
STEP_TOKENS = tuple(float(2**i) for i in range(15))


@dataclass(frozen=True)
class EngineStats:
    """Counters since the start, and the state of this moment.

    prefix_queries and prefix_hits are tokens. median_host_seconds: from a step's result on the host
    to the next call of the runner (with overlap the device works meanwhile);
    median_dispatch_seconds: that call (packing, copy, dispatch). Both over the last 1,000 steps,
    None before there are any. step_seconds: from the call of the runner, or with overlap from the
    result of the step before if that came later, to the result on the host. idle_seconds: time in
    which no step was under way although there was something to compute.
    """

    num_running: int
    num_waiting: int
    kv_usage: float
    prefix_queries: int
    prefix_hits: int
    num_preemptions: int
    num_prompt_tokens: int  # of the requests that have their first token
    num_generation_tokens: int
    num_computed_tokens: int  # all that the steps computed, recomputation included
    num_steps: int
    num_failed_steps: int
    median_host_seconds: float | None
    median_dispatch_seconds: float | None
    step_seconds: HistogramStats
    step_tokens: HistogramStats
    runner: RunnerFigures
    idle_seconds: float = 0.0
    speculation: SpeculationStats | None = None  # None without speculation


class StepMeter:
    """Counts steps and takes their times; see EngineStats. timeline: where they are recorded too.

    result_time: of the last result; None after idling, which is not host time.
    """

    def __init__(self, timeline: Timeline | None = None) -> None:
        self.num_steps = self.num_failed_steps = self.num_computed_tokens = 0
        self.num_prompt_tokens = self.num_generation_tokens = 0
        self.idle_seconds = 0.0
        self.result_time: float | None = None
        self.host_seconds: deque[float] = deque(maxlen=NUM_TIMES_KEPT)
        self.dispatch_seconds: deque[float] = deque(maxlen=NUM_TIMES_KEPT)
        self.step_seconds = Histogram(STEP_SECONDS)
        self.step_tokens = Histogram(STEP_TOKENS)
        self._timeline = timeline

    def dispatched(self, started: float, is_device_idle: bool) -> None:
        """The runner was called at this time and has returned."""
        self.dispatch_seconds.append(time.monotonic() - started)
        if self.result_time is not None:
            self.host_seconds.append(started - self.result_time)
            if is_device_idle:
                self.idle_seconds += started - self.result_time

    def finished(self, batch: Batch, dispatch_time: float, waited: float, now: float) -> None:
        """A result that was waited for from ``waited`` on has come. Steps run one after the other,
        so this one began when the one before it was done, if that was after its dispatch."""
        started = dispatch_time
        if self.result_time is not None:
            started = max(started, self.result_time)
        self.result_time = now
        self.num_steps += 1
        num_tokens = batch.num_computed_tokens
        self.num_computed_tokens += num_tokens
        self.step_seconds.observe(now - started)
        self.step_tokens.observe(num_tokens)
        if self._timeline is not None:
            self._timeline.record("wait", waited, now)
            self._timeline.record(DEVICE, started, now)

    def record(self, name: str, start: float) -> None:
        """On the timeline, if there is one: what began at this time has ended."""
        if self._timeline is not None:
            self._timeline.record(name, start, time.monotonic())

    @property
    def median_host_seconds(self) -> float | None:
        return median(self.host_seconds) if self.host_seconds else None

    @property
    def median_dispatch_seconds(self) -> float | None:
        return median(self.dispatch_seconds) if self.dispatch_seconds else None

    def stats(
        self,
        scheduler: Scheduler,
        figures: RunnerFigures,
        speculation: SpeculationStats | None,
    ) -> EngineStats:
        """What was counted here, by the scheduler, by the runner, and of drafts."""
        pool = scheduler.pool
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            kv_usage=pool.usage,
            prefix_queries=pool.num_queried_tokens,
            prefix_hits=pool.num_hit_tokens,
            num_preemptions=scheduler.num_preemptions,
            num_prompt_tokens=self.num_prompt_tokens,
            num_generation_tokens=self.num_generation_tokens,
            num_computed_tokens=self.num_computed_tokens,
            num_steps=self.num_steps,
            num_failed_steps=self.num_failed_steps,
            median_host_seconds=self.median_host_seconds,
            median_dispatch_seconds=self.median_dispatch_seconds,
            step_seconds=self.step_seconds.stats(),
            step_tokens=self.step_tokens.stats(),
            runner=figures,
            idle_seconds=self.idle_seconds,
            speculation=speculation,
        )
