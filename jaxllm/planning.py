"""Will a model fit on chips that are not there, for how many users, and how fast at best.

Bytes are the compiler's (`memory_analysis`) for the engine's own programs. Times are lower bounds:
what must be read divided by the memory's bandwidth, products by the peak, what devices must send
each other by their links; the longest of the three binds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType

from jaxllm.config import EngineConfig, ModelConfig
from jaxllm.engine.batch import Bucket
from jaxllm.engine_options import EngineOptions
from jaxllm.engine_setup import (
    DeviceNeeds,
    block_bytes,
    build_model,
    smallest_config,
    step_options,
)
from jaxllm.runtime import memory
from jaxllm.runtime.buckets import fitting
from jaxllm.runtime.chips import Chip, described_devices
from jaxllm.runtime.compilation import lower
from jaxllm.runtime.cost import collective_bytes, compile_for_text, copies, product_flops
from jaxllm.runtime.memory import StepMemory
from jaxllm.runtime.programs import StepPrograms
from jaxllm.runtime.sharding import AXIS, Placement, device_bytes

CONTEXTS = (1024, 4096, 16384, 65536, 262144, 1048576)
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Bound:
    """Seconds that a step takes at least, by what must be done meanwhile."""

    memory: float
    compute: float
    collectives: float

    @property
    def seconds(self) -> float:
        return max(self.memory, self.compute, self.collectives)

    @property
    def binds(self) -> str:
        by_time = {"memory": self.memory, "compute": self.compute, "collectives": self.collectives}
        return max(by_time, key=lambda name: by_time[name])

    def times(self, count: int) -> Bound:
        return Bound(self.memory * count, self.compute * count, self.collectives * count)


@dataclass(frozen=True)
class Users:
    """How many sequences of a context the pool holds, and the bound on a token of each when as
    many of them as the engine computes at once are decoded; None if not one fits."""

    context: int
    in_memory: int
    at_once: int
    token: Bound | None


@dataclass(frozen=True)
class Plan:
    """Bytes are of one device. pool: what is left for blocks; less than 0 where nothing is."""

    chip: Chip
    num_chips: int
    config: EngineConfig
    dtype: str
    quantization: str | None
    kv_cache_dtype: str
    memory: int
    parameters: int
    state: int
    temporaries: int
    programs: int
    reserve: int
    block: int
    is_compiled: bool  # else nothing is known of temporaries
    pool_is_copied: bool = False  # then temporaries grow with the pool, beyond what is said
    users: tuple[Users, ...] = ()
    one_user: Bound | None = None
    prompt_len: int = 0
    first_token: Bound | None = None
    advice: tuple[str, ...] = ()

    @property
    def pool(self) -> int:
        used = self.parameters + self.state + self.temporaries + self.programs
        return self.memory - self.reserve - used

    @property
    def fits(self) -> bool:
        """Whether one sequence of max_model_len has room."""
        return self.pool >= self.config.max_blocks_per_seq * self.block


class Planner:
    """Plans for one model on one kind and number of chips. Raises ValueError for options that do
    not fit and for chips that cannot be described."""

    def __init__(
        self, config: ModelConfig, options: EngineOptions, chip: Chip, num_chips: int,
        progress: Progress = lambda _: None,
    ) -> None:  # fmt: skip
        if options.draft_model:
            raise ValueError(
                "speculative: a plan does not count a draft model; leave it out, or plan for each "
                "model alone"
            )
        self.chip, self.num_chips = chip, num_chips
        self._config, self._options, self._progress = config, options, progress
        placement = Placement.on(described_devices(chip, num_chips), on_mesh=True)
        self.programs = _programs(config, options, placement)
        self._flops: dict[Bucket, float] = {}  # of one device
        self._sent: dict[Bucket, float] = {}
        self._copies_pool = False

    def plan(self, prompt_len: int) -> Plan:
        """Compiles what it needs to know; less where it is clear that the model does not fit."""
        plan = self._without_compiling()
        if not plan.fits:
            return replace(plan, advice=self._advice(plan))
        try:
            needs = self._needs()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            # a program alone is too large
            return replace(plan, temporaries=plan.pool, advice=self._advice(plan))
        plan = replace(
            plan,
            is_compiled=True,
            pool_is_copied=self._copies_pool,
            parameters=needs.parameters,
            block=needs.block,
            temporaries=needs.step.temporaries,
            programs=needs.step.code * len(self.programs.all()),
        )
        if not plan.fits:
            return replace(plan, advice=self._advice(plan))
        return self._with_bounds(plan, prompt_len)

    def _without_compiling(self) -> Plan:
        """By shapes alone and without temporaries: what does not fit so fits in no way."""
        programs = self.programs
        total = self.chip.memory
        return Plan(
            self.chip, self.num_chips, programs.config, programs.model.dtype.name,
            programs.model.quantization, programs.model.kv_dtype.name, total,
            device_bytes(programs.parameters), device_bytes(programs.state[1:]), 0, 0,
            memory.reserve(total),
            block_bytes(programs.model, programs.config.block_size, programs.placement), False,
        )  # fmt: skip

    def _needs(self) -> DeviceNeeds:
        programs = self.programs
        _, pool = lower(programs.pool(), programs.placement)
        steps = [self._compile(bucket) for bucket in programs.measured_buckets]
        return DeviceNeeds.of(programs, pool.compile(), steps)

    def _compile(self, bucket: Bucket) -> StepMemory:
        """What a bucket's step takes; keeps its products and collectives."""
        self._progress(f"compiling {bucket} for {self.num_chips} x {self.chip.name}")
        placement = self.programs.placement
        traced, lowered = lower(self.programs.step(bucket), placement)
        self._flops[bucket] = product_flops(traced.jaxpr.jaxpr) / placement.num_devices
        compiled, hlo = compile_for_text(lowered)
        self._sent[bucket] = collective_bytes(hlo, placement.num_devices)
        pool: Any = self.programs.state.kv_pool
        self._copies_pool |= copies(hlo, pool)
        return StepMemory.of(compiled)

    def _cost(self, bucket: Bucket) -> tuple[float, float]:
        """Products' operations and bytes sent by one device."""
        if bucket not in self._flops:
            if self.programs.placement.num_devices > 1:
                self._compile(bucket)
            else:  # nothing is sent, and the products are those that are traced
                self._progress(f"tracing {bucket}")
                traced, _ = lower(self.programs.step(bucket), self.programs.placement)
                self._flops[bucket], self._sent[bucket] = product_flops(traced.jaxpr.jaxpr), 0.0
        return self._flops[bucket], self._sent[bucket]

    def _with_bounds(self, plan: Plan, prompt_len: int) -> Plan:
        config = plan.config
        longest = config.max_model_len
        contexts = [c for c in CONTEXTS if c < longest] + [longest]
        prompt_len = min(prompt_len, longest)
        return replace(
            plan,
            users=tuple(self._users(plan, context) for context in contexts),
            one_user=self._decode(1, min(1024, longest)),
            prompt_len=prompt_len,
            first_token=self._prompt(prompt_len),
        )

    def _users(self, plan: Plan, context: int) -> Users:
        config = plan.config
        blocks = -(-context // config.block_size)
        in_memory = plan.pool // plan.block // blocks
        at_once = min(in_memory, config.max_num_seqs)
        token = self._decode(at_once, context) if at_once else None
        return Users(context, in_memory, at_once, token)

    def _decode(self, num_seqs: int, context: int) -> Bound:
        bucket = fitting(self.programs.buckets, num_seqs, num_seqs, True)[0]
        return self._bound(bucket, num_seqs * context, num_seqs * context)

    def _prompt(self, num_tokens: int) -> Bound:
        """Of a prompt alone, in chunks of the budget."""
        budget = self.programs.config.max_num_batched_tokens
        chunk = min(num_tokens, budget)
        bucket = fitting(self.programs.buckets, chunk, 1, False)[0]
        pairs = chunk * num_tokens // 2  # of queries and the keys they see
        one = self._bound(bucket, num_tokens // 2, pairs)
        return one.times(-(-num_tokens // budget))

    def _bound(self, bucket: Bucket, num_cached: int, num_pairs: int) -> Bound:
        """num_cached: tokens read from the pool; num_pairs: of a query and a key."""
        programs, chip = self.programs, self.chip
        model, num_devices = programs.model, programs.placement.num_devices
        flops, sent = self._cost(bucket)
        config = model.loaded_config
        attention = 4 * config.num_layers * config.num_heads * config.head_dim * num_pairs
        of_token = block_bytes(model, programs.config.block_size, programs.placement)
        cached = num_cached * of_token // programs.config.block_size
        return Bound(
            (programs.weights_read + cached) / chip.memory_bandwidth,
            (flops + attention / num_devices) / chip.flops,
            sent / chip.link_bandwidth,
        )

    # ---- what would fit

    def _estimated(self) -> StepMemory:
        largest = self.programs.largest_bucket
        model = self.programs.model
        return StepMemory.estimated(model.config, largest.num_tokens, largest.num_seqs)

    def _advice(self, plan: Plan) -> tuple[str, ...]:
        """Changes that would make room, each alone, by shapes and with the temporaries of this
        plan; where none was compiled, with an upper bound on them."""
        if not plan.is_compiled:
            plan = replace(plan, temporaries=self._estimated().temporaries)
        found = [self._more_chips(plan), self._shorter(plan), self._fewer_sequences(plan)]
        if self._resized(plan, replace(self._options, quantization="int8")).fits:
            found.append("--quantization int8")
        if self._resized(plan, replace(self._options, kv_cache_dtype="fp8", block_size=None)).fits:
            found.append("--kv-cache-dtype fp8")
        return tuple(text for text in found if text) or (
            "no number of these chips, shorter context or fewer sequences would do",
        )

    def _more_chips(self, plan: Plan) -> str | None:
        for num_chips in self.chip.topologies:
            num_devices = num_chips * self.chip.devices_per_chip
            if num_chips <= self.num_chips:
                continue
            try:
                other = self._resized(plan, self._options, num_devices)
            except ValueError:  # so many cannot share its heads
                continue
            if other.fits:
                return f"--chips {num_chips}"
        return None

    def _resized(self, plan: Plan, options: EngineOptions, num_devices: int | None = None) -> Plan:
        """The plan with the parameters and blocks of other options or of another number of devices,
        by shapes."""
        placement = self.programs.placement
        if num_devices is not None:
            placement = _only_shapes(placement, num_devices)
        programs = _programs(self._config, options, placement)
        return replace(
            plan,
            parameters=device_bytes(programs.parameters),
            block=block_bytes(programs.model, plan.config.block_size, programs.placement),
        )

    def _shorter(self, plan: Plan) -> str | None:
        tokens = plan.pool // plan.block * plan.config.block_size
        return f"--max-model-len {tokens}" if tokens > 0 else None

    def _fewer_sequences(self, plan: Plan) -> str | None:
        num_seqs = plan.config.max_num_seqs // 2
        while num_seqs:
            state = plan.state * num_seqs // plan.config.max_num_seqs
            if replace(plan, state=state).fits:
                return f"--max-num-seqs {num_seqs}"
            num_seqs //= 2
        return None


def _programs(config: ModelConfig, options: EngineOptions, placement: Placement) -> StepPrograms:
    model = build_model(config, options, placement)
    smallest = smallest_config(model, options, placement)
    return StepPrograms(model, smallest, placement, step_options(options, placement))


def _only_shapes(placement: Placement, num_devices: int) -> Placement:
    """As many devices, of which nothing is known but their number."""
    mesh: Any = AbstractMesh((num_devices,), (AXIS,), axis_types=(AxisType.Auto,))
    return Placement(placement.devices[:1] * num_devices, mesh)
