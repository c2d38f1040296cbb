"""From a model's configuration and the user's options to the limits and programs of an engine, on
devices that are there or only described. Nothing here needs weights."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax

from jaxllm.config import EngineConfig, ModelConfig
from jaxllm.engine_options import KV_CACHE_DTYPES, EngineOptions
from jaxllm.models.decoder import LayerLoop, Model, can_pack
from jaxllm.runtime import kv_cache, memory
from jaxllm.runtime.compilation import Compiler
from jaxllm.runtime.memory import StepMemory
from jaxllm.runtime.programs import StepPrograms
from jaxllm.runtime.sharding import Placement, check_divisible, device_bytes
from jaxllm.runtime.step import StepOptions
from pallas_kernels import native

BLOCK_SIZE = 16
# A TPU's kernel copies block by block, at some cycles each whatever its size, which a v7x moves in
# half the time of a v6e; see docs/kernels.md.
BLOCK_SIZES = {"TPU7": 64, "TPU": 32}

logger = logging.getLogger(__name__)


def build_model(config: ModelConfig, options: EngineOptions, placement: Placement) -> Model:
    """The model as the devices compute it. Raises ValueError for options that do not fit."""
    check_divisible(config, placement.num_devices)
    dtype = options.dtype
    if dtype == "auto":
        dtype = "float32" if config.checkpoint_dtype == "float32" else "bfloat16"
    kv_dtype = KV_CACHE_DTYPES.get(options.kv_cache_dtype, dtype)
    if options.attention == "cpu" and kv_dtype != dtype:
        raise ValueError(
            f"attention 'cpu' does not read a kv_cache_dtype of {options.kv_cache_dtype!r}; use "
            f"'xla' or None"
        )
    layer_loop = options.layer_loop
    if layer_loop == "packed" and placement.mesh is not None:
        raise ValueError("layer_loop 'packed' is for one CPU; use 'scan' or 'auto'")
    if layer_loop == "auto":
        packs = can_pack(config, dtype) and native.is_available() and not options.quantization
        on_cpu = "packed" if packs else "switch"
        layer_loop = on_cpu if placement.is_one_cpu else "scan"
    loop: LayerLoop = layer_loop  # type: ignore[assignment]
    return Model(
        config, loop, dtype, placement.num_devices,
        quantization=options.quantization, kv_dtype=kv_dtype,
    )  # fmt: skip


def step_options(options: EngineOptions, placement: Placement) -> StepOptions:
    """What steps are compiled for. Raises ValueError for what several devices cannot do."""
    attention = options.attention
    if placement.platform == "cpu" and placement.mesh is not None:
        if attention == "cpu":
            raise ValueError("attention 'cpu' is for one CPU; use 'xla' for several devices")
        attention = attention or "xla"  # the C++ kernel is not made for several
    return StepOptions(attention)


def smallest_config(model: Model, options: EngineOptions, placement: Placement) -> EngineConfig:
    """The engine's limits, with a pool for one sequence of max_model_len."""
    on_cpu = placement.platform == "cpu"
    longest = model.config.max_context_len
    max_model_len = options.max_model_len or longest
    if max_model_len > longest:
        raise ValueError(
            f"max_model_len {max_model_len} is more than the {longest} tokens that the model's "
            f"positions are made for"
        )
    max_num_seqs = options.max_num_seqs or (64 if on_cpu else 256)
    kind = placement.devices[0].device_kind
    suitable = (size for name, size in BLOCK_SIZES.items() if kind.startswith(name))
    block_size = options.block_size or next(suitable, BLOCK_SIZE)
    return EngineConfig(
        num_blocks=math.ceil(max_model_len / block_size),
        block_size=block_size,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens
        or max(512 if on_cpu else 2048, max_num_seqs),
        enable_prefix_caching=options.enable_prefix_caching
        and not _keys_vary(model, max_model_len),
        policy=options.scheduling_policy,
        seed=options.seed,
        overlap=options.overlap,
        num_speculative_tokens=options.max_drafts,
        max_steps_per_dispatch=options.max_steps_per_dispatch or (1 if on_cpu else 4),
    )


def draft_config(config: EngineConfig) -> EngineConfig:
    """The limits of a draft model's engine. It shares slots and block tables, and a dispatch makes
    all drafts of a step."""
    return replace(config, max_steps_per_dispatch=config.num_speculative_tokens)


@dataclass(frozen=True)
class DeviceNeeds:
    """Bytes that an engine takes of one device beside its pool, and those of a block in it, all as
    the compiler says. step: the most of all buckets."""

    parameters: int
    state: int
    block: int
    step: StepMemory

    @classmethod
    def of(
        cls, programs: StepPrograms, pool: jax.stages.Compiled, steps: Sequence[StepMemory]
    ) -> DeviceNeeds:
        """From the compiled `programs.pool()` and the steps of `programs.measured_buckets`. What a
        device pads of the arguments counts as the parameters'."""
        pool_bytes = StepMemory.of(pool).temporaries  # a result that is no argument's memory
        state = device_bytes(programs.state[1:])
        block = -(-pool_bytes // programs.config.num_blocks)
        step = StepMemory(
            max(step.temporaries for step in steps),
            max(step.code for step in steps),
            max(step.arguments for step in steps),
        )
        return cls(step.arguments - pool_bytes - state, state, block, step)

    def beside(self, other: DeviceNeeds) -> DeviceNeeds:
        """Of two models with a pool each, of the same number of blocks, whose steps take turns."""
        step = StepMemory(
            max(self.step.temporaries, other.step.temporaries),
            max(self.step.code, other.step.code),
        )
        return DeviceNeeds(
            self.parameters + other.parameters, self.state + other.state, self.block + other.block,
            step,
        )  # fmt: skip

    def left_for_pool(self, device_memory: int, num_programs: int) -> int:
        """Bytes of a device that the pool may take."""
        return memory.left_for_pool(
            device_memory, parameters=self.parameters, state=self.state, step=self.step,
            num_programs=num_programs,
        )  # fmt: skip


def with_pool(
    smallest: EngineConfig,
    model: Model,
    options: EngineOptions,
    placement: Placement,
    compiler: Compiler,
    device_memory: int | None = None,
    draft: Model | None = None,
) -> EngineConfig:
    """The limits with a pool of the size that the user says, of a share of the host's memory, or of
    what an accelerator has left beside all else that the engine needs. device_memory: bytes, of an
    accelerator that cannot be asked. draft: a draft model, whose pool is counted too."""
    budget = options.kv_cache_memory_bytes
    models = [(model, smallest)] + ([] if draft is None else [(draft, draft_config(smallest))])
    block = sum(block_bytes(each, smallest.block_size, placement) for each, _ in models)
    if budget is None and placement.platform == "cpu":
        budget = memory.host_pool_budget()
    if budget is None:
        total = device_memory or memory.device_memory(placement.devices[0])
        steps = step_options(options, placement)
        programs = [StepPrograms(each, config, placement, steps) for each, config in models]
        needs, *others = (_measure(each, compiler) for each in programs)
        for other in others:
            needs = needs.beside(other)
        num_programs = sum(len(each.all()) for each in programs)
        budget, block = needs.left_for_pool(total, num_programs), needs.block
        logger.info(
            "of %.2f GiB, %.2f are left for the block pool and %.2f alone",
            total / memory.GIB, budget / memory.GIB, memory.reserve(total) / memory.GIB,
        )  # fmt: skip
    num_blocks = memory.num_pool_blocks(
        budget, block, smallest.block_size, smallest.max_num_seqs, smallest.max_model_len
    )
    return replace(smallest, num_blocks=num_blocks)


def _measure(programs: StepPrograms, compiler: Compiler) -> DeviceNeeds:
    """With the smallest pool: what a step needs does not depend on how many blocks there are."""
    wanted = [programs.pool()]
    for bucket in programs.measured_buckets:
        wanted.append(replace(programs.step(bucket), name=f"{bucket}, smallest pool"))
    for program in wanted:
        compiler.submit(program)
    pool, *steps = (compiler.get(program.name) for program in wanted)
    needs = DeviceNeeds.of(programs, pool, [StepMemory.of(step) for step in steps])
    for program in wanted:
        compiler.forget(program.name)
    return needs


def block_bytes(model: Model, block_size: int, placement: Placement) -> int:
    """Bytes of one block on one device, without padding."""
    return kv_cache.block_bytes(model.config, block_size, model.kv_dtype) // placement.num_devices


def _keys_vary(model: Model, max_model_len: int) -> bool:
    """Whether the keys of a prefix depend on the prompt that it begins, so cannot be shared."""
    config = model.config
    return config.rope.rope_type == "dynamic" and max_model_len > config.max_position_embeddings
