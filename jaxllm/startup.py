"""From a model's name and the user's options to a running engine."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import psutil

from jaxllm.config import EngineConfig, ModelConfig, ModelError
from jaxllm.engine.engine import Engine
from jaxllm.engine.request import Request
from jaxllm.engine.speculation import PromptLookup, Speculator
from jaxllm.engine_options import EngineOptions
from jaxllm.loading.config_json import generation_defaults, model_config_from_hf
from jaxllm.loading.gguf_source import GGUFFile
from jaxllm.loading.hub import ModelFiles, cache_folder, find_model
from jaxllm.loading.load import check_num_layers, load_parameters, plan_leaves
from jaxllm.loading.safetensors_source import SafetensorsSource
from jaxllm.loading.source import TensorSource
from jaxllm.models.decoder import Model, can_pack
from jaxllm.prompts import TokenizedPrompt
from jaxllm.runtime import kv_cache, memory
from jaxllm.runtime.buckets import TokenRounding
from jaxllm.runtime.compilation import Compiler, ProgramCache
from jaxllm.runtime.memory import MemoryPlan
from jaxllm.runtime.model_runner import ModelRunner
from jaxllm.runtime.profile import Profile
from jaxllm.runtime.step import StepOptions, abstract_tables
from jaxllm.sampling_params import SamplingParams
from jaxllm.text.constraint import ConstraintMaker
from jaxllm.text.tokenizer import Tokenizer, load_tokenizer_from_folder, load_tokenizer_from_gguf
from pallas_kernels import native

logger = logging.getLogger(__name__)

# What one more token in a step costs, in steps of a single token. On a CPU products soon are bound
# by arithmetic; an accelerator reads the same weights for one token and for hundreds.
ROW_COSTS = {"cpu": 0.15}
OTHER_ROW_COST = 0.01


@dataclass(frozen=True)
class RunningEngine:
    """An engine and what its fronts need to know. default_sampling: what the model's makers
    recommend (generation_config.json)."""

    engine: Engine
    runner: ModelRunner
    tokenizer: Tokenizer
    model_name: str
    model_config: ModelConfig
    memory_plan: MemoryPlan
    constraints: ConstraintMaker
    default_sampling: Mapping[str, Any] = field(default_factory=dict)
    profile: Profile | None = None

    def close(self) -> None:
        """Frees the device's memory and ends background compilation."""
        self.runner.close()
        if self.profile is not None:
            self.profile.close()

    def request(
        self, request_id: str, prompt: TokenizedPrompt, params: SamplingParams, **options: Any
    ) -> Request:
        """A request for the engine, with what its params need. options: of Request. Takes up to a
        second where the answer must have a form; raises FormError if it is none."""
        structured = params.structured_outputs
        constraint = None
        if structured is not None:
            constraint = self.constraints.constraint(structured, prompt.text)
        return Request(
            request_id,
            prompt.token_ids,
            params,
            prompt=prompt.text,
            constraint=constraint,
            **options,
        )


@dataclass(frozen=True)
class _Checkpoint:
    """An opened model, its weights not yet read."""

    files: ModelFiles
    config: ModelConfig
    source: TensorSource
    gguf: GGUFFile | None

    @classmethod
    def open(cls, files: ModelFiles) -> _Checkpoint:
        if files.gguf is not None:
            gguf = GGUFFile(files.gguf)
            return cls(files, gguf.config(), gguf.source(), gguf)
        assert files.folder is not None
        return cls(files, model_config_from_hf(files.folder), SafetensorsSource(files.folder), None)

    def tokenizer(self, other: str | Path | None) -> Tokenizer:
        if other is not None:
            if Path(other).suffix == ".gguf":
                return load_tokenizer_from_gguf(GGUFFile(Path(other)).metadata)
            return load_tokenizer_from_folder(Path(other))
        if self.gguf is not None:
            return load_tokenizer_from_gguf(self.gguf.metadata)
        assert self.files.folder is not None
        return load_tokenizer_from_folder(self.files.folder)

    def default_sampling(self) -> dict[str, Any]:
        return {} if self.files.folder is None else generation_defaults(self.files.folder)


def start_engine(model_name: str, options: EngineOptions) -> RunningEngine:
    """Finds, checks and loads a model while its programs are compiled, and makes an engine.

    Raises ModelError for files that cannot be used, ValueError for options that do not fit.
    """
    started = time.monotonic()
    cache_dir = Path(options.cache_dir) if options.cache_dir else cache_folder()
    files = find_model(model_name, revision=options.revision, cache_dir=cache_dir)
    checkpoint = _Checkpoint.open(files)
    check_num_layers(checkpoint.config, checkpoint.source)
    device = jax.devices()[0]
    model = _build_model(checkpoint.config, options, device)
    plan_leaves(checkpoint.config, model.abstract_parameters(), checkpoint.source)
    config = _engine_config(model, options, device)
    opened = time.monotonic()

    programs = ProgramCache.open(cache_dir / "programs") if options.program_cache else None
    compiler = Compiler(
        programs,
        num_threads=max(1, (os.cpu_count() or 1) // 2),  # LLVM uses several cores for one program
        forbid_late=options.forbid_compile,
    )
    try:
        step_options = StepOptions(attention=options.attention)
        runner = ModelRunner(
            model,
            config,
            compiler,
            device=device,
            options=step_options,
            on_demand=options.compilation == "on_demand",
        )
        tokenizer = checkpoint.tokenizer(options.tokenizer)
        runner.set_parameters(_load(checkpoint, model, device))
        loaded = time.monotonic()
        if options.compilation == "ahead" or options.forbid_compile:
            runner.wait_until_compiled()
        profile = None if options.profile_dir is None else Profile(Path(options.profile_dir))
        timeline = runner.timeline = None if profile is None else profile.timeline
    except BaseException:
        compiler.close()
        raise
    eos_token_ids = _end_tokens(model.config, tokenizer)
    engine = Engine(
        config,
        runner,
        vocab_size=model.config.vocab_size,
        tokenizer=tokenizer,
        eos_token_ids=eos_token_ids,
        max_num_waiting=options.max_num_waiting,
        round_budget=TokenRounding(runner.buckets),
        max_steps=runner.max_steps,
        timeline=timeline,
        speculator=_speculator(options, runner),
    )
    plan = _memory_plan(model, config, runner)
    logger.info("%s on %s: memory %s", model_name, device.device_kind, plan)
    logger.info(
        "ready in %.1f s: files %.1f, weights %.1f, programs %.1f (%d of %d ready); the process "
        "had run for %.1f s before (imports)",
        time.monotonic() - started, opened - started, loaded - opened,
        time.monotonic() - loaded, compiler.num_ready, compiler.num_programs,
        time.time() - psutil.Process().create_time() - (time.monotonic() - started),
    )  # fmt: skip
    constraints = ConstraintMaker(tokenizer, model.config.vocab_size, eos_token_ids)
    return RunningEngine(
        engine, runner, tokenizer, model_name, model.config, plan, constraints,
        checkpoint.default_sampling(), profile,
    )  # fmt: skip


def _speculator(options: EngineOptions, runner: ModelRunner) -> Speculator | None:
    if options.speculative is None:
        return None
    row_cost = ROW_COSTS.get(runner.device.platform, OTHER_ROW_COST)
    return Speculator(PromptLookup(), options.max_drafts, row_cost, runner.max_rows)


def _end_tokens(config: ModelConfig, tokenizer: Tokenizer) -> tuple[int, ...]:
    """What ends an answer: the configuration's tokens, and the tokenizer's if the model has it."""
    ids, eos = config.eos_token_ids, tokenizer.eos_token_id
    if eos is None or eos in ids or eos >= config.vocab_size:
        return ids
    return (*ids, eos)


def _build_model(config: ModelConfig, options: EngineOptions, device: jax.Device) -> Model:
    dtype = options.dtype
    if dtype == "auto":
        dtype = "float32" if config.checkpoint_dtype == "float32" else "bfloat16"
    layer_loop = options.layer_loop
    if layer_loop == "auto":
        on_cpu = "packed" if can_pack(config, dtype) and native.is_available() else "switch"
        layer_loop = on_cpu if device.platform == "cpu" else "scan"
    return Model(config, layer_loop, jnp.dtype(dtype))  # type: ignore[arg-type]


def _engine_config(model: Model, options: EngineOptions, device: jax.Device) -> EngineConfig:
    on_cpu = device.platform == "cpu"
    longest = model.config.max_context_len
    max_model_len = options.max_model_len or longest
    if max_model_len > longest:
        raise ValueError(
            f"max_model_len {max_model_len} is more than the {longest} tokens that the model's "
            f"positions are made for"
        )
    max_num_seqs = options.max_num_seqs or (64 if on_cpu else 256)
    max_tokens = options.max_num_batched_tokens or max(512 if on_cpu else 2048, max_num_seqs)
    bytes_of_block = kv_cache.block_bytes(model.config, options.block_size, model.dtype)
    budget = options.kv_cache_memory_bytes or memory.pool_budget(
        device,
        parameters=_num_bytes(model.stored_parameters()),
        state=_table_bytes(model.config, max_num_seqs),
        temporaries=memory.estimated_temporaries(model.config, max_tokens, max_num_seqs),
    )
    num_blocks = memory.num_pool_blocks(
        budget, bytes_of_block, options.block_size, max_num_seqs, max_model_len
    )
    return EngineConfig(
        num_blocks=num_blocks,
        block_size=options.block_size,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_tokens,
        enable_prefix_caching=options.enable_prefix_caching
        and not _keys_vary(model, max_model_len),
        policy=options.scheduling_policy,
        seed=options.seed,
        overlap=options.overlap,
        max_steps_per_dispatch=options.max_steps_per_dispatch or (1 if on_cpu else 4),
        num_speculative_tokens=options.max_drafts,
    )


def _keys_vary(model: Model, max_model_len: int) -> bool:
    """Whether the keys of a prefix depend on the prompt that it begins, so cannot be shared."""
    config = model.config
    return config.rope.rope_type == "dynamic" and max_model_len > config.max_position_embeddings


def _load(checkpoint: _Checkpoint, model: Model, device: jax.Device) -> dict[str, Any]:
    def put(array: np.ndarray, path: tuple[Any, ...]) -> jax.Array:
        return jax.device_put(model.stored(array, path), device)  # one device: all goes to it

    abstract = model.abstract_parameters()
    return load_parameters(checkpoint.config, abstract, checkpoint.source, put=put)


def _memory_plan(model: Model, config: EngineConfig, runner: ModelRunner) -> MemoryPlan:
    """What the engine will use. Where host and device share memory, the process is what it holds
    now beyond the arrays, and what compilation still to come may add."""
    parameters = _num_bytes(model.stored_parameters())
    pool = config.num_blocks * kv_cache.block_bytes(model.config, config.block_size, model.dtype)
    state = _table_bytes(model.config, config.max_num_seqs)
    process = 0
    if runner.device.platform == "cpu":
        stored = kv_cache.pool_dtype(model.dtype, runner.device.platform)
        present = parameters + state + (0 if kv_cache.grows_with_use(stored) else pool)
        process = max(0, memory.process_bytes() - present)
        process += runner.program_bytes_to_come()
    return MemoryPlan(parameters, pool, state, runner.temporaries(), process)


def _table_bytes(config: ModelConfig, max_num_seqs: int) -> int:
    return _num_bytes(abstract_tables(config, max_num_seqs))


def _num_bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


__all__ = ["EngineOptions", "ModelError", "RunningEngine", "start_engine"]
