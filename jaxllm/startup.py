"""From a model's name and the user's options to a running engine."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import psutil

from jaxllm.checkpoint import Checkpoint
from jaxllm.config import ModelConfig, ModelError
from jaxllm.draft_setup import Draft
from jaxllm.engine.engine import Engine
from jaxllm.engine.request import Request
from jaxllm.engine.speculation import PromptLookup, Proposer, Speculator
from jaxllm.engine_options import EngineOptions
from jaxllm.engine_setup import (
    build_model,
    draft_config,
    smallest_config,
    step_options,
    with_pool,
)
from jaxllm.loading.hub import cache_folder
from jaxllm.prompts import TokenizedPrompt
from jaxllm.runtime.buckets import TokenRounding
from jaxllm.runtime.compilation import Compiler, ProgramCache
from jaxllm.runtime.compiled_folder import CompiledFolder
from jaxllm.runtime.libtpu_flags import set_flags
from jaxllm.runtime.memory import MemoryPlan
from jaxllm.runtime.model_runner import ModelRunner
from jaxllm.runtime.profile import Profile
from jaxllm.runtime.sharding import Placement
from jaxllm.sampling_params import SamplingParams
from jaxllm.text.constraint import ConstraintMaker
from jaxllm.text.tokenizer import Tokenizer

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
    draft_runner: ModelRunner | None = None

    def close(self) -> None:
        """Frees the device's memory and ends background compilation."""
        self.runner.close()
        if self.draft_runner is not None:
            self.draft_runner.close()
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


def start_engine(model_name: str, options: EngineOptions) -> RunningEngine:
    """Finds, checks and loads a model while its programs are compiled, and makes an engine.

    Raises ModelError for files that cannot be used, ValueError for options that do not fit.
    """
    started = time.monotonic()
    cache_dir = Path(options.cache_dir) if options.cache_dir else cache_folder()
    checkpoint = Checkpoint.open(model_name, options.revision, cache_dir)
    folder = options.compiled
    compiled = None if folder is None else CompiledFolder(Path(folder).expanduser())
    placement = real_placement(
        options.tensor_parallel_size, on_mesh=compiled is not None and compiled.on_mesh
    )
    model = build_model(checkpoint.config, options, placement)
    checkpoint.check(model)
    draft = None
    if options.draft_model:
        draft = Draft.open(options.draft_model, options, placement, model.config, cache_dir)
    smallest = smallest_config(model, options, placement)
    opened = time.monotonic()

    steps = step_options(options, placement)
    program_cache = ProgramCache.open(cache_dir / "programs") if options.program_cache else None
    new_compiler = partial(
        Compiler,
        program_cache,
        forbid_late=options.forbid_compile,
        placement=placement,
        compiled=compiled,
    )
    new_runner = partial(
        ModelRunner,
        placement=placement,
        options=steps,
        on_demand=options.compilation == "on_demand",
    )
    with ExitStack() as stack:
        compiler = stack.enter_context(closing(new_compiler()))
        if compiled is None:
            draft_model = None if draft is None else draft.model
            config = with_pool(smallest, model, options, placement, compiler, draft=draft_model)
        else:
            config = compiled.config(model, smallest, steps, placement)
        runner = new_runner(model, config, compiler)
        tokenizer = checkpoint.tokenizer(options.tokenizer)
        draft_runner = None
        if draft is not None:
            draft.check_tokenizer(tokenizer)
            draft_compiler = stack.enter_context(closing(new_compiler()))
            draft_runner = new_runner(draft.model, draft_config(config), draft_compiler)
            draft_runner.set_parameters(draft.checkpoint.load(draft.model, placement))
        runner.set_parameters(checkpoint.load(model, placement))
        loaded = time.monotonic()
        if options.compilation == "ahead" or options.forbid_compile:
            runner.wait_until_compiled()
            if draft_runner is not None:
                draft_runner.wait_until_compiled()
        profile = None if options.profile_dir is None else Profile(Path(options.profile_dir))
        timeline = runner.timeline = None if profile is None else profile.timeline
        proposer = None
        if draft is not None and draft_runner is not None:
            proposer = draft.proposer(draft_runner, runner)
        stack.pop_all()  # from here on RunningEngine.close() does it
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
        speculator=_speculator(options, runner, proposer or PromptLookup()),
    )
    plan = runner.memory_plan(draft_runner)
    logger.info("%s on %s: memory %s", model_name, placement, plan)
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
        checkpoint.default_sampling(), profile, draft_runner,
    )  # fmt: skip


def _speculator(
    options: EngineOptions, runner: ModelRunner, proposer: Proposer
) -> Speculator | None:
    if options.speculative is None:
        return None
    row_cost = ROW_COSTS.get(runner.placement.platform, OTHER_ROW_COST)
    return Speculator(proposer, options.max_drafts, row_cost, runner.max_rows)


def _end_tokens(config: ModelConfig, tokenizer: Tokenizer) -> tuple[int, ...]:
    """What ends an answer: the configuration's tokens, and the tokenizer's if the model has it."""
    ids, eos = config.eos_token_ids, tokenizer.eos_token_id
    if eos is None or eos in ids or eos >= config.vocab_size:
        return ids
    return (*ids, eos)


def real_placement(num_devices: int, *, on_mesh: bool = False) -> Placement:
    """So many of this machine's devices. Raises ValueError if it has fewer."""
    platforms: str | None = jax.config.jax_platforms  # type: ignore[attr-defined]
    if platforms is None or "tpu" in platforms:
        set_flags()
    devices = jax.devices()
    if num_devices > len(devices):
        raise ValueError(
            f"tensor_parallel_size {num_devices} is more than the {len(devices)} devices "
            f"({devices[0].device_kind}) of this machine"
        )
    return Placement.on(devices[:num_devices], on_mesh=on_mesh)


__all__ = ["EngineOptions", "ModelError", "RunningEngine", "start_engine"]
