"""The device side of the engine: owns parameters, device state and compiled steps."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

import jax
import numpy as np

from jaxllm.config import EngineConfig
from jaxllm.engine.batch import BatchPacker, Bucket, accepted_tokens, pack_masks, table_row
from jaxllm.engine.sequence import (
    Batch,
    CandidateRows,
    LogprobRows,
    RunnerFigures,
    Sequence,
    StepResult,
    mask_len,
)
from jaxllm.engine.timeline import Timeline
from jaxllm.models.decoder import Model, Parameters
from jaxllm.quantization.kv_scales import KV_SCALES
from jaxllm.runtime import kv_cache, memory
from jaxllm.runtime.buckets import fitting
from jaxllm.runtime.compilation import Compiler
from jaxllm.runtime.huge_pages import use_huge_pages
from jaxllm.runtime.memory import MemoryPlan, StepMemory
from jaxllm.runtime.programs import (
    ALLOCATE,
    MEASURE_SCALES,
    WRITE_ROW,
    StepPrograms,
)
from jaxllm.runtime.sampler import Logprobs
from jaxllm.runtime.sharding import Placement, device_bytes
from jaxllm.runtime.step import State, StepOptions, StepOutputs

logger = logging.getLogger(__name__)

NUM_FIRST_BUCKETS = 2  # that one, and the smallest for decoding


@dataclass
class RunnerStats:
    """Counts since start. Tokens of a step: those asked for; padded: those its bucket computed."""

    num_steps: int = 0
    num_tokens: int = 0
    num_padded_tokens: int = 0
    steps_by_bucket: Counter[Bucket] = field(default_factory=Counter)
    compile_wait_seconds: float = 0.0  # of steps that needed a program that was not ready

    @property
    def padding_share(self) -> float:
        """The part of all computed tokens that was padding."""
        return 1 - self.num_tokens / self.num_padded_tokens if self.num_padded_tokens else 0.0


@dataclass(frozen=True)
class DeviceStep:
    """A dispatched step; see engine.sequence.StepHandle."""

    batch: Batch
    outputs: StepOutputs

    def result(self) -> StepResult:
        """Waits for the tokens and fetches what the batch's sequences asked for."""
        num_seqs = len(self.batch.sequences)
        sequences = [scheduled.sequence for scheduled in self.batch.sequences]
        params = [sequence.params for sequence in sequences if not sequence.num_candidates]
        tokens = np.atleast_2d(np.asarray(self.outputs.tokens))
        if self.batch.num_rows > num_seqs:
            tokens = accepted_tokens(self.batch, tokens[0])
        else:
            tokens = tokens[: self.batch.num_steps, :num_seqs]
        logprobs = prompt_logprobs = None
        if any(p.is_scored for p in params):
            logprobs = _fetch(self.outputs.logprobs, self.batch.num_rows)
        has_prompt_rows = self.outputs.prompt_logprobs.logprobs.shape[0] > 0
        if has_prompt_rows and any(p.prompt_logprobs is not None for p in params):
            prompt_logprobs = _fetch(self.outputs.prompt_logprobs, self.batch.num_tokens)
        pooled = candidates = None
        if any(s.sequence.num_candidates for s in self.batch.sequences):
            found = self.outputs.candidates
            candidates = CandidateRows(*(np.asarray(array)[:num_seqs] for array in found))
        if any(s.sequence.pooling is not None for s in self.batch.sequences):
            pooled = np.asarray(self.outputs.pooled)[:num_seqs]
        return StepResult(tokens, logprobs, prompt_logprobs, pooled, candidates)


class ModelRunner:
    """Runs batches on the devices of a placement.

    Compilation begins at construction, in the background; `set_parameters` may come later, so that
    weights are read meanwhile. A step waits only for a program that it cannot do without.
    compile_wait_since: the start of such a wait while it lasts; compile_wait_end: of the last one.
    Both may be read from any thread.
    """

    def __init__(
        self,
        model: Model,
        config: EngineConfig,
        compiler: Compiler,
        *,
        placement: Placement,
        options: StepOptions,
        on_demand: bool = False,
    ) -> None:
        self.model = model
        self.config = config
        self.placement = placement
        self.stats = RunnerStats()
        self.programs = StepPrograms(model, config, placement, options)
        self.buckets = self.programs.buckets
        self.compile_wait_since: float | None = None
        self.compile_wait_end = 0.0
        self._compiler = compiler
        self._on_demand = on_demand
        self.timeline: Timeline | None = None  # where steps are recorded
        self._packer = BatchPacker(config.max_num_seqs, config.max_blocks_per_seq)
        self._unread_masks: dict[int, jax.Array] = {}  # by number of rows
        self._params: tuple[jax.Array, ...] | None = None  # the leaves, see make_step
        self._state: State | None = None
        self._fitting = lru_cache(maxsize=4096)(partial(fitting, self.buckets))
        first = {ALLOCATE, MEASURE_SCALES, *self.programs.order[:NUM_FIRST_BUCKETS]}
        for program in self.programs.all():
            compiler.submit(program, held=program.name not in first)

    # ---- start-up

    def set_parameters(self, params: Parameters) -> None:
        """Takes the parameters and allocates the device state."""
        if KV_SCALES in self.programs.parameters:
            measure = self._compiler.get(MEASURE_SCALES)
            params = {**params, KV_SCALES: measure(tuple(jax.tree.leaves(params)))}
        self._params = tuple(jax.tree.leaves(params))
        self.reset()

    def wait_until_compiled(self) -> None:
        """Returns when every program is ready."""
        self._compiler.wait()

    def reset(self) -> None:
        """Builds the device state anew; what the pool held is lost."""
        self._state = None  # freed before its successor is allocated
        self._packer.reset()
        self._state = self._compiler.get(ALLOCATE)()
        if self.placement.is_one_cpu:
            use_huge_pages(self._state.kv_pool, filled=False)

    def close(self) -> None:
        """Ends compilation and drops parameters and state."""
        self._compiler.close()
        self._params = self._state = None

    def memory_plan(self, draft: ModelRunner | None = None) -> MemoryPlan:
        """What the engine will use of one device. draft: of its draft model, if it has one. Where
        host and device share memory, the process is what it holds now beyond the arrays, and what
        compilation still to come may add."""
        programs, step = self.programs, self._step_memory()
        runners = [self] if draft is None else [self, draft]
        pool, *tables = programs.state
        parameters, state = device_bytes(programs.parameters), device_bytes(tables)
        beside = (
            0 if draft is None else device_bytes((draft.programs.parameters, draft.programs.state))
        )
        if self.placement.platform != "cpu":
            num_programs = sum(len(runner.programs.all()) for runner in runners)
            plan = MemoryPlan.on_device(parameters, device_bytes(pool), state, step, num_programs)
            return replace(plan, draft_model=beside)
        present = sum(runner._present_bytes() for runner in runners)
        process = max(0, memory.process_bytes() - present * self.placement.num_devices)
        process += sum(runner._program_bytes_to_come() for runner in runners)
        return MemoryPlan(
            parameters, device_bytes(pool), state, step.temporaries,
            process=process, draft_model=beside,
        )  # fmt: skip

    def _present_bytes(self) -> int:
        """Of the arrays, on one device, those that take their memory at once."""
        pool, *tables = self.programs.state
        grows = kv_cache.grows_with_use(pool.dtype)
        return device_bytes((self.programs.parameters, tables, () if grows else pool))

    def _step_memory(self) -> StepMemory:
        """Of the largest bucket by the compiler's figures, or an upper bound while it is not
        compiled."""
        largest = self.programs.largest_bucket
        if self._compiler.is_ready(largest):
            return StepMemory.of(self._compiler.get(largest))
        return StepMemory.estimated(self.model.config, largest.num_tokens, largest.num_seqs)

    def _program_bytes_to_come(self) -> int:
        """Host memory that the programs which are not ready will take, as far as one can tell:
        where the first ones came from the cache, so will the others."""
        compiler = self._compiler
        missing = compiler.num_programs - compiler.num_ready
        if self._on_demand:
            missing = min(missing, NUM_FIRST_BUCKETS)
        if not missing:
            return 0
        compiling = memory.COMPILER_BYTES if compiler.num_compiled else 0
        return missing * memory.PROGRAM_BYTES + compiling

    # ---- steps

    def execute(self, batch: Batch) -> DeviceStep:
        """Dispatches a step and returns at once."""
        assert self._params is not None, "set_parameters comes first"
        assert self._state is not None
        started = time.monotonic()
        with self._compiler.guard():
            for sequence in self._packer.new_table_rows(batch):
                self._write_table_row(sequence)
            bucket = self._choose(batch)
            packed = self._packer.pack(batch, self.programs.layouts[bucket])
            masks: Any = pack_masks(batch, bucket, self.model.config.vocab_size)
            if masks is None:
                masks = self._no_masks(bucket.num_seqs)
            packed_time = time.monotonic()
            step = self._program(bucket)
            self._state, outputs = step(self._params, self._state, packed, masks)
            if self.placement.platform != "cpu":  # there the host reads them where they are
                outputs.tokens.copy_to_host_async()
        if self.timeline is not None:
            self.timeline.record("pack", started, packed_time)
            self.timeline.record("dispatch", packed_time, time.monotonic())
        if not self._on_demand:
            self._compiler.release()
        self._count(batch, bucket)
        return DeviceStep(batch, outputs)

    def max_steps(self, num_seqs: int) -> int:
        """How many tokens each of so many sequences can decode in one dispatch now: one while the
        program that loops is not compiled."""
        fits = self._fitting(num_seqs, num_seqs, True)
        is_ready = any(b.decode_only and self._compiler.is_ready(b) for b in fits)
        return self.config.max_steps_per_dispatch if is_ready else 1

    def max_rows(self) -> int:
        """How many rows a step that verifies drafts can have without waiting for its program."""
        mixed = (b for b in self.buckets if not b.decode_only and self._compiler.is_ready(b))
        return max((bucket.num_seqs for bucket in mixed), default=0)

    def _choose(self, batch: Batch) -> Bucket:
        """The least padded bucket among those that are compiled, else the one compiled next. What
        would have fitted best comes first among those that are still to be compiled."""
        num_rows = batch.num_rows
        fits = self._fitting(batch.num_tokens, num_rows, batch.num_decodes == num_rows)
        if batch.num_steps > 1:
            fits = [bucket for bucket in fits if bucket.decode_only]
        assert fits, f"no bucket holds {batch.num_tokens} tokens for {num_rows} rows"
        ready = next((b for b in fits if self._compiler.is_ready(b)), None)
        if ready is not fits[0]:
            self._compiler.hurry(fits[0])
        return ready or min(fits, key=self.programs.order.index)

    def _write_table_row(self, sequence: Sequence) -> None:
        info, bias = table_row(sequence, self.model.config.vocab_size)
        write = self._program(WRITE_ROW)
        self._state = write(self._state, np.int32(sequence.slot), info, bias)

    def _no_masks(self, num_rows: int) -> jax.Array:
        """On the devices once and for all."""
        if num_rows not in self._unread_masks:
            shape = (num_rows, mask_len(self.model.config.vocab_size))
            self._unread_masks[num_rows] = self.placement.put(np.zeros(shape, np.int32), "masks")
        return self._unread_masks[num_rows]

    def _program(self, name: Hashable) -> jax.stages.Compiled:
        """A program for a step, which may have to wait for it."""
        if self._compiler.is_ready(name):
            return self._compiler.get(name)
        self.compile_wait_since = started = time.monotonic()
        try:
            return self._compiler.get(name)
        finally:
            self.compile_wait_end = time.monotonic()
            self.compile_wait_since = None
            self.stats.compile_wait_seconds += self.compile_wait_end - started

    def figures(self) -> RunnerFigures:
        """What the runner and its compiler have counted."""
        stats, compiler = self.stats, self._compiler
        return RunnerFigures(
            num_tokens=stats.num_tokens,
            num_padded_tokens=stats.num_padded_tokens,
            num_programs=compiler.num_programs,
            num_ready_programs=compiler.num_ready,
            num_compiled=compiler.num_compiled,
            num_loaded=compiler.num_loaded,
            compile_seconds=compiler.compile_seconds,
            compile_wait_seconds=stats.compile_wait_seconds,
        )

    def _count(self, batch: Batch, bucket: Bucket) -> None:
        self.stats.num_steps += 1
        self.stats.num_tokens += batch.num_computed_tokens
        self.stats.num_padded_tokens += bucket.num_tokens * batch.num_steps
        self.stats.steps_by_bucket[bucket] += 1


def _fetch(rows: Logprobs, num_rows: int) -> LogprobRows:
    host: list[np.ndarray] = [np.asarray(array)[:num_rows] for array in rows]
    return LogprobRows(*host)
