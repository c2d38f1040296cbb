"""From a model's configuration and the user's options to the limits and programs of an engine, on
devices that are there or only described. Nothing here needs weights."""

from __future__ import annotations

import math
from dataclasses import replace

import jax.numpy as jnp

from jaxllm.config import EngineConfig, ModelConfig
from jaxllm.engine_options import EngineOptions
from jaxllm.models.decoder import Model, can_pack
from jaxllm.runtime import kv_cache, memory
from jaxllm.runtime.compilation import Compiler
from jaxllm.runtime.memory import StepMemory
from jaxllm.runtime.programs import StepPrograms
from jaxllm.runtime.sharding import Placement, check_divisible, device_bytes, kv_repeats
from jaxllm.runtime.step import StepOptions
from pallas_kernels import native


def build_model(config: ModelConfig, options: EngineOptions, placement: Placement) -> Model:
    """The model as the devices compute it. Raises ValueError for options that do not fit."""
    check_divisible(config, placement.num_devices)
    dtype = options.dtype
    if dtype == "auto":
        dtype = "float32" if config.checkpoint_dtype == "float32" else "bfloat16"
    layer_loop = options.layer_loop
    if layer_loop == "packed" and placement.mesh is not None:
        raise ValueError("layer_loop 'packed' is for one CPU; use 'scan' or 'auto'")
    if layer_loop == "auto":
        on_cpu = "packed" if can_pack(config, dtype) and native.is_available() else "switch"
        on_one_cpu = placement.platform == "cpu" and placement.mesh is None
        layer_loop = on_cpu if on_one_cpu else "scan"
    repeats = kv_repeats(config, placement.num_devices)
    return Model(config, layer_loop, jnp.dtype(dtype), repeats)  # type: ignore[arg-type]


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
    return EngineConfig(
        num_blocks=math.ceil(max_model_len / options.block_size),
        block_size=options.block_size,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens
        or max(512 if on_cpu else 2048, max_num_seqs),
        enable_prefix_caching=options.enable_prefix_caching
        and not _keys_vary(model, max_model_len),
        policy=options.scheduling_policy,
        seed=options.seed,
        overlap=options.overlap,
        max_steps_per_dispatch=options.max_steps_per_dispatch or (1 if on_cpu else 4),
    )


def with_largest_pool(
    config: EngineConfig, model: Model, placement: Placement, budget: int
) -> EngineConfig:
    """The same limits with as many blocks as a budget, bytes of one device, holds."""
    num_blocks = memory.num_pool_blocks(
        budget,
        block_bytes(model, config.block_size, placement),
        config.block_size,
        config.max_num_seqs,
        config.max_model_len,
    )
    return replace(config, num_blocks=num_blocks)


def block_bytes(model: Model, block_size: int, placement: Placement) -> int:
    """Bytes of one block on one device."""
    return kv_cache.block_bytes(model.config, block_size, model.dtype) // placement.num_devices


def pool_budget(
    model: Model,
    smallest: EngineConfig,
    options: EngineOptions,
    placement: Placement,
    compiler: Compiler,
) -> int:
    """Bytes that the pool may take on one device that is there: what the user says, a share of the
    host's memory, or what is left beside all else that the engine needs."""
    if options.kv_cache_memory_bytes is not None:
        return options.kv_cache_memory_bytes
    if placement.platform == "cpu":
        return memory.host_pool_budget()
    total = memory.device_memory(placement.devices[0])
    # What a step needs does not depend on how many blocks there are.
    programs = StepPrograms(model, smallest, placement, step_options(options, placement))
    largest = programs.step(programs.largest_bucket)
    largest = replace(largest, name=f"{largest.name}, smallest pool")
    compiler.submit(largest)
    step = StepMemory.of(compiler.get(largest.name))
    return memory.left_for_pool(
        total,
        parameters=device_bytes(programs.parameters),
        state=device_bytes(programs.state[1:]),
        step=step,
        num_programs=len(programs.all()),
    )


def _keys_vary(model: Model, max_model_len: int) -> bool:
    """Whether the keys of a prefix depend on the prompt that it begins, so cannot be shared."""
    config = model.config
    return config.rope.rope_type == "dynamic" and max_model_len > config.max_position_embeddings
