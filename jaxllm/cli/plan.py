"""jaxllm plan: whether a model fits on chips, for how many users, and how fast at best."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllm.cli.settings import Settings, UsageError, read_settings
from jaxllm.config import ModelConfig
from jaxllm.engine_options import EngineOptions

if TYPE_CHECKING:
    from jaxllm.planning import Bound, Plan

GIB = 1 << 30
# Engine options that change no program, or only how a running engine gets its programs.
NOT_PLANNED = (
    "tokenizer", "enable_prefix_caching", "scheduling_policy", "max_num_waiting", "seed", "overlap",
    "compilation", "compiled", "forbid_compile", "profile_dir", "program_cache",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What only this command has."""
    add_chip_flags(parser, required=True)
    parser.add_argument(
        "--prompt-len", type=int, default=1024, metavar="N", help="tokens to the first token of"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def add_chip_flags(parser: argparse.ArgumentParser, required: bool) -> None:
    """--chip and --chips."""
    parser.add_argument(
        "--chip", required=required, metavar="NAME", help="v5e, v5p, v6e or v7x; need not be there"
    )
    parser.add_argument("--chips", type=int, metavar="N", help="how many share the model; 1")


def run(arguments: argparse.Namespace) -> int:
    """The exit code: 1 if the model does not fit."""
    settings = read_settings(arguments)
    if arguments.prompt_len < 1:
        raise UsageError(f"--prompt-len must be at least 1, got {arguments.prompt_len}")
    from jaxllm.planning import Planner

    options = settings.engine_options()
    chip, num_chips = chosen_chips(arguments, options.tensor_parallel_size)
    config = read_model(settings, options)
    assert settings.model is not None
    plan = Planner(config, options, chip, num_chips, progress).plan(arguments.prompt_len)
    if arguments.json:
        print(json.dumps(as_json(settings.model, plan)))
    else:
        print("\n".join(as_text(settings.model, plan)))
    return 0 if plan.fits else 1


def read_model(settings: Settings, options: EngineOptions) -> ModelConfig:
    """The configuration of the model that was named."""
    from jaxllm.loading.hub import cache_folder
    from jaxllm.loading.read_config import read_model_config

    assert settings.model is not None
    cache_dir = Path(options.cache_dir) if options.cache_dir else cache_folder()
    return read_model_config(settings.model, revision=options.revision, cache_dir=cache_dir)


def chosen_chips(arguments: argparse.Namespace, tensor_parallel_size: int) -> tuple[Any, int]:
    """The chip and their number, which tensor_parallel_size may say too."""
    from jaxllm.runtime.chips import find_chip

    chip = find_chip(arguments.chip)
    num_chips = arguments.chips
    if num_chips is None:
        num_chips = max(1, tensor_parallel_size // chip.devices_per_chip)
    elif tensor_parallel_size not in (1, num_chips * chip.devices_per_chip):
        raise UsageError(
            f"--chips {num_chips} and tensor_parallel_size {tensor_parallel_size} contradict each "
            f"other; give one of them"
        )
    return chip, num_chips


def progress(text: str) -> None:
    """A line on standard error, since compiling takes a while."""
    print(f"jaxllm: {text}", file=sys.stderr, flush=True)


def as_json(model: str, plan: Plan) -> dict[str, Any]:
    """The plan in bytes of one device and seconds."""
    return {
        "model": model,
        "chip": plan.chip.name,
        "chips": plan.num_chips,
        "devices": plan.num_chips * plan.chip.devices_per_chip,
        "dtype": plan.dtype,
        "quantization": plan.quantization,
        "kv_cache_dtype": plan.kv_cache_dtype,
        "max_model_len": plan.config.max_model_len,
        "max_num_seqs": plan.config.max_num_seqs,
        "max_num_batched_tokens": plan.config.max_num_batched_tokens,
        "fits": plan.fits,
        "bytes_per_device": {
            "memory": plan.memory,
            "parameters": plan.parameters,
            "sampling_state": plan.state,
            "temporaries": plan.temporaries,
            "programs": plan.programs,
            "reserve": plan.reserve,
            "pool": max(0, plan.pool),
            "block": plan.block,
        },
        "temporaries_from": "compiler" if plan.is_compiled else "not compiled",
        "pool_is_copied": plan.pool_is_copied,
        "users": [
            {
                "context": users.context,
                "in_memory": users.in_memory,
                "at_once": users.at_once,
                "token": _bound_json(users.token),
            }
            for users in plan.users
        ],
        "one_user_token": _bound_json(plan.one_user),
        "first_token": _bound_json(plan.first_token)
        and {
            "prompt_len": plan.prompt_len,
            **(_bound_json(plan.first_token) or {}),
        },
        "advice": list(plan.advice),
    }


def _bound_json(bound: Bound | None) -> dict[str, Any] | None:
    if bound is None:
        return None
    return {
        "seconds": bound.seconds,
        "binds": bound.binds,
        "memory": bound.memory,
        "compute": bound.compute,
        "collectives": bound.collectives,
    }


def as_text(model: str, plan: Plan) -> list[str]:
    """The plan as lines of a table."""
    chip, config = plan.chip, plan.config
    devices = plan.num_chips * chip.devices_per_chip
    lines = [
        f"{model} in {plan.dtype} on {plan.num_chips} x {chip.name}"
        + (f" ({devices} devices)" if devices != plan.num_chips else ""),
        f"weights {plan.quantization or plan.dtype}, KV cache {plan.kv_cache_dtype}",
        f"max_model_len {config.max_model_len}, max_num_seqs {config.max_num_seqs}, "
        f"max_num_batched_tokens {config.max_num_batched_tokens}",
        "",
        f"fits: {'yes' if plan.fits else 'no'}",
        "",
        "bytes of each device",
    ]
    parts = [
        ("memory for programs", plan.memory),
        ("parameters", plan.parameters),
        ("sampling state", plan.state),
        ("temporaries", plan.temporaries),
        ("compiled programs", plan.programs),
        ("reserve", plan.reserve),
        ("left for the block pool", max(0, plan.pool)),
        ("one block", plan.block),
    ]
    for name, size in parts:
        known = name in ("temporaries", "compiled programs")
        text = (
            f"{size:>16,}  {size / GIB:8.3f} GiB"
            if plan.is_compiled or not known
            else (" not compiled, since it cannot fit")
        )
        lines.append(f"  {name:<24}{text}")
    if plan.pool_is_copied:
        lines.append(
            "  the compiled steps copy the block pool: temporaries grow with it, and fewer"
        )
        lines.append("  users fit than are said below")
    lines += _times(plan)
    if plan.advice:
        lines += ["", "what would fit, each alone:", *(f"  {text}" for text in plan.advice)]
    return lines


def _times(plan: Plan) -> list[str]:
    if plan.first_token is None or plan.one_user is None:
        return []
    lines = ["", "at best (what binds: memory, compute or collectives)"]
    first = f"first token of a prompt of {plan.prompt_len}"
    lines.append(f"  {first:<40}{_bound_text(plan.first_token)}")
    lines.append(f"  {'a token, one user, 1,024 tokens or fewer':<40}{_bound_text(plan.one_user)}")
    lines += ["", f"  {'context':>10}{'users in memory':>18}{'at once':>10}   a token of each"]
    for users in plan.users:
        token = "-" if users.token is None else _bound_text(users.token)
        lines.append(f"  {users.context:>10,}{users.in_memory:>18,}{users.at_once:>10,}   {token}")
    return lines


def _bound_text(bound: Bound) -> str:
    return f"{1e3 * bound.seconds:8.2f} ms ({bound.binds})"
